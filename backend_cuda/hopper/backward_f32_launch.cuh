// The launcher of the f32 backward kernels of one head dimension; hopper/instantiations/ has a file
// for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_

#include "backend_cuda/hopper/backward_f32.cuh"
#include "backend_cuda/hopper/backward_launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {

template <int kHeadDim, GradientSide kSide>
cudaError_t LaunchF32Side(GradientParams& params, cudaStream_t stream) {
  const core::Problem& p = params.base.problem;
  constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  const int64_t heads = p.batch * (kKeepsKeys ? p.kv_heads : p.q_heads);
  params.base.blocks = core::CeilDiv<int64_t>(kKeepsKeys ? p.kv_rows : p.q_rows, kF32KeptRows);
  const int64_t items = params.base.blocks * heads;
  if (items == 0) return cudaSuccess;
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t head_bytes =
      (kKeepsKeys ? p.group * p.q_rows : p.kv_rows) * 4 * kF32Parts * kHeadDim;
  params.base.section_heads = SectionHeads(p, heads, head_bytes, 1);
  const auto kernel = reinterpret_cast<const void*>(&HopperF32GradientKernel<kHeadDim, kSide>);
  return LaunchSideKernel(kernel, items, MakeF32BackwardPolicy(kHeadDim).threads,
                          kF32GradientSharedBytes<kHeadDim, kSide>, params, stream);
}

template <int kHeadDim>
cudaError_t LaunchF32Gradients(GradientParams params, GradientSide side, cudaStream_t stream) {
  return side == GradientSide::kKeys
             ? LaunchF32Side<kHeadDim, GradientSide::kKeys>(params, stream)
             : LaunchF32Side<kHeadDim, GradientSide::kQueries>(params, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_
