// The launcher of the f32 kernel of one head dimension; hopper/instantiations/ has a line for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_CUH_

#include "backend_cuda/hopper/f32_kernel.cuh"
#include "backend_cuda/hopper/f32_launch.h"
#include "backend_cuda/launch.h"

namespace tandem::cuda::hopper {

template <int kHeadDim>
cudaError_t LaunchF32Forward(const F32Params& params, cudaStream_t stream) {
  if (params.units == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = GetDeviceAttribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error != cudaSuccess) return error;
  F32Params argument = params;
  void* arguments[] = {&argument};
  return LaunchShared(
      reinterpret_cast<const void*>(&F32ForwardKernel<kHeadDim>),
      dim3(static_cast<unsigned>(core::Min<int64_t>(params.units, multiprocessors))), kF32Threads,
      kF32SharedBytes<kHeadDim>, arguments, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_CUH_
