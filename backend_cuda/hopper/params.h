// The forward kernels of sm_90a: their tiles, and what they receive.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_
#define TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_

#include <cuda.h>

#include "backend_cuda/params.h"

namespace tandem::cuda::hopper {

inline constexpr int kMostHeadDim = 128;
inline constexpr int kBlockKeys = 128;
inline constexpr int kWarpgroupThreads = 128;  // of 64 query rows
inline constexpr int kMostWarpgroups = 3;

// The padded head dimension that serves max(Dqk, Dv) = `dim`.
constexpr int HeadDimBucket(int64_t dim) { return dim <= 64 ? 64 : 128; }

// The tiles of a head dimension. Two warps of one warpgroup more find out which there are and load
// them.
struct TilePolicy {
  int warpgroups;
  int stages;  // of K, and of V
  int block_rows;
  int threads;
  bool has_query_in_registers;
  int registers;          // of a thread of a warpgroup with rows
  int loading_registers;  // of a thread of the others
  int query_bytes;
  int tile_bytes;  // of K or V
};

constexpr TilePolicy ForwardPolicy(int head_dim) {
  TilePolicy policy = {};
  policy.warpgroups = head_dim <= 64 ? 3 : 2;
  policy.stages = head_dim <= 64 ? 4 : 2;
  policy.block_rows = 64 * policy.warpgroups;
  policy.threads = (policy.warpgroups + 1) * kWarpgroupThreads;
  policy.has_query_in_registers = policy.warpgroups == 2;
  policy.registers = policy.warpgroups == 3 ? 160 : 232;
  policy.loading_registers = policy.warpgroups == 3 ? 32 : 40;
  policy.query_bytes = policy.block_rows * head_dim * 2;
  policy.tile_bytes = kBlockKeys * head_dim * 2;
  return policy;
}

// What a kernel is compiled for. kPlain: only lengths hide pairs. kMasked: also bands and a dense
// term (core::SeesIntervals). kCareful: kMasked, for the row blocks whose output has a non-finite
// element.
enum class Variant { kPlain, kMasked, kCareful };

// One byte for each warp of a row block: its output has a non-finite element.
struct alignas(16) CarefulFlags {
  uint8_t warps[4 * kMostWarpgroups];
  uint8_t unused[16 - 4 * kMostWarpgroups];
};

struct Params {
  CUtensorMap query;
  CUtensorMap keys;
  CUtensorMap values;
  core::Problem problem;
  CarefulFlags* flags;     // one per row block of each head
  ScoreScale score_scale;  // |scale|: its sign goes into Q
  int32_t row_blocks;      // of the longest sequence
  // What a block of threads takes at a time: a row block of a head, or two, the n-th from the front
  // and the n-th from the back, which together are as long as any other two under a causal mask.
  int32_t units_of_head;
  int64_t units;
};
static_assert(sizeof(Params) <= 4096, "Params no longer fits kernel parameters");

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_
