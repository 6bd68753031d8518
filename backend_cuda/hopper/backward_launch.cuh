// The launcher of the backward kernels of one type and head dimension; hopper/instantiations/ has a
// file for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_CUH_

#include "backend_cuda/hopper/backward_bias.cuh"
#include "backend_cuda/hopper/backward_launch.h"
#include "backend_cuda/launch.h"

namespace tandem::cuda::hopper {

template <core::DType kDType, int kHeadDim, GradientSide kSide, GradientTerms kTerms>
cudaError_t LaunchSide(GradientParams& params, cudaStream_t stream) {
  const auto kernel =
      reinterpret_cast<const void*>(&HopperGradientKernel<kDType, kHeadDim, kSide, kTerms>);
  return LaunchSideKernel(
      {kernel, kSide, kKeptRows, 4 * kHeadDim, MakeBackwardPolicy(kHeadDim).threads,
       kGradientSharedBytes<kHeadDim, kSide, kTerms>},
      params, stream);
}

template <core::DType kDType, int kHeadDim, GradientTerms kTerms>
cudaError_t LaunchGradients(GradientParams params, GradientSide side, cudaStream_t stream) {
  return side == GradientSide::kKeys
             ? LaunchSide<kDType, kHeadDim, GradientSide::kKeys, kTerms>(params, stream)
             : LaunchSide<kDType, kHeadDim, GradientSide::kQueries, kTerms>(params, stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBiasGradient(GradientParams params, cudaStream_t stream) {
  const core::Problem& p = params.base.problem;
  BiasTiles tiles = {};
  tiles.rows = static_cast<int32_t>(core::CeilDiv<int64_t>(p.q_rows, kKeptRows));
  tiles.keys = static_cast<int32_t>(core::CeilDiv<int64_t>(p.kv_rows, kStepRows));
  tiles.count = (p.dbias.batch_stride != 0 ? p.batch : 1) *
                (p.dbias.head_stride != 0 ? p.q_heads : 1) * tiles.rows * tiles.keys;
  if (tiles.count == 0) return cudaSuccess;
  if (tiles.count > INT32_MAX) return cudaErrorInvalidConfiguration;
  int processors = 0;
  const cudaError_t error = GetDeviceAttribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&params, &tiles};
  return LaunchShared(reinterpret_cast<const void*>(&HopperBiasGradientKernel<kDType, kHeadDim>),
                      dim3(static_cast<unsigned>(core::Min<int64_t>(tiles.count, processors))),
                      MakeBiasGradientPolicy(kHeadDim).threads, kBiasGradientSharedBytes<kHeadDim>,
                      arguments, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_CUH_
