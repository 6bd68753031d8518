// Scores of one row to probabilities: scale, softcap, bias, ALiBi, visibility, running maximum,
// exponential, sum, dropout (docs/semantics.md sections 1, 2, 5).
#ifndef TANDEM_BACKEND_CPU_FLASH_SOFTMAX_ROWS_H_
#define TANDEM_BACKEND_CPU_FLASH_SOFTMAX_ROWS_H_

#include "backend_cpu/flash/exp2.h"
#include "core/mask.h"
#include "core/problem.h"

namespace tandem::cpu {
namespace {

// Tiles of 64 keys that go through the softmax together. O is loaded, rescaled and stored once per
// group.
inline constexpr int kGroupTiles = 8;

// One query row of a block: a row of the sequence and one of the heads that share the keys.
struct Row {
  int64_t i;  // local
  int64_t head;
  float m;  // running maximum and sum of exp(s - m)
  float l;
  float rescale;  // of what O held before this group
};

// Whether scores need more than the scale. Without these terms a positive scale commutes with the
// maximum, and products are kept unscaled until the exponential.
TANDEM_HD bool HasScoreTerms(const core::Problem& p) {
  return p.softcap > 0.0f || p.bias.data != nullptr || p.alibi_slopes != nullptr ||
         !(p.scale > 0.0f);
}

// Turns 64 products of a row into its scores, -inf where invisible. `word` are the pairs that the
// mask shows; returns it without those that a bias of -inf hides.
template <class Arch>
TANDEM_ISA_INLINE uint64_t FinishScores(const core::Problem& p, const core::Sequence& s,
                                        const Row& row, int64_t first_key, uint64_t word,
                                        float* scores) {
  using V = Vector<Arch>;
  const V hidden(core::NegativeInfinity());
  const int64_t i = s.q_offset + row.i;
  const int64_t j = s.kv_offset + first_key;
  alignas(64) float bias[core::kTile];
  const bool has_bias = p.bias.data != nullptr && word != 0;
  if (has_bias) {
    const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - first_key);
    for (int64_t t = count; t < core::kTile; ++t) bias[t] = 0.0f;
    LoadRow<Arch>(p.bias.data, p.bias.dtype, core::BiasOffset(p.bias, s, row.head, i, j),
                  p.bias.column_stride, count, bias);
    for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
      word &= ~(EqualBits(V::load_aligned(bias + t), hidden) << t);
    }
  }
  const bool has_alibi = p.alibi_slopes != nullptr;
  const V slope(has_alibi ? core::AlibiSlope(p, s, row.head) : 0.0f);
  const V distance(static_cast<float>(i + core::DiagonalOffset(p.alibi_alignment, s) - j));
  alignas(64) float lane_index[kLanes<Arch>];
  for (int t = 0; t < kLanes<Arch>; ++t) lane_index[t] = static_cast<float>(t);
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    V x = V::load_aligned(scores + t) * V(p.scale);
    if (p.softcap > 0.0f) x = V(p.softcap) * Tanh<Arch>(x / V(p.softcap));
    if (has_bias) x = x + V::load_aligned(bias + t);
    if (has_alibi) {
      const V key = V::load_aligned(lane_index) + V(static_cast<float>(t));
      x = x - slope * xsimd::abs(distance - key);
    }
    SelectBits(word >> t, x, hidden).store_aligned(scores + t);
  }
  return word;
}

// The largest scores so far, in so many vectors that one does not wait for the one before. NaN is
// passed over (it shows in the sum): max returns its second operand when either is NaN.
template <class Arch>
struct LargestScores {
  static constexpr int kVectors = 4;
  Vector<Arch> v[kVectors];

  TANDEM_ISA_INLINE LargestScores() {
    for (int n = 0; n < kVectors; ++n) v[n] = Vector<Arch>(core::NegativeInfinity());
  }
  TANDEM_ISA_INLINE void Add(int64_t t, Vector<Arch> x) {
    Vector<Arch>& largest = v[t / kLanes<Arch> % kVectors];
    largest = xsimd::max(x, largest);
  }
  TANDEM_ISA_INLINE float Get() const {
    return Largest(xsimd::max(xsimd::max(v[0], v[1]), xsimd::max(v[2], v[3])));
  }
};

template <class Arch>
TANDEM_ISA_INLINE void AddLargest(const float* scores, LargestScores<Arch>* largest) {
#pragma GCC unroll 8
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    largest->Add(t, Vector<Arch>::load_aligned(scores + t));
  }
}

// The same of the visible ones; the others become -inf.
template <class Arch>
TANDEM_ISA_INLINE void AddLargestVisible(uint64_t word, float* scores,
                                         LargestScores<Arch>* largest) {
  using V = Vector<Arch>;
#pragma GCC unroll 8
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    const V x = SelectBits(word >> t, V::load_aligned(scores + t), V(core::NegativeInfinity()));
    x.store_aligned(scores + t);
    largest->Add(t, x);
  }
}

