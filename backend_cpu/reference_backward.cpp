// The backward pass of reference.cpu: every gradient is a loop over the pairs that add to it, each
// pair evaluated in f64 from the O and LSE of the forward pass. Sums are of one thread, in the
// order of the loops.
#include <cmath>

#include "backend_cpu/gradient_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/reference.h"
#include "backend_cpu/reference_row.h"
#include "core/element.h"
#include "core/mask_tiles.h"
#include "core/philox.h"

namespace tandem::cpu {
namespace {

using core::Array4;
using core::DType;
using core::Problem;
using core::Sequence;

constexpr int64_t kRowsPerTask = 16;

// sum a[c] * b[c] over two strided rows.
double Dot(const Array4& a, int64_t a_offset, const Array4& b, int64_t b_offset, int64_t count) {
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    sum += double{core::LoadFloat(a.data, a.dtype, a_offset + c * a.column_stride)} *
           double{core::LoadFloat(b.data, b.dtype, b_offset + c * b.column_stride)};
  }
  return sum;
}

// A row of a sequence, with what its pairs need of it; core/gradient.h in f64.
struct GradientRow {
  Row row;
  double lse;
  double offset;  // D - dLSE
};

// False where the row is empty by its place or its LSE.
bool LoadGradientRow(const Problem& p, const Sequence& s, int64_t head, int64_t local,
                     GradientRow* result) {
  if (!core::RowExists(s, local)) return false;
  result->lse = core::LoadFloat(p.lse.data, DType::kF32, core::QueryOffset(p.lse, s, head, local));
  if (result->lse == kNegativeInfinity) return false;
  result->offset = Dot(p.dout, core::QueryOffset(p.dout, s, head, local), p.out,
                       core::QueryOffset(p.out, s, head, local), p.v_dim);
  if (p.dlse.data != nullptr) {
    result->offset -= double{
        core::LoadFloat(p.dlse.data, DType::kF32, core::QueryOffset(p.dlse, s, head, local))};
  }
  return true;
}

double ProbabilityFromLse(double score, double lse) {
  const double x = score - lse;
  return std::exp(x > 0.0 ? 0.0 : x);
}

struct Pair {
  double weight;  // of dO in dV
  bool kept;      // by dropout
  double ds;
  double dx;  // with respect to scale * <q, k>
};

// A pair that the mask shows; false where the bias hides it.
bool EvaluatePair(const GradientRow& g, int64_t local_j, Pair* pair) {
  const Row& row = g.row;
  const Problem& p = row.problem;
  const Score score =
      FinishScore(row, local_j,
                  Dot(p.q, core::QueryOffset(p.q, row.sequence, row.head, row.local), p.k,
                      core::KeyOffset(p.k, row.sequence, row.kv_head(), local_j), p.qk_dim));
  if (score.hidden) return false;
  const double probability = ProbabilityFromLse(score.value, g.lse);
  const double keep_scale = p.dropout.enabled ? double{p.dropout.keep_scale} : 1.0;
  pair->kept = !p.dropout.enabled || core::DropoutKeeps(p.dropout, row.head_index(), row.global(),
                                                        row.sequence.kv_offset + local_j);
  double dp = 0.0;
  if (pair->kept) {
    dp = keep_scale * Dot(p.dout, core::QueryOffset(p.dout, row.sequence, row.head, row.local), p.v,
                          core::KeyOffset(p.v, row.sequence, row.kv_head(), local_j), p.v_dim);
  }
  pair->weight = keep_scale * probability;
  pair->ds = probability * (dp - g.offset);
  pair->dx = pair->ds * score.slope;
  return true;
}

// Calls visit(local key, pair) for the visible pairs of a row.
template <typename Visit>
void ForEachPair(const GradientRow& g, const Visit& visit) {
  const Row& row = g.row;
  const core::Mask& mask = row.problem.mask;
  const core::Interval hull =
      core::VisibleKeyHull(mask, row.sequence, row.head, row.local, row.local + 1);
  for (int64_t j0 = hull.begin / core::kTile * core::kTile; j0 < hull.end; j0 += core::kTile) {
    uint64_t word = core::VisibleWord(mask, row.sequence, row.head, row.local, j0);
    for (; word != 0; word &= word - 1) {
      Pair pair;
      const int64_t j = j0 + FirstBit(word);
      if (EvaluatePair(g, j, &pair)) visit(j, pair);
    }
  }
}

// The same for one key and all rows of one head.
template <typename Visit>
void ForEachPairOfKey(const Problem& p, const Sequence& s, int64_t head, int64_t j,
                      const Visit& visit) {
  for (int64_t i = 0; i < s.q_rows; ++i) {
    const int64_t j0 = j / core::kTile * core::kTile;
    if (((core::VisibleWord(p.mask, s, head, i, j0) >> (j - j0)) & 1u) == 0) continue;
    GradientRow g = {{p, s, head, i}, 0, 0};
    Pair pair;
    if (LoadGradientRow(p, s, head, i, &g) && EvaluatePair(g, j, &pair)) visit(i, pair);
  }
}

// sums[c] += factor * columns [begin, begin + count) of a row.
void AddRow(const Array4& a, int64_t offset, int64_t begin, int64_t count, double factor,
            double* sums) {
  for (int64_t c = 0; c < count; ++c) {
    sums[c] +=
        factor * double{core::LoadFloat(a.data, a.dtype, offset + (begin + c) * a.column_stride)};
  }
}

void StoreColumns(const Array4& a, int64_t offset, int64_t begin, int64_t count, double factor,
                  const double* sums) {
  for (int64_t c = 0; c < count; ++c) {
    // + 0: a sum of nothing is +0 with a negative factor too.
    core::StoreFloat(a.data, a.dtype, offset + (begin + c) * a.column_stride,
                     static_cast<float>(factor * sums[c] + 0.0));
  }
}

void QueryRow(const Problem& p, const Sequence& s, int64_t head, int64_t i) {
  GradientRow g = {{p, s, head, i}, 0, 0};
  const bool counts = LoadGradientRow(p, s, head, i, &g);
  for (int64_t begin = 0; begin < p.qk_dim; begin += kColumns) {
    const int64_t count = core::Min(kColumns, p.qk_dim - begin);
    double sums[kColumns] = {};
    if (counts) {
      ForEachPair(g, [&](int64_t j, const Pair& pair) {
        AddRow(p.k, core::KeyOffset(p.k, s, g.row.kv_head(), j), begin, count, pair.dx, sums);
      });
    }
    StoreColumns(p.dq, core::QueryOffset(p.dq, s, head, i), begin, count, p.scale, sums);
  }
}

// dK and dV of one key of one key head.
void KeyRow(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j) {
  const bool has_key = j < core::LocalKeys(s);
  for (int part = 0; part < 2; ++part) {
    const bool values = part == 1;
    const Array4& gradient = values ? p.dv : p.dk;
    const Array4& other = values ? p.dout : p.q;
    const int64_t columns = values ? p.v_dim : p.qk_dim;
    if (gradient.data == nullptr) continue;
    for (int64_t begin = 0; begin < columns; begin += kColumns) {
      const int64_t count = core::Min(kColumns, columns - begin);
      double sums[kColumns] = {};
      for (int64_t g = 0; has_key && g < p.group; ++g) {
        const int64_t head = kv_head * p.group + g;
        ForEachPairOfKey(p, s, head, j, [&](int64_t i, const Pair& pair) {
          if (values && !pair.kept) return;
          AddRow(other, core::QueryOffset(other, s, head, i), begin, count,
                 values ? pair.weight : pair.dx, sums);
        });
      }
      StoreColumns(gradient, core::KeyOffset(gradient, s, kv_head, j), begin, count,
                   values ? 1.0 : double{p.scale}, sums);
    }
  }
}

// Calls visit(b, h) for the sequences and heads that share index (b, h) of a broadcast array.
template <typename Visit>
void ForEachMember(const Problem& p, bool per_batch, int64_t b, bool per_head, int64_t h,
                   const Visit& visit) {
  for (int64_t n = per_batch ? b : 0; n < (per_batch ? b + 1 : p.batch); ++n) {
    for (int64_t m = per_head ? h : 0; m < (per_head ? h + 1 : p.q_heads); ++m) visit(n, m);
  }
}

// One row of the bias's own shape: elements (b, h, i, *).
void BiasRow(const Problem& p, int64_t b, int64_t h, int64_t i) {
  const Array4& d = p.dbias;
  const int64_t offset = b * d.batch_stride + h * d.head_stride + i * d.row_stride;
  const int64_t keys = d.column_stride == 0 ? 1 : p.global_kv_len;
  for (int64_t begin = 0; begin < keys; begin += kColumns) {
    const int64_t count = core::Min(kColumns, keys - begin);
    double sums[kColumns] = {};
    ForEachMember(p, d.batch_stride != 0, b, d.head_stride != 0, h, [&](int64_t n, int64_t m) {
      int32_t status = 0;
      const Sequence s = core::ResolveSequence(p, n, &status);
      const bool per_row = d.row_stride != 0;
      const int64_t first = per_row ? i - s.q_offset : 0;
      const int64_t last = per_row ? core::Min(first + 1, s.q_rows) : s.q_rows;
      for (int64_t local = core::Max<int64_t>(first, 0); local < last; ++local) {
        GradientRow g = {{p, s, m, local}, 0, 0};
        if (!LoadGradientRow(p, s, m, local, &g)) continue;
        ForEachPair(g, [&](int64_t local_j, const Pair& pair) {
          const int64_t j = d.column_stride == 0 ? 0 : s.kv_offset + local_j;
          if (j >= begin && j < begin + count) sums[j - begin] += pair.ds;
        });
      }
    });
    for (int64_t c = 0; c < count; ++c) {
      core::StoreFloat(d.data, DType::kF32, offset + (begin + c) * d.column_stride,
                       static_cast<float>(sums[c] + 0.0));
    }
  }
}

void SinkOf(const Problem& p, int64_t head) {
  const double sink = p.sink[head * p.sink_stride];
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(p, b, &status);
    for (int64_t i = 0; i < s.q_rows; ++i) {
      GradientRow g = {{p, s, head, i}, 0, 0};
      if (LoadGradientRow(p, s, head, i, &g)) sum -= ProbabilityFromLse(sink, g.lse) * g.offset;
    }
  }
  p.dsink[head * p.dsink_stride] = static_cast<float>(sum + 0.0);
}

