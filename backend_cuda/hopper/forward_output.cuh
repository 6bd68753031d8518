// Rows of the output in registers, on their way to memory.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_

#include "backend_cuda/tensor_core.cuh"

namespace tandem::cuda::hopper {

// Of pairs of the type.
template <DType kDType, int kWords>
static __device__ __forceinline__ bool AreFinite(const uint32_t (&words)[kWords]) {
  // Products by 0 are 0 or NaN.
  uint32_t zeros[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kWords; ++t) {
    zeros[t % 2] = MultiplyAddPair<kDType>(words[t], 0, zeros[t % 2]);
  }
  return ((zeros[0] | zeros[1]) & 0x7fff7fffu) == 0;
}

// The lane without the bit keeps `low` and gives `high` for the other's `low`.
static __device__ __forceinline__ void Exchange(bool has_bit, int bit, uint32_t& low,
                                                uint32_t& high) {
  const uint32_t got = __shfl_xor_sync(~0u, has_bit ? low : high, bit);
  low = has_bit ? got : low;
  high = has_bit ? high : got;
}

// Lane c of a quad gets word c of each lane.
static __device__ __forceinline__ void TransposeInQuad(int lane, uint32_t& word0, uint32_t& word1,
                                                       uint32_t& word2, uint32_t& word3) {
  const bool is_odd = (lane & 1) != 0;
  const bool is_high = (lane & 2) != 0;
  Exchange(is_odd, 1, word0, word1);
  Exchange(is_odd, 1, word2, word3);
  Exchange(is_high, 2, word0, word2);
  Exchange(is_high, 2, word1, word3);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
