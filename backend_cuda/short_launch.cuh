// The launcher of the forward kernels for short queries, of one type and head dimension.
#ifndef TANDEM_BACKEND_CUDA_SHORT_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_SHORT_LAUNCH_CUH_

#include "backend_cuda/forward_launch.cuh"
#include "backend_cuda/short_kernel.cuh"
#include "backend_cuda/stream_launch.cuh"

namespace tandem::cuda {

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForwardShort(ForwardParams params, cudaStream_t stream) {
  if constexpr (kDType != core::DType::kF32) {
    if (CanStream(params.problem)) return LaunchStream<kDType, kHeadDim>(params, stream);
  }
  using Block = ShortBlock<kDType, kHeadDim>;
  static_assert(Block::kSharedBytes <= kSmallestSharedBytes, "more shared memory than sm_86 has");
  const core::Problem& p = params.problem;
  params.row_blocks =
      core::CeilDiv<int64_t>(core::Min(p.q_rows, MaxShortRows(p.group)) * p.group, kShortBlockRows);
  params.items =
      p.batch * p.kv_heads * core::Max<int64_t>(params.partials.splits, 1) * params.row_blocks;
  const auto steps = [](int64_t row_stride) {
    return CopySteps{Block::kStepKeys * row_stride * 2, Block::Column::kRowStep * row_stride * 2};
  };
  params.key_steps = steps(p.k.row_stride);
  params.value_steps = steps(p.v.row_stride);
  params.has_mask_terms = core::HasTerms(p.mask);
  params.has_chunks = HasKeyChunks(p);
  const cudaError_t error =
      LaunchItems(reinterpret_cast<const void*>(&ShortKernel<kDType, kHeadDim>), params,
                  Block::kPolicy.threads, Block::kSharedBytes, stream);
  return error != cudaSuccess ? error : LaunchMergeSplits(params, stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_SHORT_LAUNCH_CUH_
