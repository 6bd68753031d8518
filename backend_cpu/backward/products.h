// The matrix products of a tile: C (+)= A B or C += A^T B for some rows and one panel of B, with C
// in registers. Every element of C is one chain of fused multiply-adds in the order of depth,
// whatever the block sizes: its bits do not depend on its neighbours.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_PRODUCTS_H_
#define TANDEM_BACKEND_CPU_BACKWARD_PRODUCTS_H_

#include "backend_cpu/flash/micro_kernel.h"

namespace tandem::cpu {
namespace {

// A part of the sum. A: element (r, d) at a[r * a_stride + d], transposed a[d * a_stride + r]. B:
// `depth` lines of the panel's width.
struct Part {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t depth;
};

template <class Arch, int kRows, int kVectors, bool kTransposed>
TANDEM_ISA_INLINE void ProductBlock(const Part* parts, int count, int64_t row, bool accumulate,
                                    float* c, int64_t c_stride) {
  using V = Vector<Arch>;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = accumulate ? V::load_unaligned(c + r * c_stride + v * kLanes<Arch>) : V(0.0f);
    }
  }
  for (int n = 0; n < count; ++n) {
    const Part& part = parts[n];
    const float* a = part.a + (kTransposed ? row : row * part.a_stride);
    const float* line = part.b;
    for (int64_t d = 0; d < part.depth; ++d) {
      V b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = V::load_aligned(line + v * kLanes<Arch>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V factor(kTransposed ? a[r] : a[r * part.a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(factor, b[v], sum[r][v]);
      }
      a += kTransposed ? part.a_stride : 1;
      line += kVectors * kLanes<Arch>;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v].store_unaligned(c + r * c_stride + v * kLanes<Arch>);
    }
  }
}

template <class Arch, int kVectors, bool kTransposed>
__attribute__((noinline)) void ProductRows(const Part* parts, int count, int64_t row, int64_t end,
                                           bool accumulate, float* c, int64_t c_stride) {
  c += row * c_stride;
  for (; end - row >= kBlockRows; row += kBlockRows, c += kBlockRows * c_stride) {
    ProductBlock<Arch, kBlockRows, kVectors, kTransposed>(parts, count, row, accumulate, c,
                                                          c_stride);
  }
  if (end - row >= 4) {
    ProductBlock<Arch, 4, kVectors, kTransposed>(parts, count, row, accumulate, c, c_stride);
    row += 4;
    c += 4 * c_stride;
  }
  for (; row < end; ++row, c += c_stride) {
    ProductBlock<Arch, 1, kVectors, kTransposed>(parts, count, row, accumulate, c, c_stride);
  }
}

// Rows [row, end) of C, which points at row 0 of the panel's columns.
template <class Arch, bool kTransposed>
TANDEM_ISA_INLINE void Product(int vectors, const Part* parts, int count, int64_t row, int64_t end,
                               bool accumulate, float* c, int64_t c_stride) {
  if (vectors == kPanelVectors<Arch>) {
    ProductRows<Arch, kPanelVectors<Arch>, kTransposed>(parts, count, row, end, accumulate, c,
                                                        c_stride);
  } else if (vectors == 1) {
    ProductRows<Arch, 1, kTransposed>(parts, count, row, end, accumulate, c, c_stride);
  } else if constexpr (kPanelVectors<Arch> == 4) {
    if (vectors == 2) {
      ProductRows<Arch, 2, kTransposed>(parts, count, row, end, accumulate, c, c_stride);
    } else {
      ProductRows<Arch, 3, kTransposed>(parts, count, row, end, accumulate, c, c_stride);
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_PRODUCTS_H_
