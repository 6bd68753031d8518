// The backward kernels of sm_90a: their tiles, and what they receive.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_PARAMS_H_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_PARAMS_H_

#include "backend_cuda/backward_params.h"
#include "backend_cuda/hopper/params.h"

namespace tandem::cuda::hopper {

// Rows that a block keeps, 64 to each of its two warpgroups, and rows of the other side that it
// takes in a step.
inline constexpr int kKeptRows = 128;
inline constexpr int kStepRows = 64;
static_assert(kPlaneRows % kKeptRows == 0, "tiles would not be whole");

// The same in f32's arithmetic, whose two warpgroups serve the same rows.
inline constexpr int kF32KeptRows = 64;
inline constexpr int kF32StepRows = 32;

// The tiles of a head dimension. One warpgroup more finds out which there are and loads them.
struct BackwardPolicy {
  int stages;  // steps in shared memory
  int threads;
  int registers;          // of a thread of a warpgroup with rows
  int loading_registers;  // of a thread of the other
  int kept_bytes;         // of one of the two tensors
  int step_bytes;
  int bias_bytes;  // of a step; 0 in kernels without one
};

// What the 16-bit kernels of dQ, dK and dV compute: products by the scale and lengths, bands and
// dense masks; the same and a bias; every mask; every mask, ALiBi, softcap and dropout.
enum class GradientTerms { kFewest, kBias, kMasks, kAll };

constexpr bool ServesEveryMask(GradientTerms terms) {
  return terms == GradientTerms::kMasks || terms == GradientTerms::kAll;
}

constexpr BackwardPolicy MakeBackwardPolicy(int head_dim,
                                            GradientTerms terms = GradientTerms::kFewest) {
  const bool has_bias = terms == GradientTerms::kBias;
  BackwardPolicy policy = {};
  policy.stages = head_dim > 64 && has_bias ? 3 : 4;
  policy.threads = 3 * kWarpgroupThreads;
  // Together three times what the launch gives a thread, or no warp would get them.
  policy.registers = head_dim <= 64 ? 208 : 240;
  policy.loading_registers = 504 - 2 * policy.registers;
  policy.kept_bytes = kKeptRows * head_dim * 2;
  policy.step_bytes = kStepRows * head_dim * 2;
  policy.bias_bytes = has_bias ? kKeptRows * kStepRows * 2 : 0;
  return policy;
}

// Planes as boxes of 64 rows and 64 columns.
struct PlaneMaps {
  CUtensorMap first;   // of Q or K
  CUtensorMap second;  // of dO or V
};

struct GradientParams {
  PlaneMaps queries;
  PlaneMaps keys;
  BiasSource bias;  // boxes of 64 rows, or of one where it is broadcast over rows
  BackwardParams base;
  int32_t is_dependent;  // the launch may begin while that of the other side runs
};
static_assert(sizeof(GradientParams) <= 4096, "GradientParams no longer fits kernel parameters");

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_PARAMS_H_
