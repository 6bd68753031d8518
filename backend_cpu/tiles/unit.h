// A sub-block of 32 query rows, and a unit of work on it: the scores of a tile of 64 keys.
#ifndef TANDEM_BACKEND_CPU_TILES_UNIT_H_
#define TANDEM_BACKEND_CPU_TILES_UNIT_H_

#include "backend_cpu/mask_rows.h"
#include "backend_cpu/tiles/tile_layout.h"

namespace tandem::cpu {
namespace {

inline constexpr int kUnitSteps = core::kTile / 32;

// Softmax state of the rows of a sub-block, in the scores' own units: m is the product of q and k,
// or the finished score where the problem has terms beyond the scale (HasScoreTerms).
struct RowState {
  // Sum of 2^(factor * s + offset), one for each of the 16 columns of a register.
  alignas(64) float sum[kSubRows][16];
  // What scores are measured from: the row's maximum as it was when it last rose by more than a
  // factor of 2^8 of the exponential. -inf while the row saw nothing.
  float reference[kSubRows];
  float offset[kSubRows];   // -factor * reference
  float rescale[kSubRows];  // of what O holds, where the reference moved
  bool any_rescale;
  bool is_new;  // no unit was taken
};

static_assert(kSubRows <= DenseRows::kRows);

struct SubBlock {
  RowPairs rows;
  uint16_t* q;  // [part][depth step][2][512]
  float* o;     // [pair of columns][2 groups of 16 columns][2 groups of 16 rows][256]
  RowState* state;
  uint32_t careful_rows;  // bit r: q has elements that the parts cannot stand for
  bool has_dense_rows;    // the mask is aligned dense words
  bool adds_bias;         // the softmax may add the bias: every row has one
  DenseRows dense_rows;
  int64_t bias[kSubRows];  // element of each row's first key
};

struct Unit {
  SubBlock* block;
  bool is_masked;     // some pair is invisible
  bool is_first;      // of its block
  bool adds_bias;     // to what the products are, in the softmax
  int64_t first_key;  // local
  KeyTile tile;
  uint64_t words[kSubRows];  // the visible pairs
  float* scores;             // [pair of 16 keys][2 groups of 16 keys][2 groups of 16 rows][256]
  // [step of 32 keys][part][2 groups of 16 rows][512]: a step of two parts takes the place of its
  // scores.
  uint16_t* p;
};

inline constexpr int64_t kUnitScores = core::kTile * kSubRows;

// Where row r's first score is in a unit's, and the way to the next 16.
TANDEM_HD int64_t ScoreRow(int64_t r) { return r / 16 * kRegisterFloats + r % 16 * 16; }
inline constexpr int64_t kScoreGroupStride = 2 * kRegisterFloats;

// The same of probabilities, 32 at a time.
TANDEM_HD int64_t ProbabilityRow(int64_t r) { return r / 16 * kRegisterHalves + r % 16 * 32; }
inline constexpr int64_t kProbabilityPartStride = 2 * kRegisterHalves;
TANDEM_HD constexpr int64_t ProbabilityStepStride(int parts) {
  return (parts <= 2 ? 2 : parts) * kProbabilityPartStride;
}

// The same of O, 16 columns at a time.
TANDEM_HD int64_t OutputRow(int64_t r) { return r / 16 * kRegisterFloats + r % 16 * 16; }
inline constexpr int64_t kOutputGroupStride = 2 * kRegisterFloats;

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_UNIT_H_
