// How the backward kernels of sm_90a write rows of a gradient.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_OUTPUT_CUH_

#include "backend_cuda/policy.h"
#include "backend_cuda/tensor_core.cuh"
#include "core/problem.h"

namespace tandem::cuda::hopper {

using core::DType;

// The lane without the bit keeps `low` and gives `high` for the other's `low`.
__device__ __forceinline__ void ExchangeWords(bool has_bit, int bit, uint32_t& low,
                                              uint32_t& high) {
  const uint32_t got = __shfl_xor_sync(~0u, has_bit ? low : high, bit);
  low = has_bit ? got : low;
  high = has_bit ? high : got;
}
// Lane c of a quad gets word c of each lane.
__device__ __forceinline__ void TransposeWordsInQuad(uint32_t (&x)[4], int lane) {
  const bool is_odd = (lane & 1) != 0;
  const bool is_high = (lane & 2) != 0;
  ExchangeWords(is_odd, 1, x[0], x[1]);
  ExchangeWords(is_odd, 1, x[2], x[3]);
  ExchangeWords(is_high, 2, x[0], x[2]);
  ExchangeWords(is_high, 2, x[1], x[3]);
}

// Writes an accumulator of wgmma, times `factor`: columns from `first_column` on of this lane's row
// at `offset` and of the one 8 rows below, as far as there are `rows` rows from this one on and
// `dim` columns. All lanes of a warp call it. + 0 turns -0 into +0.
template <DType kDType, int kElements>
__device__ __forceinline__ void WriteGradientRows(const core::Array4& gradient, int64_t offset,
                                                  int64_t rows, int64_t dim, float factor,
                                                  const float (&sum)[kElements],
                                                  int first_column = 0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  uint16_t* const to = static_cast<uint16_t*>(gradient.data) + offset;
  const bool has_chunks = gradient.dtype != DType::kF32 && gradient.column_stride == 1 &&
                          dim % 8 == 0 && gradient.row_stride % 8 == 0 &&
                          __all_sync(~0u, reinterpret_cast<uintptr_t>(to) % 16 == 0);
  if (has_chunks) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int t = 0; t < kElements / 4; t += 4) {
        uint32_t x[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int i = 4 * (t + n) + 2 * r;
          x[n] = PackPair<kDType>(sum[i] * factor + 0.0f, sum[i + 1] * factor + 0.0f);
        }
        TransposeWordsInQuad(x, lane);
        const int column = first_column + 8 * (t + (lane & 3));
        if (8 * r < rows && column < dim) {
          *reinterpret_cast<uint4*>(to + 8 * r * gradient.row_stride + column) =
              make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int r = i / 2 % 2;
    const int column = first_column + 8 * (i / 4) + 2 * (lane & 3) + i % 2;
    if (8 * r < rows && column < dim) {
      StoreElement(gradient.data, gradient.dtype,
                   offset + 8 * r * gradient.row_stride + column * gradient.column_stride,
                   sum[i] * factor + 0.0f);
    }
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_OUTPUT_CUH_
