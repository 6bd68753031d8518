// The f32 forward kernel of sm_90a: its tiles, and what it receives.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_F32_PARAMS_H_
#define TANDEM_BACKEND_CUDA_HOPPER_F32_PARAMS_H_

#include "backend_cuda/hopper/params.h"

namespace tandem::cuda::hopper {

inline constexpr int kF32Planes = 3;
inline constexpr int kF32Warpgroups = 2;
inline constexpr int kF32BlockRows = 64 * kF32Warpgroups;
inline constexpr int kF32BlockKeys = 64;  // a canonical tile, and the keys of a word of flags
inline constexpr int kF32Threads = (kF32Warpgroups + 1) * kWarpgroupThreads;

// Bytes of a plane of a tile of 64 rows.
constexpr int F32PlaneBytes(int head_dim) { return 64 * head_dim * 2; }
// Planes of K and V that shared memory has room for beside Q.
constexpr int F32Slots(int head_dim) { return head_dim <= 64 ? 16 : 8; }

struct F32Params {
  CUtensorMap keys;  // of the planes (SplitTensor)
  CUtensorMap values;
  core::Problem problem;
  const uint64_t* key_flags;
  const uint64_t* value_flags;
  float scale;  // |scale|: its sign is moved into Q
  int32_t plane_columns;
  int32_t row_blocks;     // of the longest sequence
  int32_t units_of_head;  // as in Params
  int64_t units;
};
static_assert(sizeof(F32Params) <= 4096, "F32Params no longer fits kernel parameters");

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_F32_PARAMS_H_
