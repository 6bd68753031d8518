#include "backend_cpu/reference.h"

#include <cmath>

#include "backend_cpu/output_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/reference_row.h"
#include "core/element.h"
#include "core/mask_tiles.h"
#include "core/philox.h"

namespace tandem::cpu {
namespace {

using core::DType;
using core::Problem;
using core::Sequence;

constexpr int64_t kRowsPerTask = 16;

// The f64 twins of core/softmax.h.
double MaxKeepNan(double a, double b) {
  if (std::isnan(a)) return a;
  return (b > a || std::isnan(b)) ? b : a;
}
double SoftmaxReference(double m) { return m == kNegativeInfinity ? 0.0 : m; }
double SoftmaxRescale(double old_m, double new_m) {
  if (old_m == kNegativeInfinity) return 0.0;
  return old_m == new_m ? 1.0 : std::exp(old_m - new_m);
}

// sum q[c] * k[c], in four interleaved sums.
template <DType kType>
double Dot(const double* q, const void* k, int64_t offset, int64_t stride, int64_t count) {
  double sums[4] = {};
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    for (int lane = 0; lane < 4; ++lane) {
      sums[lane] += q[c + lane] * double{core::LoadFloat(k, kType, offset + (c + lane) * stride)};
    }
  }
  for (; c < count; ++c) sums[0] += q[c] * double{core::LoadFloat(k, kType, offset + c * stride)};
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// scores[t] = <q, k> for the visible keys j0 + t.
template <DType kType>
void DotProducts(const Row& row, int64_t j0, uint64_t visible, double* scores) {
  const Problem& p = row.problem;
  for (uint64_t rest = visible; rest != 0; rest &= rest - 1) scores[FirstBit(rest)] = 0.0;
  const int64_t q_offset = core::QueryOffset(p.q, row.sequence, row.head, row.local);
  for (int64_t begin = 0; begin < p.qk_dim; begin += kColumns) {
    const int64_t count = core::Min(kColumns, p.qk_dim - begin);
    double q[kColumns];
    for (int64_t c = 0; c < count; ++c) {
      q[c] = core::LoadFloat(p.q.data, kType, q_offset + (begin + c) * p.q.column_stride);
    }
    for (uint64_t rest = visible; rest != 0; rest &= rest - 1) {
      const int t = FirstBit(rest);
      const int64_t offset = core::KeyRowOffset(p, p.k, row.sequence, row.kv_head(), j0 + t) +
                             begin * p.k.column_stride;
      scores[t] += Dot<kType>(q, p.k.data, offset, p.k.column_stride, count);
    }
  }
}

// Columns [begin, begin + count) of the row's unnormalised output and the state of its softmax.
struct Accumulator {
  double m;
  double l;
  double out[kColumns];
};

template <DType kType>
void AddTile(const Row& row, int64_t j0, uint64_t visible, int64_t begin, int64_t count,
             Accumulator* accumulator) {
  const Problem& p = row.problem;
  double scores[core::kTile];
  DotProducts<kType>(row, j0, visible, scores);
  double m = accumulator->m;
  for (uint64_t rest = visible; rest != 0; rest &= rest - 1) {
    const int t = FirstBit(rest);
    const Score score = FinishScore(row, j0 + t, scores[t]);
    scores[t] = score.value;
    if (score.hidden) {
      visible &= ~(uint64_t{1} << t);
    } else {
      m = MaxKeepNan(m, scores[t]);
    }
  }
  const double rescale = SoftmaxRescale(accumulator->m, m);
  accumulator->m = m;
  accumulator->l *= rescale;
  for (int64_t c = 0; c < count; ++c) accumulator->out[c] *= rescale;
  const int64_t head_index = row.sequence.batch * p.q_heads + row.head;
  for (uint64_t rest = visible; rest != 0; rest &= rest - 1) {
    const int64_t local_j = j0 + FirstBit(rest);
    double weight = std::exp(scores[FirstBit(rest)] - SoftmaxReference(m));
    accumulator->l += weight;
    if (p.dropout.enabled) {
      const int64_t j = row.sequence.kv_offset + local_j;
      if (!core::DropoutKeeps(p.dropout, head_index, row.global(), j)) continue;
      weight *= double{p.dropout.keep_scale};
    }
    const int64_t offset = core::KeyRowOffset(p, p.v, row.sequence, row.kv_head(), local_j) +
                           begin * p.v.column_stride;
    for (int64_t c = 0; c < count; ++c) {
      accumulator->out[c] +=
          weight * double{core::LoadFloat(p.v.data, kType, offset + c * p.v.column_stride)};
    }
  }
}

void AddSink(float sink, int64_t count, Accumulator* accumulator) {
  const double m = MaxKeepNan(accumulator->m, sink);
  const double rescale = SoftmaxRescale(accumulator->m, m);
  for (int64_t c = 0; c < count; ++c) accumulator->out[c] *= rescale;
  accumulator->l = accumulator->l * rescale + std::exp(double{sink} - SoftmaxReference(m));
  accumulator->m = m;
}

template <DType kType>
void ComputeRow(const Row& row) {
  const Problem& p = row.problem;
  const core::Interval hull =
      core::VisibleKeyHull(p.mask, row.sequence, row.head, row.local, row.local + 1);
  const int64_t out_offset = core::QueryOffset(p.out, row.sequence, row.head, row.local);
  for (int64_t begin = 0; begin < p.v_dim; begin += kColumns) {
    const int64_t count = core::Min(kColumns, p.v_dim - begin);
    Accumulator accumulator = {kNegativeInfinity, 0.0, {}};
    for (int64_t j0 = hull.begin / core::kTile * core::kTile; j0 < hull.end; j0 += core::kTile) {
      const uint64_t visible = core::VisibleWord(p.mask, row.sequence, row.head, row.local, j0);
      if (visible != 0) AddTile<kType>(row, j0, visible, begin, count, &accumulator);
    }
    if (p.sink != nullptr) AddSink(p.sink[row.head * p.sink_stride], count, &accumulator);
    const bool is_zero = accumulator.l == 0.0;
    for (int64_t c = 0; c < count; ++c) {
      core::StoreFloat(p.out.data, p.out.dtype, out_offset + (begin + c) * p.out.column_stride,
                       is_zero ? 0.0f : static_cast<float>(accumulator.out[c] / accumulator.l));
    }
    if (begin == 0 && p.lse.data != nullptr) {
      const double lse = is_zero ? kNegativeInfinity : accumulator.m + std::log(accumulator.l);
      core::StoreFloat(p.lse.data, DType::kF32,
                       core::QueryOffset(p.lse, row.sequence, row.head, row.local),
                       static_cast<float>(lse));
    }
  }
}

void ComputeRows(const Problem& p, int64_t batch, int64_t head, int64_t begin) {
  int32_t status = 0;
  const Sequence sequence = core::ResolveSequence(p, batch, &status);
  const int64_t end = core::Min(begin + kRowsPerTask, sequence.q_rows);
  for (int64_t i = begin; i < end; ++i) {
    if (!core::RowExists(sequence, i)) {
      WriteEmptyRows(p, sequence, head, i, i + 1);
      continue;
    }
    const Row row = {p, sequence, head, i};
    if (p.dtype == DType::kF32) ComputeRow<DType::kF32>(row);
    if (p.dtype == DType::kF16) ComputeRow<DType::kF16>(row);
    if (p.dtype == DType::kBF16) ComputeRow<DType::kBF16>(row);
  }
}

}  // namespace

bool ReferenceDecline(const Problem& problem, core::Text* reason) {
  if (!problem.has_block_table || !problem.is_backward) return false;
  core::Format(reason,
               "keys and values are read where they are, and gradients have no block_table");
  return true;
}

int64_t ReferenceWorkspace(const Problem&) { return 0; }

tandem_status ReferenceRun(const Problem& problem, void*, const core::Context& context) {
  if (problem.is_backward) return ReferenceBackward(problem, context);
  const int64_t blocks = core::CeilDiv(problem.q_rows, kRowsPerTask);
  auto compute = [&problem, blocks](int64_t index, int) {
    const int64_t plane = index / blocks;
    ComputeRows(problem, plane / problem.q_heads, plane % problem.q_heads,
                index % blocks * kRowsPerTask);
  };
  ParallelForEach(context, problem.batch * problem.q_heads * blocks, compute);
  WriteRowsOutsideSequences(problem);
  return TANDEM_STATUS_OK;
}

}  // namespace tandem::cpu
