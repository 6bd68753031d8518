// The softmax of a unit, row by row: scores to probabilities in bf16 parts, in tiles.
//
// The reference that scores are measured from moves only when a score exceeds it by more than 2^8
// (of the exponential): O is then rarely rescaled, and no row needs a horizontal maximum but then.
// A row decides from its own scores.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_

#include <cstring>
#include <type_traits>

#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/tiles/unit.h"

namespace tandem::cpu {
namespace {

// A row's reference moves when some sums of a few of its probabilities exceed this.
inline constexpr float kLargestSum = 0x1p8f;

// From what the tiles hold to the exponent of 2.
struct ScoreFactor {
  float to_score;     // the scale, or 1 where scores are finished
  float to_exponent;  // times log2(e)
};

// Scales that leave products of 2^100 in range.
TANDEM_HD bool IsOrdinaryScale(float scale) { return scale >= 0x1p-100f && scale <= 0x1p100f; }

TANDEM_HD bool NeedsFinishedScores(const core::Problem& p) {
  return HasScoreTerms(p) || !IsOrdinaryScale(p.scale);
}

TANDEM_HD ScoreFactor FactorOf(const core::Problem& p) {
  const float to_score = NeedsFinishedScores(p) ? 1.0f : p.scale;
  return {to_score, to_score * core::kLog2e};
}

TANDEM_HD void StartRow(RowState* state, int64_t r) {
  for (int c = 0; c < 16; ++c) state->sum[r][c] = 0.0f;
  state->reference[r] = core::NegativeInfinity();
  state->offset[r] = core::BitsToFloat(0x7fc00000u);
  state->rescale[r] = 1.0f;
}

// Whether a bias in the type of q is all that scores need beyond the scale: it is then added in the
// softmax, 64 keys of a row at a time.
TANDEM_HD bool AddsBias(const core::Problem& p) {
  return p.bias.data != nullptr && p.bias.dtype == p.dtype && p.bias.column_stride == 1 &&
         p.softcap == 0.0f && p.alibi_slopes == nullptr && IsOrdinaryScale(p.scale);
}

// Products of row r to scores, -inf where invisible. Returns `word`, the pairs that the mask shows,
// without those that the bias hides.
template <class Arch>
TANDEM_ISA_INLINE uint64_t FinishUnitRow(const core::Problem& p, const core::Sequence& s,
                                         const Unit& unit, int64_t r, uint64_t word) {
  using V = Vector<Arch>;
  const RowPairs& rows = unit.block->rows;
  const Row row = {PairRow(p, rows, r), PairHead(p, rows, r), 0.0f, 0.0f, 1.0f};
  alignas(64) float line[core::kTile];
  float* scores = unit.scores + ScoreRow(r);
  if (AddsBias(p)) {
    // The same bits as in the softmax.
    if (word != 0) {
      const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - unit.first_key);
      for (int64_t t = count; t < core::kTile; ++t) line[t] = 0.0f;
      LoadRow<Arch>(
          p.bias.data, p.bias.dtype,
          core::BiasOffset(p.bias, s, row.head, s.q_offset + row.i, s.kv_offset + unit.first_key),
          p.bias.column_stride, count, line);
    }
    const V hidden(core::NegativeInfinity());
    for (int64_t c = 0; c < core::kTile; c += kLanes<Arch>) {
      float* x = scores + c / 16 * kScoreGroupStride + c % 16;
      if (word != 0) {
        const V bias = V::load_aligned(line + c);
        word &= ~(EqualBits(bias, hidden) << c);
        Fma(V::load_aligned(x), V(p.scale), bias).store_aligned(x);
      }
      SelectBits(word >> c, V::load_aligned(x), hidden).store_aligned(x);
    }
    return word;
  }
  for (int64_t c = 0; c < core::kTile; c += kLanes<Arch>) {
    V::load_aligned(scores + c / 16 * kScoreGroupStride + c % 16).store_aligned(line + c);
  }
  word = FinishScores<Arch>(p, s, row, unit.first_key, word, line);
  for (int64_t c = 0; c < core::kTile; c += kLanes<Arch>) {
    V::load_aligned(line + c).store_aligned(scores + c / 16 * kScoreGroupStride + c % 16);
  }
  return word;
}

// Row r has a probability above kLargestSum, or NaN as a score or as its offset. Takes the
// reference up to its largest visible score. word: the visible pairs. Returns the offset for this
// unit, whose scores may be changed.
template <class Leaf>
__attribute__((noinline, cold)) float MoveReference(ScoreFactor factor, uint64_t word,
                                                    RowState* state, int64_t r, float* scores) {
  using V = Vector<typename Leaf::Arch>;
  const float nan = core::BitsToFloat(0x7fc00000u);
  V lanes(core::NegativeInfinity());
  for (int c = 0; c < core::kTile; c += kLanes<typename Leaf::Arch>) {
    const V x = V::load_aligned(scores + c / 16 * kScoreGroupStride + c % 16);
    lanes = Leaf::LargerVisible(word >> c, x, lanes);
  }
  const float old = state->reference[r];
  const float m = core::Max(old, Largest(lanes));
  const float score = m * factor.to_score;
  // A score that is -inf only after scaling: the row has seen nothing yet.
  if (score == core::NegativeInfinity()) return 0.0f;
  const float offset = m * factor.to_exponent;
  const bool is_far = IsExtreme(offset);
  if (m > old) {
    float rescale = 1.0f;
    if (old != core::NegativeInfinity()) {
      rescale = is_far ? expf((old - m) * factor.to_score)
                       : core::SoftmaxRescale(old * factor.to_score, score);
    }
    state->reference[r] = m;
    state->rescale[r] = rescale;
    for (int c = 0; c < 16; ++c) state->sum[r][c] *= rescale;
    state->any_rescale = state->any_rescale || rescale != 1.0f;
    state->offset[r] = is_far ? nan : -offset;
  }
  // A score of +inf makes its row NaN.
  if (!core::IsFinite(score)) return nan;
  if (!is_far) return -offset;
  // The product with the factor might overflow, and its rounding error be more than the exponential
  // takes: the difference is taken first, in every unit.
  for (int c = 0; c < core::kTile; c += kLanes<typename Leaf::Arch>) {
    float* x = scores + c / 16 * kScoreGroupStride + c % 16;
    (V::load_aligned(x) - V(m)).store_aligned(x);
  }
  return 0.0f;
}

// The references of a block's first unit, which all rows would ask for one by one. Rows that are
// out of the ordinary still do.
template <class Leaf>
__attribute__((noinline)) void FindReferences(const Unit& unit, ScoreFactor factor,
                                              bool is_masked) {
  using V = Vector<typename Leaf::Arch>;
  RowState* state = unit.block->state;
  for (int64_t r = 0; r < unit.block->rows.count; ++r) {
    const uint64_t word = is_masked ? unit.words[r] : ~uint64_t{0};
    const float* scores = unit.scores + ScoreRow(r);
    V lanes(core::NegativeInfinity());
#pragma GCC unroll 4
    for (int c = 0; c < core::kTile; c += kLanes<typename Leaf::Arch>) {
      lanes = Leaf::LargerVisible(
          word >> c, V::load_aligned(scores + c / 16 * kScoreGroupStride + c % 16), lanes);
    }
    const float m = Largest(lanes);
    const float offset = m * factor.to_exponent;
    if (IsExtreme(offset)) continue;
    state->reference[r] = m;
    state->offset[r] = -offset;
  }
}

// The softmax of a unit, a row at a time, so that it can be mixed with the products of other units:
// the mixer's rows are pairs of ours.
//
// kAddsBias: scores are still products, and the bias is added here. Where it is -inf the
// probability is 0 by itself, unless the product is +inf or NaN: then the sum is NaN, and the row
// is finished as it is elsewhere.
template <class Leaf, int kParts, bool kMasked, bool kAddsBias>
class UnitSoftmax {
 public:
  using Arch = typename Leaf::Arch;
  using V = Vector<Arch>;

