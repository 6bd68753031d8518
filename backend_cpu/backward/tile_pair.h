// A tile of rows with a tile of keys: products to P and dS (docs/semantics.md sections 1 and 6).
#ifndef TANDEM_BACKEND_CPU_BACKWARD_TILE_PAIR_H_
#define TANDEM_BACKEND_CPU_BACKWARD_TILE_PAIR_H_

#include "backend_cpu/backward/plane.h"
#include "backend_cpu/flash/exp2.h"
#include "backend_cpu/flash/softmax_rows.h"
#include "core/gradient.h"

namespace tandem::cpu {
namespace {

// Work space of a thread.
struct PairScratch {
  alignas(64) float p[core::kTile * core::kTile];   // S, then the factors of dO in dV
  alignas(64) float ds[core::kTile * core::kTile];  // dP, then dS with respect to scale <q, k>
  uint64_t visible[core::kTile];                    // 0 for rows that do not exist
  uint64_t kept[core::kTile];                       // visible, and not dropped
};

struct TilePair {
  const Plane* plane;
  QueryTile rows;
  int64_t q_tile, kv_tile;
  int64_t first_key;  // local
  bool is_full;       // every pair is visible
  bool left_out;      // packing left out an element of one of the tiles
  // Rows and keys of the tiles outside which nothing is visible.
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  PairScratch* scratch;
};

// The operands of a pair's products, and the sums that they are added to; null: not asked for.
struct PairOperands {
  const float *q, *dout, *k, *v;
  float *dq, *dk, *dv;
};
TANDEM_HD PairOperands OperandsOf(const TilePair& pair) {
  const Plane& plane = *pair.plane;
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  return {OperandOf(plane, w.q, pair.q_tile, w.sizes.q),
          OperandOf(plane, w.dout, pair.q_tile, w.sizes.dout),
          OperandOf(plane, w.k, pair.kv_tile, w.sizes.k),
          OperandOf(plane, w.v, pair.kv_tile, w.sizes.v),
          p.dq.data == nullptr ? nullptr : SumsOf(plane, w.dq, pair.q_tile, w.qk_columns),
          p.dk.data == nullptr ? nullptr : SumsOf(plane, w.dk, pair.kv_tile, w.qk_columns),
          p.dv.data == nullptr ? nullptr : SumsOf(plane, w.dv, pair.kv_tile, w.v_columns)};
}

// Fills in the visible pairs; false where there are none.
TANDEM_HD bool FindVisible(TilePair* pair) {
  const Plane& plane = *pair->plane;
  const core::Problem& p = *plane.p;
  const int64_t keys = core::Min<int64_t>(core::kTile, core::LocalKeys(plane.s) - pair->first_key);
  const QueryWords& query_words = *QueryWordsOf(plane, pair->q_tile);
  const KeyWords& key_words = *KeyWordsOf(plane, pair->kv_tile);
  const core::TileClass tile_class = core::ClassifyTile(
      p.mask, plane.s, pair->rows.head, pair->rows.first, pair->rows.first + pair->rows.count,
      pair->first_key, pair->first_key + keys);
  if (tile_class == core::TileClass::kEmpty) return false;
  pair->left_out = (query_words.q_left_out | query_words.dout_left_out | key_words.k_left_out |
                    key_words.v_left_out) != 0;
  const uint64_t empty = query_words.empty;
  const uint64_t exist = core::IntervalWord(0, pair->rows.count);
  pair->is_full =
      tile_class == core::TileClass::kFull && keys == core::kTile && (empty & exist) == 0;
  pair->row_begin = pair->key_begin = 0;
  pair->row_end = pair->rows.count;
  pair->key_end = core::kTile;
  for (int64_t r = 0; r < core::kTile; ++r) {
    pair->scratch->visible[r] = r < pair->row_end ? ~uint64_t{0} : 0;
  }
  if (pair->is_full) return true;
  uint64_t any_key = 0, any_row = 0;
  for (int64_t r = 0; r < pair->rows.count; ++r) {
    uint64_t word = 0;
    if (((empty >> r) & 1u) == 0) {
      word = core::VisibleWord(p.mask, plane.s, pair->rows.head, pair->rows.first + r,
                               pair->first_key);
    }
    pair->scratch->visible[r] = word;
    any_key |= word;
    any_row |= uint64_t{word != 0} << r;
  }
  if (any_key == 0) return false;
  pair->row_begin = __builtin_ctzll(any_row);
  pair->row_end = 64 - __builtin_clzll(any_row);
  pair->key_begin = __builtin_ctzll(any_key);
  pair->key_end = 64 - __builtin_clzll(any_key);
  return true;
}

// Whether scores or gradients need more than the scale.
TANDEM_HD bool IsPlain(const core::Problem& p) {
  return p.softcap == 0.0f && p.bias.data == nullptr && p.alibi_slopes == nullptr &&
         !p.dropout.enabled;
}

// exp(x), at most 1, as core::ProbabilityFromLse. min returns its second operand when either is
// NaN.
TANDEM_ISA_INLINE Vector<Avx2> ProbabilityOf(Vector<Avx2> x) { return ExpOfDifference<Avx2>(x); }

#if defined(__AVX512F__)
TANDEM_ISA_INLINE Vector<Avx512> ProbabilityOf(Vector<Avx512> x) {
  return ExpOfDifference<Avx512>(xsimd::min(Vector<Avx512>(0.0f), x));
}
#endif

// A row where the scale is all that there is.
template <class Arch, bool kMasked>
class PlainRow {
 public:
  using V = Vector<Arch>;

