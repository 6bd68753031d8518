// A quad: the four products of two registers of A (32 rows) and two of B (32 columns), added to
// four registers of C. C is in registers 0 to 3, A in 4 and 5, B in 6 and 7.
#ifndef TANDEM_BACKEND_CPU_TILES_QUADS_H_
#define TANDEM_BACKEND_CPU_TILES_QUADS_H_

#include "backend_cpu/flash/simd.h"

namespace tandem::cpu {

inline constexpr int64_t kRegisterHalves = 512;  // bf16 numbers in a tile register
inline constexpr int64_t kRegisterFloats = 256;

namespace {

template <class Tiles>
TANDEM_ISA_INLINE void StoreQuad(float* c, Tiles* tiles) {
  tiles->template Store<0>(c);
  tiles->template Store<1>(c + kRegisterFloats);
  tiles->template Store<2>(c + 2 * kRegisterFloats);
  tiles->template Store<3>(c + 3 * kRegisterFloats);
}

// To 32 rows of 32 numbers, kStride floats apart.
template <int kStride, class Tiles>
TANDEM_ISA_INLINE void StoreQuadRows(float* c, Tiles* tiles) {
  tiles->template Store<0, kStride>(c);
  tiles->template Store<1, kStride>(c + 16 * kStride);
  tiles->template Store<2, kStride>(c + 16);
  tiles->template Store<3, kStride>(c + 16 * kStride + 16);
}

// Which operands a quad loads: the other is in its registers.
enum class Operands { kBoth, kA, kB };

// kReadsOnce: b is not soon read again, and better not kept in the first cache.
template <bool kReadsOnce = false, class Tiles>
TANDEM_ISA_INLINE void LoadOperands(Operands which, const uint16_t* a, const uint16_t* b,
                                    Tiles* tiles) {
  if (which == Operands::kBoth) {
    tiles->template Load<4>(a);
    tiles->template Load<6, kReadsOnce>(b);
    tiles->template Load<5>(a + kRegisterHalves);
    tiles->template Load<7, kReadsOnce>(b + kRegisterHalves);
  } else if (which == Operands::kA) {
    tiles->template Load<4>(a);
    tiles->template Load<5>(a + kRegisterHalves);
  } else {
    tiles->template Load<6, kReadsOnce>(b);
    tiles->template Load<7, kReadsOnce>(b + kRegisterHalves);
  }
}

template <class Tiles>
TANDEM_ISA_INLINE void MultiplyQuad(Tiles* tiles) {
  tiles->template Multiply<0, 4, 6>();
  tiles->template Multiply<1, 5, 6>();
  tiles->template Multiply<2, 4, 7>();
  tiles->template Multiply<3, 5, 7>();
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_QUADS_H_
