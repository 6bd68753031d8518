// The steps of the streaming kernel for short queries: one constexpr function answers launcher and
// kernel.
#ifndef TANDEM_BACKEND_CUDA_STREAM_POLICY_H_
#define TANDEM_BACKEND_CUDA_STREAM_POLICY_H_

#include "backend_cuda/policy.h"

namespace tandem::cuda {

inline constexpr int kMostStreamStages = 12;
inline constexpr int kStreamQueries = 2;  // of items, in shared memory
// Of bar.sync, which has 16: of the multiplying warps, for each query, and for each stage.
inline constexpr int kMultiplyingBarrier = 1;
inline constexpr int kQueryBarrier = 2;
inline constexpr int kStageBarrier = kQueryBarrier + kStreamQueries;
static_assert(kStageBarrier + kMostStreamStages <= 16);

struct StreamPolicy {
  int warps;                      // that multiply, each 16 keys of a step
  int threads;                    // theirs, and those of the warp that loads
  int blocks_per_multiprocessor;  // where there is shared memory for two stages of each
  int keys;                       // of a step
  int query_bytes;                // of an item
  int tile_bytes;                 // of the keys or the values of a step
};

constexpr StreamPolicy ForwardStreamPolicy(int head_dim) {
  StreamPolicy policy = {};
  policy.warps = 4;
  policy.threads = (policy.warps + 1) * kWarpSize;
  policy.blocks_per_multiprocessor = head_dim > 128 ? 1 : 2;
  policy.keys = 16 * policy.warps;
  policy.query_bytes = kShortBlockRows * head_dim * 2;
  policy.tile_bytes = policy.keys * head_dim * 2;
  return policy;
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_STREAM_POLICY_H_