  TANDEM_ISA_INLINE UnitSoftmax(const core::Problem& p, const core::Sequence& s, const Unit& unit,
                                ScoreFactor factor)
      : problem_(p),
        sequence_(s),
        unit_(unit),
        row_count_(unit.block->rows.count),
        scores_(unit.scores),
        p_(unit.p),
        words_(unit.words),
        state_(unit.block->state),
        factor_(factor),
        factors_(factor.to_exponent),
        scale_(p.scale),
        bias_(static_cast<const char*>(p.bias.data) + unit.first_key * kBiasSize) {}

  TANDEM_ISA_INLINE int64_t Rows() const { return (row_count_ + 1) / 2; }
  TANDEM_ISA_INLINE void FirstHalf(int64_t pair) { AnyRow(2 * pair); }
  TANDEM_ISA_INLINE void SecondHalf(int64_t pair) {
    if (2 * pair + 1 < row_count_) AnyRow(2 * pair + 1);
  }

 private:
  static constexpr int kVectors = 16 / kLanes<Arch>;
  static constexpr int kDegree = 2 + kParts;

  static constexpr int64_t kBiasSize = kParts == 3 ? 4 : 2;

  struct RowValues {
    Vectors32<Leaf> p[kUnitSteps];
    V sum[kVectors];
  };

