// The launcher of the f32 backward kernels of one head dimension; hopper/instantiations/ has a file
// for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_

#include "backend_cuda/hopper/backward_f32.cuh"
#include "backend_cuda/hopper/backward_launch.h"

namespace tandem::cuda::hopper {

template <int kHeadDim, GradientSide kSide, bool kEveryMask>
cudaError_t LaunchF32Side(GradientParams& params, cudaStream_t stream) {
  const auto kernel =
      reinterpret_cast<const void*>(&HopperF32GradientKernel<kHeadDim, kSide, kEveryMask>);
  return LaunchSideKernel(
      {kernel, kSide, kF32KeptRows, 4 * kF32Parts * kHeadDim,
       MakeF32BackwardPolicy(kHeadDim).threads, kF32GradientSharedBytes<kHeadDim, kSide>},
      params, stream);
}

template <int kHeadDim, bool kEveryMask>
cudaError_t LaunchF32Gradients(GradientParams params, GradientSide side, cudaStream_t stream) {
  return side == GradientSide::kKeys
             ? LaunchF32Side<kHeadDim, GradientSide::kKeys, kEveryMask>(params, stream)
             : LaunchF32Side<kHeadDim, GradientSide::kQueries, kEveryMask>(params, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_LAUNCH_CUH_