  TANDEM_ISA_INLINE PlainRow(float scale, const RowData& row, uint64_t visible)
      : scale_(scale), minus_lse_(-row.lse), offset_(row.offset), visible_(visible) {}

  // S and dP of the keys from t on to P and dS.
  TANDEM_ISA_INLINE void Evaluate(int64_t t, V* p, V* ds) const {
    *p = ProbabilityOf(Fma(*p, scale_, minus_lse_));
    *ds = *p * (*ds - offset_);
    if constexpr (kMasked) {
      *p = SelectBits(visible_ >> t, *p, V(0.0f));
      *ds = SelectBits(visible_ >> t, *ds, V(0.0f));
    }
  }

 private:
  const V scale_, minus_lse_, offset_;
  const uint64_t visible_;
};

template <class Arch, bool kMasked>
TANDEM_ISA_INLINE void EvaluatePlainRow(const PlainRow<Arch, kMasked>& row, int64_t begin,
                                        int64_t end, float* p, float* ds) {
  using V = Vector<Arch>;
  for (int64_t t = begin; t < end; t += kLanes<Arch>) {
    V x = V::load_aligned(p + t), y = V::load_aligned(ds + t);
    row.Evaluate(t, &x, &y);
    x.store_aligned(p + t);
    y.store_aligned(ds + t);
  }
}

// dBias += dS for 64 keys; keys beyond `count` do not exist.
template <class Arch>
TANDEM_ISA_INLINE void AddToBias(const core::Problem& p, int64_t offset, int64_t count,
                                 const float* ds) {
  float* to = static_cast<float*>(p.dbias.data) + offset;
  int64_t t = 0;
  if (p.dbias.column_stride == 1) {
    for (; t + kLanes<Arch> <= count; t += kLanes<Arch>) {
      (Vector<Arch>::load_unaligned(to + t) + Vector<Arch>::load_aligned(ds + t))
          .store_unaligned(to + t);
    }
  }
  for (; t < count; ++t) to[t * p.dbias.column_stride] += ds[t];
}

// One row with all that scores can have.
template <class Arch>
TANDEM_ISA_INLINE void EvaluateRow(const TilePair& pair, int64_t r, RowData* row) {
  using V = Vector<Arch>;
  const core::Problem& problem = *pair.plane->p;
  const core::Sequence& s = pair.plane->s;
  const int64_t head = pair.rows.head;
  const int64_t i = s.q_offset + pair.rows.first + r;
  const int64_t j = s.kv_offset + pair.first_key;
  const int64_t keys = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - pair.first_key);
  float* p = pair.scratch->p + r * core::kTile;
  float* ds = pair.scratch->ds + r * core::kTile;
  uint64_t visible = pair.scratch->visible[r];
  alignas(64) float bias[core::kTile];
  const bool has_bias = problem.bias.data != nullptr;
  if (has_bias) {
    for (int64_t t = 0; t < core::kTile; ++t) bias[t] = 0.0f;
    if (visible != 0) {
      LoadRow<Arch>(problem.bias.data, problem.bias.dtype,
                    core::BiasOffset(problem.bias, s, head, i, j), problem.bias.column_stride, keys,
                    bias);
    }
    const V hidden(core::NegativeInfinity());
    for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
      visible &= ~(EqualBits(V::load_aligned(bias + t), hidden) << t);
    }
    pair.scratch->visible[r] = visible;
  }
  uint64_t kept = visible;
  if (problem.dropout.enabled && visible != 0) {
    kept &= KeepWord(problem.dropout, s.batch * problem.q_heads + head, i, j);
  }
  pair.scratch->kept[r] = kept;
  const V keep_scale(problem.dropout.enabled ? problem.dropout.keep_scale : 1.0f);
  const bool has_alibi = problem.alibi_slopes != nullptr;
  const V slope(has_alibi ? core::AlibiSlope(problem, s, head) : 0.0f);
  const V query(static_cast<float>(i + core::DiagonalOffset(problem.alibi_alignment, s) - j));
  const V zero(0.0f), cap(problem.softcap);
  alignas(64) float lane_index[kLanes<Arch>];
  for (int t = 0; t < kLanes<Arch>; ++t) lane_index[t] = static_cast<float>(t);
  alignas(64) float score_gradient[core::kTile];
  V ds_sum(0.0f), alibi_sum(0.0f);
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    V x = V::load_aligned(p + t) * V(problem.scale);
    V capped_slope(1.0f);
    if (problem.softcap > 0.0f) {
      const V tangent = Tanh<Arch>(x / cap);
      x = cap * tangent;
      capped_slope = V(1.0f) - tangent * tangent;
    }
    if (has_bias) x = x + V::load_aligned(bias + t);
    const V distance = xsimd::abs(query - (V::load_aligned(lane_index) + V(static_cast<float>(t))));
    if (has_alibi) x = x - slope * distance;
    x = ProbabilityOf(x - V(row->lse));
    const V dp = SelectBits(kept >> t, V::load_aligned(ds + t) * keep_scale, zero);
    const V y = SelectBits(visible >> t, x * (dp - V(row->offset)), zero);
    SelectBits(kept >> t, x * keep_scale, zero).store_aligned(p + t);
    SelectBits(visible >> t, y * capped_slope, zero).store_aligned(ds + t);
    y.store_aligned(score_gradient + t);
    ds_sum = ds_sum + y;
    if (has_alibi) alibi_sum = alibi_sum + SelectBits(visible >> t, y * distance, zero);
  }
  row->ds_sum += Sum(ds_sum);
  row->alibi_sum += Sum(alibi_sum);
  if (problem.dbias.data != nullptr && problem.dbias.column_stride != 0) {
    AddToBias<Arch>(problem, core::BiasOffset(problem.dbias, s, head, i, j), keys, score_gradient);
  }
}