void SlopeOf(const Problem& p, int64_t b, int64_t head) {
  double sum = 0;
  ForEachMember(
      p, p.dalibi_batch_stride != 0, b, p.dalibi_head_stride != 0, head, [&](int64_t n, int64_t m) {
        int32_t status = 0;
        const Sequence s = core::ResolveSequence(p, n, &status);
        for (int64_t i = 0; i < s.q_rows; ++i) {
          GradientRow g = {{p, s, m, i}, 0, 0};
          if (!LoadGradientRow(p, s, m, i, &g)) continue;
          ForEachPair(
              g, [&](int64_t j, const Pair& pair) { sum -= pair.ds * AlibiDistance(g.row, j); });
        }
      });
  p.dalibi[b * p.dalibi_batch_stride + head * p.dalibi_head_stride] = static_cast<float>(sum + 0.0);
}

// Calls body(sequence, row) for the rows of all sequences of one head, kRowsPerTask to a task.
template <typename Body>
void ForRows(const Problem& p, const core::Context& context, int64_t heads, int64_t longest,
             bool query, const Body& body) {
  const int64_t blocks = core::CeilDiv(longest, kRowsPerTask);
  auto task = [&](int64_t index, int) {
    const int64_t plane = index / blocks;
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(p, plane / heads, &status);
    const int64_t begin = index % blocks * kRowsPerTask;
    const int64_t end = core::Min(begin + kRowsPerTask, query ? s.q_rows : s.kv_rows);
    for (int64_t row = begin; row < end; ++row) body(s, plane % heads, row);
  };
  ParallelForEach(context, p.batch * heads * blocks, task);
}

}  // namespace

