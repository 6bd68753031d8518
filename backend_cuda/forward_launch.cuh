// The launcher of one forward variant; backend_cuda/instantiations/ has a line for each.
#ifndef TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_

#include "backend_cuda/forward_kernel.cuh"
#include "backend_cuda/launch.h"

namespace tandem::cuda {

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForward(const core::Problem& problem, cudaStream_t stream) {
  constexpr TilePolicy kPolicy = ForwardPolicy(kDType, kHeadDim);
  static_assert(kPolicy.shared_bytes <= 99 * 1024, "more shared memory than sm_86 has");
  ForwardParams params = {};
  params.problem = problem;
  params.row_blocks = core::CeilDiv<int64_t>(problem.q_rows, kPolicy.block_rows);
  params.items = problem.batch * problem.q_heads * params.row_blocks;
  if (params.items == 0) return cudaSuccess;
  const void* kernel = reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim>);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPolicy.shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t width = core::Min<int64_t>(params.items, INT32_MAX);
  const dim3 grid(static_cast<unsigned>(width),
                  static_cast<unsigned>(core::CeilDiv<int64_t>(params.items, width)));
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, grid, dim3(kPolicy.threads), arguments, kPolicy.shared_bytes,
                          stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_
