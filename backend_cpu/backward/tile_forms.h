// Tiles of 64 rows as registers of bf16 parts (tiles/parts.h), in the forms that products want.
// A register holds 16 rows of 16 words, each two numbers.
//
// Plain: [part][2 pairs of 16 rows][step of 32 columns][2 groups of 16 rows], a register with 16
// rows of 32 columns: operand A of products over the columns. Interleaved: [part][pair of 16
// columns][2 steps of 32 rows][2 groups of 16 columns], a register with 16 pairs of rows, each row
// of it 16 columns of two numbers: operand B of products over the rows. With the words of each
// register transposed, the plain form is operand B of products over the columns, and the
// interleaved form is operand A of products over the rows, in the same order of registers.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_TILE_FORMS_H_
#define TANDEM_BACKEND_CPU_BACKWARD_TILE_FORMS_H_

#include "backend_cpu/tiles/parts.h"
#include "backend_cpu/tiles/quads.h"
#include "core/mask.h"

namespace tandem::cpu {
namespace {

// Halves of one part of a form with 32 * steps columns.
TANDEM_HD constexpr int64_t FormHalves(int64_t steps) { return core::kTile * 32 * steps; }

// Where row r of a step of 32 columns is in the plain form, and its pair in the interleaved one (r
// is even; the second 16 columns follow after a register). Shifts, as r is not negative.
TANDEM_HD int64_t PlainAt(int64_t r, int64_t step, int64_t steps) {
  return ((r >> 5) * steps + step) * 2 * kRegisterHalves + (r & 31) * 32;
}
TANDEM_HD int64_t InterleavedAt(int64_t r, int64_t step) {
  return (step * 2 + (r >> 5)) * 2 * kRegisterHalves + (r & 31) * 16;
}

// 32 columns of two rows, one after the other, to their place in the interleaved form.
template <class Leaf>
TANDEM_ISA_INLINE void InterleaveRowPair(const uint16_t* rows, uint16_t* to) {
  Leaf::Interleave16(rows, rows + 32, to);
  Leaf::Interleave16(rows + 16, rows + 48, to + kRegisterHalves);
}

// A tile of 64 rows of f32, `stride` apart, in both forms.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE void StoreForms(const float* rows, int64_t stride, int64_t steps, uint16_t* plain,
                                  uint16_t* interleaved) {
  const int64_t part = FormHalves(steps);
  for (int64_t r = 0; r < core::kTile; r += 2) {
    for (int64_t step = 0; step < steps; ++step) {
      const float* row = rows + r * stride + 32 * step;
      uint16_t* pair = plain + PlainAt(r, step, steps);
      StorePartsOf<Leaf, kParts>(row, pair, part);
      StorePartsOf<Leaf, kParts>(row + stride, pair + 32, part);
      for (int n = 0; n < kParts; ++n) {
        InterleaveRowPair<Leaf>(pair + n * part, interleaved + n * part + InterleavedAt(r, step));
      }
    }
  }
}

// The words of each register transposed; `halves` are of whole registers.
TANDEM_ISA_INLINE void TransposeRegisters(const uint16_t* from, int64_t halves, uint16_t* to) {
  for (int64_t at = 0; at < halves; at += kRegisterHalves) {
    const auto* words = reinterpret_cast<const float*>(from + at);
    auto* transposed = reinterpret_cast<float*>(to + at);
    for (int64_t r = 0; r < 16; r += 8) {
      for (int64_t c = 0; c < 16; c += 8) {
        Transpose8x8(words + r * 16 + c, 16, transposed + c * 16 + r, 16);
      }
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_TILE_FORMS_H_