tandem_status ReferenceBackward(const Problem& p, const core::Context& context) {
  if (p.dq.data != nullptr) {
    ForRows(p, context, p.q_heads, p.q_rows, true,
            [&](const Sequence& s, int64_t head, int64_t i) { QueryRow(p, s, head, i); });
  }
  if (p.dk.data != nullptr || p.dv.data != nullptr) {
    ForRows(p, context, p.kv_heads, p.kv_rows, false,
            [&](const Sequence& s, int64_t head, int64_t j) { KeyRow(p, s, head, j); });
  }
  if (p.dbias.data != nullptr) {
    const int64_t batch = p.dbias.batch_stride == 0 ? 1 : p.batch;
    const int64_t heads = p.dbias.head_stride == 0 ? 1 : p.q_heads;
    const int64_t rows = p.dbias.row_stride == 0 ? 1 : p.global_q_len;
    auto task = [&](int64_t index, int) {
      BiasRow(p, index / rows / heads, index / rows % heads, index % rows);
    };
    ParallelForEach(context, batch * heads * rows, task);
  }
  if (p.dsink != nullptr) {
    auto task = [&](int64_t head, int) { SinkOf(p, head); };
    ParallelForEach(context, p.q_heads, task);
  }
  if (p.dalibi != nullptr) {
    const int64_t batch = p.dalibi_batch_stride == 0 ? 1 : p.batch;
    const int64_t heads = p.dalibi_head_stride == 0 ? 1 : p.q_heads;
    auto task = [&](int64_t index, int) { SlopeOf(p, index / heads, index % heads); };
    ParallelForEach(context, batch * heads, task);
  }
  WriteGradientsOutsideSequences(p);
  return TANDEM_STATUS_OK;
}

}  // namespace tandem::cpu