  TANDEM_ISA_INLINE void AnyRow(int64_t r) {
    RowValues row;
    Exponentiate(r, V(state_->offset[r]), &row);
    bool is_too_large = false;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      is_too_large |= Leaf::AnyAbove(row.sum[v], V(kLargestSum));
    }
    if (__builtin_expect(is_too_large, 0)) {
      UnitSoftmax(*this).RowWithMove(r);  // a copy, so that this object stays in registers
    } else {
      Store(r, &row);
    }
  }

 public:
  // A row that AnyRow found too large.
  __attribute__((noinline, cold)) void RowWithMove(int64_t r) {
    uint64_t word = kMasked ? words_[r] : ~uint64_t{0};
    if constexpr (kAddsBias) {
      FinishUnitRow<Arch>(problem_, sequence_, unit_, r, word);
      UnitSoftmax<Leaf, kParts, false, false>(problem_, sequence_, unit_, factor_).RowWithMove(r);
    } else {
      const V offset(MoveReference<Leaf>(factor_, word, state_, r, scores_ + ScoreRow(r)));
      RowValues row;
      Exponentiate(r, offset, &row);
      Store(r, &row);
    }
  }

 private:
  // Of 32 keys.
  TANDEM_ISA_INLINE static void LoadBias(const char* from, Vectors32<Leaf>& bias) {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    if constexpr (kParts == 1) {
      Leaf::Load32Bf16(halves, bias);
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < 2 * kVectors; ++n) {
        if constexpr (kParts == 2) bias[n] = LoadF16(halves + n * kLanes<Arch>, Arch{});
        if constexpr (kParts == 3) {
          bias[n] = V::load_unaligned(reinterpret_cast<const float*>(from) + n * kLanes<Arch>);
        }
      }
    }
  }

  // The bits of the row's keys from c on, in the lowest places: read from where they are, as shifts
  // wait for the units that products and exponentials need.
  TANDEM_ISA_INLINE uint64_t VisibleLanes(int64_t r, int c) const {
    using Bits = std::conditional_t<kLanes<Arch> == 16, uint16_t, uint8_t>;
    Bits bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(words_ + r) + c / 8, sizeof(bits));
    return bits;
  }

  TANDEM_ISA_INLINE void Exponentiate(int64_t r, V offset, RowValues* row) {
    const float* scores = scores_ + ScoreRow(r);
    const char* bias = nullptr;
    if constexpr (kAddsBias) {
      bias = bias_ + unit_.block->bias[r] * kBiasSize;
      // The next unit's.
#pragma GCC unroll 4
      for (int64_t n = 0; n < core::kTile * kBiasSize; n += 64) {
        _mm_prefetch(bias + core::kTile * kBiasSize + n, _MM_HINT_T0);
      }
    }
#pragma GCC unroll 2
    for (int step = 0; step < kUnitSteps; ++step) {
      Vectors32<Leaf> biases;
      if constexpr (kAddsBias) LoadBias(bias + step * 32 * kBiasSize, biases);
#pragma GCC unroll 4
      for (int n = 0; n < 2 * kVectors; ++n) {
        const int g = 2 * step + n / kVectors;
        const int v = n % kVectors;
        V score = V::load_aligned(scores + g * kScoreGroupStride + v * kLanes<Arch>);
        if constexpr (kAddsBias) {
          score = Fma(score, scale_, biases[n]);
        }
        const V exponent = Fma(score, factors_, offset);
        const V p = kMasked ? Leaf::template Exp2Visible<kDegree>(
                                  VisibleLanes(r, g * 16 + v * kLanes<Arch>), exponent)
                            : Leaf::template Exp2<kDegree>(exponent);
        row->p[step][n] = p;
        row->sum[v] = g == 0 ? p : row->sum[v] + p;
      }
    }
  }

  TANDEM_ISA_INLINE void Store(int64_t r, RowValues* row) {
    uint16_t* p = p_ + ProbabilityRow(r);
#pragma GCC unroll 2
    for (int step = 0; step < kUnitSteps; ++step) {
      StoreParts<Leaf, kParts, true>(row->p[step], p + step * ProbabilityStepStride(kParts),
                                     kProbabilityPartStride);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* sum = state_->sum[r] + v * kLanes<Arch>;
      (V::load_aligned(sum) + row->sum[v]).store_aligned(sum);
    }
  }

  const core::Problem& problem_;
  const core::Sequence& sequence_;
  const Unit& unit_;
  const int64_t row_count_;
  float* const scores_;
  uint16_t* const p_;
  const uint64_t* const words_;
  RowState* const state_;
  const ScoreFactor factor_;
  const V factors_;
  const V scale_;
  const char* const bias_;
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_
