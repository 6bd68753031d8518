// The launcher of the fused backward kernels of one type and head dimension; hopper/instantiations/
// has a file for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_CUH_

#include "backend_cuda/hopper/fused_backward_kernel.cuh"
#include "backend_cuda/hopper/fused_backward_launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchFusedGradients(FusedGradientParams params, cudaStream_t stream) {
  const core::Problem& p = params.base.problem;
  const int64_t key_heads = p.batch * p.kv_heads;
  const int64_t key_blocks = core::CeilDiv<int64_t>(p.kv_rows, kKeptRows);
  const int64_t row_tiles = core::CeilDiv<int64_t>(p.q_rows, kStepRows);
  const int64_t row_blocks = row_tiles * p.batch * p.q_heads;
  if (core::Max(key_blocks * key_heads, row_blocks) > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  cudaError_t error =
      cudaMemsetAsync(params.query_sums, 0, static_cast<size_t>(FusedSumBytes(p)), stream);
  if (error == cudaSuccess && key_blocks * key_heads > 0) {
    params.base.blocks = key_blocks;
    params.base.section_heads = SectionHeads(p, key_heads, p.group * p.q_rows * 8 * kHeadDim, 1);
    const auto kernel = &FusedGradientKernel<kDType, kHeadDim>;
    constexpr int kBytes = kFusedSharedBytes<kHeadDim>;
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    params.block_count = static_cast<uint32_t>(key_blocks * key_heads);
    int device = 0;
    int multiprocessors = 1;
    error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const unsigned grid = core::Min(params.block_count, static_cast<uint32_t>(multiprocessors));
    kernel<<<grid, MakeFusedPolicy(kHeadDim).threads, kBytes, stream>>>(params);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess && row_blocks > 0) {
    params.base.blocks = row_tiles;
    FinishQueriesKernel<kDType, kHeadDim>
        <<<static_cast<unsigned>(row_blocks), kFusedKeyWarps * kWarpSize, 0, stream>>>(params);
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_CUH_
