// The launcher of the fused backward kernels of one type and head dimension; hopper/instantiations/
// has a file for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_CUH_

#include "backend_cuda/hopper/fused_backward_kernel.cuh"
#include "backend_cuda/hopper/fused_backward_launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {

// Sections of heads: what their blocks walk over, `head_bytes` each, stays in the L2 cache. Where
// blocks differ in length the last one has two for each multiprocessor, since a long block of a
// smaller one would begin when the others have ended.
inline void OrderBlocks(const core::Problem& p, int64_t blocks, int64_t heads, int64_t head_bytes,
                        int64_t multiprocessors, FusedGradientParams* params) {
  const int64_t section =
      core::Clamp<int64_t>(kSectionBytes / core::Max<int64_t>(head_bytes, 1), 1, heads);
  const bool differ = p.mask.band_count > 0 || core::IsPacked(p);
  const int64_t last =
      core::Min(heads, differ ? core::CeilDiv(2 * multiprocessors, blocks) : int64_t{1});
  params->base.section_heads = section;
  params->last_section = static_cast<uint32_t>((heads - last) / section * section);
}

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
  cudaError_t error = cudaSuccess;
  if (params.base.reads_tensors == 0 || row_blocks == 0) {  // else the preparation has cleared them
    error = cudaMemsetAsync(params.query_sums, 0, static_cast<size_t>(FusedSumBytes(p)), stream);
  }
  if (error == cudaSuccess && key_blocks * key_heads > 0) {
    params.base.blocks = key_blocks;
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
    OrderBlocks(p, key_blocks, key_heads, p.group * p.q_rows * 8 * kHeadDim, multiprocessors,
                &params);
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