// Scores to exp(factor * score - reference); returns `sum` plus them.
template <class Arch>
TANDEM_ISA_INLINE Vector<Arch> ExponentiateTile(float factor, float reference, float* scores,
                                                Vector<Arch> sum) {
  using V = Vector<Arch>;
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    const V difference = Fma(V(factor), V::load_aligned(scores + t), V(-reference));
    const V x = ExpOfDifference<Arch>(difference);
    x.store_aligned(scores + t);
    sum = sum + x;
  }
  return sum;
}

// Whether the rounding error of the product that a reference is of could be more than the
// exponential takes. NaN is not.
TANDEM_HD bool IsExtreme(float reference) { return fabsf(reference) >= 0x1p24f; }

// Products to scores, each rounded: the largest is then its row's maximum, bit for bit.
template <class Arch>
__attribute__((noinline, cold)) void ScaleTile(float factor, float* scores) {
  for (int64_t t = 0; t < core::kTile; t += kLanes<Arch>) {
    (Vector<Arch>::load_aligned(scores + t) * Vector<Arch>(factor)).store_aligned(scores + t);
  }
}

// Bit t: pair (i, j + t) of the head is kept. Global coordinates.
TANDEM_HD uint64_t KeepWord(const core::Dropout& dropout, int64_t head_index, int64_t i,
                            int64_t j) {
  uint64_t keep = 0;
  core::Philox4 words = core::DropoutWords(dropout, head_index, i, j);
  for (int64_t t = 0; t < core::kTile; ++t) {
    if (t > 0 && ((j + t) & 3) == 0) words = core::DropoutWords(dropout, head_index, i, j + t);
    keep |= uint64_t{words.word[(j + t) & 3] >= dropout.threshold} << t;
  }
  return keep;
}

// The tiles of a group as one row sees them.
struct RowTiles {
  int count;
  int tile[kGroupTiles];           // of the group
  int64_t first_key[kGroupTiles];  // local
  bool all_visible[kGroupTiles];
};

// One row through the tiles of a group: scores[64 * tile ...] become probabilities relative to
// row->m, 0 where invisible or dropped, and row->m, l, rescale are brought up to date. words[tile *
// word_stride]: the visible pairs; those hidden by the bias or dropped are cleared.
template <class Arch>
TANDEM_ISA_INLINE void SoftmaxRow(const core::Problem& p, const core::Sequence& s,
                                  const RowTiles& tiles, Row* row, float* scores, uint64_t* words,
                                  int64_t word_stride) {
  using V = Vector<Arch>;
  const bool has_terms = HasScoreTerms(p);
  LargestScores<Arch> largest;
  for (int t = 0; t < tiles.count; ++t) {
    float* tile = scores + tiles.tile[t] * core::kTile;
    uint64_t* word = words + tiles.tile[t] * word_stride;
    if (has_terms) {
      *word = FinishScores<Arch>(p, s, *row, tiles.first_key[t], *word, tile);
    } else if (!tiles.all_visible[t]) {
      AddLargestVisible<Arch>(*word, tile, &largest);
      continue;
    }
    AddLargest<Arch>(tile, &largest);
  }
  float factor = has_terms ? 1.0f : p.scale;
  const float old_m = row->m;
  row->m = core::Max(old_m, factor * largest.Get());
  // A score of +inf makes its row NaN; inf - inf would not, where only the product with the scale
  // overflows.
  const float reference = row->m == -core::NegativeInfinity() ? core::BitsToFloat(0x7fc00000u)
                                                              : core::SoftmaxReference(row->m);
  if (__builtin_expect(IsExtreme(reference), 0)) {
    for (int t = 0; t < tiles.count; ++t) {
      ScaleTile<Arch>(factor, scores + tiles.tile[t] * core::kTile);
    }
    factor = 1.0f;
  }
  V sum(0.0f);
  for (int t = 0; t < tiles.count; ++t) {
    sum = ExponentiateTile<Arch>(factor, reference, scores + tiles.tile[t] * core::kTile, sum);
  }
  row->rescale = core::SoftmaxRescale(old_m, row->m);
  row->l = row->l * row->rescale + Sum(sum);
  if (!p.dropout.enabled) return;
  for (int t = 0; t < tiles.count; ++t) {
    float* tile = scores + tiles.tile[t] * core::kTile;
    uint64_t* word = words + tiles.tile[t] * word_stride;
    const uint64_t keep = KeepWord(p.dropout, s.batch * p.q_heads + row->head, s.q_offset + row->i,
                                   s.kv_offset + tiles.first_key[t]);
    *word &= keep;
    for (int64_t c = 0; c < core::kTile; c += kLanes<Arch>) {
      SelectBits(keep >> c, V::load_aligned(tile + c), V(0.0f)).store_aligned(tile + c);
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_SOFTMAX_ROWS_H_
