// The softmax of a unit, row by row: scores to probabilities in bf16 parts, in tiles.
//
// The reference that scores are measured from moves only when a score exceeds it by more than 2^8
// (of the exponential): O is then rarely rescaled, and no row needs a horizontal maximum but then.
// A row decides from its own scores.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_

#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/tiles/unit.h"

namespace tandem::cpu {
namespace {

inline constexpr float kHeadroom = 8.0f;  // of the exponent of 2

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
  state->offset[r] = 0.0f;
  state->limit[r] = core::NegativeInfinity();
  state->rescale[r] = 1.0f;
}

// Row r has a score above its limit. largest: of this unit's visible scores.
template <class Leaf>
__attribute__((noinline)) void MoveReference(ScoreFactor factor, float largest, int groups,
                                             RowState* state, int64_t r, float* scores) {
  using V = Vector<typename Leaf::Arch>;
  constexpr float kLargestOffset = 0x1p100f;
  const float old = state->reference[r];
  const float m = core::Max(old, largest);
  const float score = m * factor.to_score;
  // A score that is -inf only after scaling: the row has seen nothing yet.
  if (score == core::NegativeInfinity()) return;
  const float offset = m * factor.to_exponent;
  const bool is_far = offset > kLargestOffset || offset < -kLargestOffset;
  if (m > old) {
    state->reference[r] = m;
    state->rescale[r] =
        old == core::NegativeInfinity() ? 1.0f : core::SoftmaxRescale(old * factor.to_score, score);
    for (int c = 0; c < 16; ++c) state->sum[r][c] *= state->rescale[r];
    state->any_rescale = state->any_rescale || state->rescale[r] != 1.0f;
    if (!core::IsFinite(score)) {
      // A score of +inf makes its row NaN.
      state->offset[r] = core::BitsToFloat(0x7fc00000u);
      state->limit[r] = -core::NegativeInfinity();
      return;
    }
    state->offset[r] = is_far ? 0.0f : -offset;
    state->limit[r] = is_far ? core::NegativeInfinity() : m + kHeadroom / factor.to_exponent;
  }
  if (!is_far) return;
  // The product with the factor might overflow: the difference is taken first, in every unit.
  for (int g = 0; g < groups; ++g) {
    for (int c = 0; c < 16; c += kLanes<typename Leaf::Arch>) {
      float* x = scores + g * kScoreGroupStride + c;
      (V::load_aligned(x) - V(m)).store_aligned(x);
    }
  }
}

// The softmax of a unit of kTiles tiles, half a row at a time, so that it can be mixed with the
// products of other units.
template <class Leaf, int kParts, bool kMasked, int kTiles>
class UnitSoftmax {
 public:
  using Arch = typename Leaf::Arch;
  using V = Vector<Arch>;

  TANDEM_ISA_INLINE UnitSoftmax(const Unit& unit, ScoreFactor factor)
      : row_count_(unit.block->rows.count),
        scores_(unit.scores),
        p_(unit.p),
        words_(unit.words[0]),
        state_(unit.block->state),
        factor_(factor),
        factors_(factor.to_exponent) {}

  TANDEM_ISA_INLINE int64_t Rows() const { return row_count_; }

  TANDEM_ISA_INLINE void FirstHalf(int64_t r) {
    float* scores = scores_ + ScoreRow(r);
    V largest(core::NegativeInfinity());
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const V x = V::load_aligned(scores + g * kScoreGroupStride + v * kLanes<Arch>);
        largest =
            kMasked ? Leaf::LargerVisible(Bits(r, g, v), x, largest) : Leaf::Larger(x, largest);
      }
    }
    if (__builtin_expect(Leaf::AnyGreater(largest, V(state_->limit[r])), 0)) {
      MoveReference<Leaf>(factor_, Largest(largest), kGroups, state_, r, scores);
    }
    Exponentiate<0>(r);
  }

  TANDEM_ISA_INLINE void SecondHalf(int64_t r) { Exponentiate<1>(r); }

 private:
  static constexpr int kGroups = 4 * kTiles;
  static constexpr int kVectors = 16 / kLanes<Arch>;
  static constexpr int kDegree = kParts == 1 ? 3 : 5;
  static constexpr int64_t kPartStride = kUnitSteps * kProbabilityStepStride;

  TANDEM_ISA_INLINE uint64_t Bits(int64_t r, int g, int v) const {
    return words_[g / 4 * kSubRows + r] >> (g % 4 * 16 + v * kLanes<Arch>);
  }

  template <int kHalf>
  TANDEM_ISA_INLINE void Exponentiate(int64_t r) {
    const float* scores = scores_ + ScoreRow(r);
    uint16_t* p = p_ + ProbabilityRow(r);
    const V offset(state_->offset[r]);
    V sum[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = V::load_aligned(state_->sum[r] + v * kLanes<Arch>);
    }
#pragma GCC unroll 2
    for (int step = kHalf * kTiles; step < (kHalf + 1) * kTiles; ++step) {
      Vectors32<Leaf> x;
#pragma GCC unroll 4
      for (int n = 0; n < 2 * kVectors; ++n) {
        const int g = 2 * step + n / kVectors;
        const int v = n % kVectors;
        const V exponent = Fma(V::load_aligned(scores + g * kScoreGroupStride + v * kLanes<Arch>),
                               factors_, offset);
        x[n] = kMasked ? Leaf::template Exp2Visible<kDegree>(Bits(r, g, v), exponent)
                       : Leaf::template Exp2<kDegree>(exponent);
        sum[v] = sum[v] + x[n];
      }
      StoreParts<Leaf, kParts>(x, p + step * kProbabilityStepStride, kPartStride);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[v].store_aligned(state_->sum[r] + v * kLanes<Arch>);
    }
  }

  const int64_t row_count_;
  float* const scores_;
  uint16_t* const p_;
  const uint64_t* const words_;
  RowState* const state_;
  const ScoreFactor factor_;
  const V factors_;
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_SOFTMAX_H_
