// The backward kernel of sm_90a that computes all gradients at once: its tiles, and what it
// receives.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_PARAMS_H_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_PARAMS_H_

#include "backend_cuda/hopper/backward_params.h"

namespace tandem::cuda::hopper {

// A block keeps kKeptRows keys and takes kStepRows queries in a step.
struct FusedPolicy {
  int query_stages;   // steps of Q in shared memory
  int output_stages;  // of dO
  int score_stages;   // of dS
  int threads;
  int registers;          // of a thread of a warpgroup with keys
  int loading_registers;  // of a thread of the other
  int kept_bytes;         // of K or V
  int step_bytes;         // of Q or dO
  int score_bytes;
  int sum_bytes;  // of dQ of a step, in f32
};

constexpr FusedPolicy MakeFusedPolicy(int head_dim) {
  FusedPolicy policy = {};
  policy.query_stages = 3;
  policy.output_stages = 2;
  policy.score_stages = 2;
  policy.threads = 3 * kWarpgroupThreads;
  policy.registers = 240;
  policy.loading_registers = 24;
  policy.kept_bytes = kKeptRows * head_dim * 2;
  policy.step_bytes = kStepRows * head_dim * 2;
  policy.score_bytes = kKeptRows * kStepRows * 2;
  policy.sum_bytes = kStepRows * head_dim * 4;
  return policy;
}

struct FusedGradientParams {
  PlaneMaps queries;
  PlaneMaps keys;
  // The tensors themselves, where base.reads_tensors.
  PlaneMaps query_tensors;
  PlaneMaps key_tensors;
  BackwardParams base;
  // Of dQ, without the scale: 64 rows of the planes after each other, each as the 8 warps with keys
  // hold it (FusedGradientWarpgroup::StoreQuerySums).
  float* query_sums;
  uint32_t* next_block;  // the first one that nobody has taken, beyond those of the launch
  uint32_t block_count;
  uint32_t last_section;  // its first head, a multiple of base.section_heads
};
static_assert(sizeof(FusedGradientParams) <= 4096,
              "FusedGradientParams no longer fits kernel parameters");

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_PARAMS_H_
