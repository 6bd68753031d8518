// Non-finite values of V on the careful path: they are taken out of a tile before its product, and
// what sees one is NaN after it.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_NON_FINITE_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_NON_FINITE_CUH_

#include "backend_cuda/hopper/forward_state.cuh"
#include "backend_cuda/tile_staging.cuh"

namespace tandem::cuda::hopper {

// Takes them out of the tile at shared address `tile`, by kThreads threads of the block that all
// come here, and meet(); `keys` gets a bit for each key that had one.
template <DType kDType, int kThreads, int kTileBytes, int kWords, typename Meet>
static __device__ __forceinline__ void TakeOutNonFinite(uint32_t (&keys)[kWords], uint32_t tile,
                                                        int thread, const Meet& meet) {
  meet();
  if (thread < kWords) keys[thread] = 0;
  meet();
  for (int chunk = thread; chunk < kTileBytes / 16; chunk += kThreads) {
    uint4 x;
    const uint32_t address = tile + chunk * 16;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    uint32_t met = 0;
    const auto clean = [&](uint32_t pair) { return WithoutNonFinite<kDType>(pair, met); };
    x = make_uint4(clean(x.x), clean(x.y), clean(x.z), clean(x.w));
    if (met == 0) continue;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
    const int key = chunk / 8 % (32 * kWords);
    atomicOr(&keys[key / 32], 1u << (key % 32));
  }
  PublishSharedWrites();
  meet();
}

// NaN in the output [row, column] of a lane's two rows where they see one: bits[r] are those of row
// r, in the order of the lane's scores.
template <DType kDType, int kOutputs, int kWords>
static __device__ __forceinline__ void MarkNonFinite(const Problem& problem, const Item& item,
                                                     int first_key, const uint32_t (&keys)[kWords],
                                                     const uint32_t (&bits)[2], int lane,
                                                     float (&output)[kOutputs]) {
  const Sequence& s = item.sequence;
  for (int word = 0; word < kWords; ++word) {
    for (uint32_t left = keys[word]; left != 0; left &= left - 1) {
      const int key = 32 * word + __ffs(static_cast<int>(left)) - 1;
      const int owner = (lane & ~3) | (key % 8 / 2);
      const int bit = key / 8 * 2 + key % 2;
      const bool sees[2] = {(__shfl_sync(~0u, bits[0], owner) >> bit & 1) != 0,
                            (__shfl_sync(~0u, bits[1], owner) >> bit & 1) != 0};
      const int64_t row = int64_t{first_key} + key;
      if (row >= core::LocalKeys(s)) continue;
      const int64_t offset = core::KeyOffset(problem.v, s, item.head / problem.group, row);
#pragma unroll
      for (int t = 0; t < kOutputs / 4; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * t + 2 * (lane & 3) + e;
          if (column >= problem.v_dim) continue;
          const float value =
              LoadElement(problem.v.data, kDType, offset + column * problem.v.column_stride);
          if (core::IsFinite(value)) continue;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (sees[r]) output[4 * t + 2 * r + e] = core::BitsToFloat(0x7fc00000u);
          }
        }
      }
    }
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_NON_FINITE_CUH_