// S and dP to P and dS, for the rows and keys of the pair; kKeys: keys are taken by so many, and P
// and dS are 0 for those of them that are not visible.
template <class Arch, int64_t kKeys>
__attribute__((flatten, noinline)) void EvaluatePairs(const TilePair& pair) {
  const core::Problem& problem = *pair.plane->p;
  RowData* rows = RowsOf(*pair.plane, pair.q_tile);
  if (!IsPlain(problem)) {
    for (int64_t r = pair.row_begin; r < pair.row_end; ++r) EvaluateRow<Arch>(pair, r, rows + r);
    return;
  }
  const int64_t begin = pair.key_begin / kKeys * kKeys;
  const int64_t end = core::RoundUp(pair.key_end, kKeys);
  for (int64_t r = pair.row_begin; r < pair.row_end; ++r) {
    float* p = pair.scratch->p + r * core::kTile;
    float* ds = pair.scratch->ds + r * core::kTile;
    const uint64_t visible = pair.scratch->visible[r];
    pair.scratch->kept[r] = visible;
    if (pair.is_full) {
      EvaluatePlainRow(PlainRow<Arch, false>(problem.scale, rows[r], visible), 0, core::kTile, p,
                       ds);
    } else {
      EvaluatePlainRow(PlainRow<Arch, true>(problem.scale, rows[r], visible), begin, end, p, ds);
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_TILE_PAIR_H_
