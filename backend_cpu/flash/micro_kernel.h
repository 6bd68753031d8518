// The one matrix product of the kernel: C (+)= A * B for a few rows and one panel of B, with C in
// registers. It serves both S = Q K^T (one segment, depth Dqk) and O += P V (a segment per tile of
// 64 keys, so that O is loaded and stored once for several tiles).
//
// A is row-major. B is packed (pack.h): lines of whole vectors. Every element of the product is one
// chain of fused multiply-adds in the order of the segments and of depth, whatever the block sizes:
// a row's bits do not depend on its neighbours. The chain begins at 0 and C is added at its end, so
// that the error grows with the keys of a call, not with all that C has summed up.
#ifndef TANDEM_BACKEND_CPU_FLASH_MICRO_KERNEL_H_
#define TANDEM_BACKEND_CPU_FLASH_MICRO_KERNEL_H_

#include "backend_cpu/flash/simd.h"

namespace tandem::cpu {
namespace {

// Rows of the register block, and vectors of its width: 6 x 2 of AVX2's 16 registers, 6 x 4 of
// AVX-512's 32.
inline constexpr int kBlockRows = 6;
template <class Arch>
constexpr int kPanelVectors = kLanes<Arch> == 16 ? 4 : 2;

template <class Arch>
constexpr int64_t kPanelWidth = kPanelVectors<Arch>* kLanes<Arch>;

// A part of the sum: columns [a_offset, a_offset + depth) of A times as many lines of B.
struct Segment {
  int64_t a_offset;
  const float* b;
  int64_t depth;
};

template <class Arch, int kRows, int kVectors>
TANDEM_ISA_INLINE void MultiplyBlock(const float* a, int64_t a_stride, const Segment* segments,
                                     int segment_count, int64_t b_stride, bool accumulate, float* c,
                                     int64_t c_stride) {
  using V = Vector<Arch>;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V(0.0f);
  }
  for (int t = 0; t < segment_count; ++t) {
    const float* column = a + segments[t].a_offset;
    const float* line = segments[t].b;
    const int64_t depth = segments[t].depth;
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; ++d) {
      V b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = V::load_aligned(line + v * kLanes<Arch>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V factor(column[r * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(factor, b[v], sum[r][v]);
      }
      ++column;
      line += b_stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes<Arch>;
      if (accumulate) sum[r][v] = V::load_unaligned(to) + sum[r][v];
      sum[r][v].store_unaligned(to);
    }
  }
}

// One block of kBlockRows rows times `vectors` vectors of lines that are b_stride floats apart.
template <class Arch>
__attribute__((noinline)) void MultiplyPanel(int vectors, const float* a, int64_t a_stride,
                                             const Segment* segments, int segment_count,
                                             int64_t b_stride, bool accumulate, float* c,
                                             int64_t c_stride) {
  if (vectors == kPanelVectors<Arch>) {
    MultiplyBlock<Arch, kBlockRows, kPanelVectors<Arch>>(a, a_stride, segments, segment_count,
                                                         b_stride, accumulate, c, c_stride);
  } else if (vectors == 1) {
    MultiplyBlock<Arch, kBlockRows, 1>(a, a_stride, segments, segment_count, b_stride, accumulate,
                                       c, c_stride);
  } else if constexpr (kPanelVectors<Arch> == 4) {
    if (vectors == 2) {
      MultiplyBlock<Arch, kBlockRows, 2>(a, a_stride, segments, segment_count, b_stride, accumulate,
                                         c, c_stride);
    } else {
      MultiplyBlock<Arch, kBlockRows, 3>(a, a_stride, segments, segment_count, b_stride, accumulate,
                                         c, c_stride);
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_MICRO_KERNEL_H_
