#include "backend_cpu/gradient_rows.h"

#include "core/element.h"

namespace tandem::cpu {
namespace {

// Rows [begin, end) of a packed gradient.
void WriteZeros(const core::Array4& gradient, int64_t heads, int64_t columns, int64_t begin,
                int64_t end) {
  if (gradient.data == nullptr) return;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t offset = head * gradient.head_stride + row * gradient.row_stride;
      for (int64_t column = 0; column < columns; ++column) {
        core::StoreFloat(gradient.data, gradient.dtype, offset + column * gradient.column_stride,
                         0.0f);
      }
    }
  }
}

}  // namespace

void WriteGradientsOutsideSequences(const core::Problem& problem) {
  if (!core::IsPacked(problem)) return;
  int64_t q_covered = 0, kv_covered = 0;
  for (int64_t b = 0; b <= problem.batch; ++b) {
    core::Sequence s = {};
    s.q_start = problem.q_total;
    s.kv_start = problem.kv_total;
    int32_t status = 0;
    if (b < problem.batch) s = core::ResolveSequence(problem, b, &status);
    WriteZeros(problem.dq, problem.q_heads, problem.qk_dim, q_covered, s.q_start);
    WriteZeros(problem.dk, problem.kv_heads, problem.qk_dim, kv_covered, s.kv_start);
    WriteZeros(problem.dv, problem.kv_heads, problem.v_dim, kv_covered, s.kv_start);
    q_covered = core::Max(q_covered, s.q_start + s.q_rows);
    kv_covered = core::Max(kv_covered, s.kv_start + s.kv_rows);
  }
}

}  // namespace tandem::cpu
