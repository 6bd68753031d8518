// Numbers as sums of bf16 parts, each the rounding of what the parts before it left, and which
// products of parts are summed.
#ifndef TANDEM_BACKEND_CPU_TILES_PARTS_H_
#define TANDEM_BACKEND_CPU_TILES_PARTS_H_

#include "backend_cpu/flash/exp2.h"
#include "backend_cpu/tiles/quads.h"
#include "core/problem.h"

namespace tandem::cpu {
namespace {

// bf16 has 8 significant bits, f16 11, f32 24.
TANDEM_HD constexpr int PartCount(core::DType dtype) {
  return dtype == core::DType::kBF16 ? 1 : (dtype == core::DType::kF16 ? 2 : 3);
}

struct PartPair {
  int a;
  int b;
  Operands loads;  // what the pair before has not loaded
};

// The products of parts in the order in which they are summed: each shares an operand with the one
// before. Part n is at most 2^(-8 n) of its number.
inline constexpr PartPair kOnePart[] = {{0, 0, Operands::kBoth}};
inline constexpr PartPair kTwoParts[] = {
    {1, 1, Operands::kBoth}, {0, 1, Operands::kA}, {0, 0, Operands::kB}, {1, 0, Operands::kA}};
inline constexpr PartPair kThreeParts[] = {{1, 1, Operands::kBoth}, {0, 1, Operands::kA},
                                           {0, 2, Operands::kB},    {0, 0, Operands::kB},
                                           {2, 0, Operands::kA},    {1, 0, Operands::kA}};

// Calls visit(pair, loads, is_first) for the last `count` of them, which leaves out the smallest.
template <int kParts, class Visit>
TANDEM_ISA_INLINE void ForEachPair(int count, Visit visit) {
  if constexpr (kParts == 1) {
    visit(kOnePart[0], Operands::kBoth, true);
  } else {
    constexpr int kAll = kParts == 2 ? 4 : 6;
    const PartPair* pairs = kParts == 2 ? kTwoParts : kThreeParts;
    for (int n = kAll - count; n < kAll; ++n) {
      const bool is_first = n == kAll - count;
      visit(pairs[n], is_first ? Operands::kBoth : pairs[n].loads, is_first);
    }
  }
}

// How many of them make a score. f16: the fourth is at most 2^-18 of |q| |k|, which is within the
// error bound of the score from 56 dimensions on (docs/semantics.md section 7).
TANDEM_HD int ScoreProducts(int parts, int64_t qk_dim) {
  if (parts == 2) return qk_dim >= 64 ? 3 : 4;
  return parts == 1 ? 1 : 6;
}

// How many make a product of probability and value.
TANDEM_HD constexpr int ValueProducts(int parts) { return parts == 1 ? 1 : (parts == 2 ? 3 : 6); }

// Which magnitudes (as bits of f32, without the sign) the sum of parts cannot stand for: infinities
// and NaN, what rounds to infinity, and what loses parts as the tiles take subnormals for 0.
struct PartRange {
  uint32_t lowest;  // 0 is always in
  uint32_t end;
};

TANDEM_HD constexpr PartRange OperandRange(core::DType dtype) {
  if (dtype == core::DType::kBF16) return {0x00800000u, 0x7fffffffu};
  if (dtype == core::DType::kF16) return {0, 0x7f800000u};
  return {0x0d800000u, 0x7f7f8000u};  // from 2^-100
}

// Values must be finite besides; small ones are not worth care, as what is lost of them is below
// the smallest normal number.
TANDEM_HD constexpr PartRange ValueRange(core::DType dtype) {
  return {0, dtype == core::DType::kF32 ? 0x7f7f8000u : 0x7f800000u};
}

TANDEM_HD bool IsInRange(const PartRange& range, float x) {
  const uint32_t magnitude = core::FloatToBits(x) & 0x7fffffffu;
  return magnitude < range.end && (magnitude == 0 || magnitude >= range.lowest);
}

// The same range for the bits of bf16 numbers: in are 0 and those with lowest <= bits < lowest +
// size.
struct Bf16Range {
  int16_t lowest, size;
};
TANDEM_HD Bf16Range HalfRange(const PartRange& range) {
  const uint32_t lowest = (range.lowest + 0xffffu) >> 16, end = (range.end + 0xffffu) >> 16;
  return {static_cast<int16_t>(lowest), static_cast<int16_t>(end - lowest)};
}

// 32 numbers, in whole vectors.
template <class Leaf>
using Vectors32 = Vector<typename Leaf::Arch>[32 / kLanes<typename Leaf::Arch>];

// Their parts, `part_stride` elements apart. kCuts: the first of two may be cut rather than
// rounded, which is an operation less; the second is then at most 2^(-7) of its number.
template <class Leaf, int kParts, bool kCuts = false>
TANDEM_ISA_INLINE void StoreParts(Vectors32<Leaf>& x, uint16_t* to, int64_t part_stride) {
#pragma GCC unroll 3
  for (int part = 0; part + 1 < kParts; ++part) {
    Vectors32<Leaf> rounded;
#pragma GCC unroll 4
    for (int v = 0; v < 32 / kLanes<typename Leaf::Arch>; ++v) {
      rounded[v] = kCuts && kParts == 2 ? Leaf::CutToBf16(x[v]) : Leaf::RoundToBf16(x[v]);
      x[v] = x[v] - rounded[v];
    }
    Leaf::Store32(rounded, to + part * part_stride);
  }
  Leaf::Store32(x, to + (kParts - 1) * part_stride);
}

template <class Leaf, int kParts>
TANDEM_ISA_INLINE void StorePartsOf(const float* from, uint16_t* to, int64_t part_stride) {
  using V = Vector<typename Leaf::Arch>;
  Vectors32<Leaf> x;
#pragma GCC unroll 4
  for (int v = 0; v < 32 / kLanes<typename Leaf::Arch>; ++v) {
    x[v] = V::load_unaligned(from + v * kLanes<typename Leaf::Arch>);
  }
  StoreParts<Leaf, kParts>(x, to, part_stride);
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_PARTS_H_
