// The launcher of the forward kernels of one type and head dimension; hopper/instantiations/ has a
// line for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_

#include "backend_cuda/hopper/forward_kernel.cuh"
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/launch.h"

namespace tandem::cuda::hopper {

// `is_dependent`: the launch may begin while the one before it runs, and waits for it itself.
inline cudaError_t LaunchPersistent(const void* kernel, const Params& params, int threads,
                                    int shared_bytes, bool is_dependent, cudaStream_t stream) {
  int multiprocessors = 0;
  cudaError_t error = GetDeviceAttribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(core::Min<int64_t>(params.units, multiprocessors)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent ? 1 : 0;
  Params argument = params;
  void* arguments[] = {&argument};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForward(const Params& params, cudaStream_t stream) {
  constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim);
  if (params.units == 0) return cudaSuccess;
  const void* const first =
      core::HasTerms(params.problem.mask)
          ? reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, Variant::kMasked>)
          : reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, Variant::kPlain>);
  const cudaError_t error =
      LaunchPersistent(first, params, kPolicy.threads, kSharedBytes<kHeadDim>, false, stream);
  if (error != cudaSuccess) return error;
  return LaunchPersistent(
      reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, Variant::kCareful>), params,
      kPolicy.threads, kSharedBytes<kHeadDim>, true, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_
