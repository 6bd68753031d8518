#include "backend_cpu/output_rows.h"

#include "core/element.h"
#include "core/softmax.h"

namespace tandem::cpu {

void WriteEmptyRows(const core::Problem& problem, const core::Sequence& sequence, int64_t head,
                    int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = core::QueryOffset(problem.out, sequence, head, row);
    for (int64_t column = 0; column < problem.v_dim; ++column) {
      core::StoreFloat(problem.out.data, problem.out.dtype,
                       offset + column * problem.out.column_stride, 0.0f);
    }
    if (problem.lse.data != nullptr) {
      core::StoreFloat(problem.lse.data, core::DType::kF32,
                       core::QueryOffset(problem.lse, sequence, head, row),
                       core::NegativeInfinity());
    }
  }
}

void WriteRowsOutsideSequences(const core::Problem& problem) {
  if (!core::IsPacked(problem)) return;
  core::Sequence gap = {};
  int64_t covered = 0;
  for (int64_t b = 0; b <= problem.batch; ++b) {
    int64_t begin = problem.q_total;
    int64_t end = problem.q_total;
    if (b < problem.batch) {
      int32_t status = 0;
      const core::Sequence sequence = core::ResolveSequence(problem, b, &status);
      begin = sequence.q_start;
      end = sequence.q_start + sequence.q_rows;
    }
    gap.q_start = covered;
    for (int64_t head = 0; head < problem.q_heads; ++head) {
      WriteEmptyRows(problem, gap, head, 0, begin - covered);
    }
    covered = core::Max(covered, end);
  }
}

}  // namespace tandem::cpu
