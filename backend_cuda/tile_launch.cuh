// The launcher of the forward kernel for blocks of rows, of one type and head dimension.
#ifndef TANDEM_BACKEND_CUDA_TILE_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_TILE_LAUNCH_CUH_

#include "backend_cuda/forward_kernel.cuh"
#include "backend_cuda/forward_launch.cuh"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda {

// Bytes of a bias element where its tiles can be staged by 16-byte copies, else 0.
inline int32_t StagedBiasBytes(const core::Problem& p, int block_keys) {
  const core::Array4& bias = p.bias;
  if (bias.data == nullptr || bias.column_stride != 1) return 0;
  const int64_t bytes = bias.dtype == core::DType::kF32 ? 4 : 2;
  const int64_t strides = bias.batch_stride | bias.head_stride | bias.row_stride | p.kv_offset;
  const bool is_aligned = reinterpret_cast<uintptr_t>(bias.data) % 16 == 0 &&
                          strides * bytes % 16 == 0 && block_keys * bytes % 16 == 0;
  return is_aligned ? static_cast<int32_t>(bytes) : 0;
}

template <core::DType kDType, int kHeadDim, ScoreTerms kTerms>
cudaError_t LaunchTiles(ForwardParams& params, cudaStream_t stream) {
  constexpr TilePolicy kPolicy = ForwardPolicy(kDType, kHeadDim);
  return LaunchItems(reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, kTerms>),
                     params, kPolicy.threads, ForwardSharedBytes(kPolicy, params.bias_bytes),
                     stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForwardTiles(ForwardParams params, cudaStream_t stream) {
  constexpr TilePolicy kPolicy = ForwardPolicy(kDType, kHeadDim);
  constexpr bool kIsF32 = kDType == core::DType::kF32;
  static_assert(ForwardSharedBytes(kPolicy, 0) <= kSmallestSharedBytes,
                "more shared memory than sm_86 has");
  const core::Problem& p = params.problem;
  params.row_blocks = core::CeilDiv<int64_t>(p.q_rows, kPolicy.block_rows);
  params.items = p.batch * p.q_heads * params.row_blocks;
  params.section_heads = SectionHeads(
      p, p.batch * p.q_heads, p.kv_rows * (p.qk_dim + p.v_dim) * kElementBytes<kDType>, p.group);
  using Column = ChunkColumn<kHeadDim, kPolicy.block_keys, kPolicy.threads>;
  const auto steps = [&](int64_t row_stride) {
    const int64_t row_bytes = 2 * (kIsF32 ? int64_t{Planes(kDType)} * kHeadDim : row_stride);
    return CopySteps{kPolicy.block_keys * row_bytes, Column::kRowStep * row_bytes};
  };
  params.key_steps = steps(p.k.row_stride);
  params.value_steps = steps(p.v.row_stride);
  params.has_chunks = kIsF32 || HasKeyChunks(p);
  params.has_whole_rows =
      params.has_chunks && HasChunks(p.q, p.qk_dim) && p.qk_dim == kHeadDim && p.v_dim == kHeadDim;
  params.score_scale = ScaleBy(p.scale < 0.0f ? -p.scale : p.scale);
  const bool has_ordinary_scores = HasOrdinaryScores(p);
  // The sign of a scale is moved into Q, but for f32.
  if (has_ordinary_scores && p.bias.data == nullptr && (!kIsF32 || p.scale > 0.0f)) {
    // f32 has one kernel for both: its steps are long enough not to mind.
    if constexpr (!kIsF32) {
      if (p.mask.dense.words == nullptr) {
        return LaunchTiles<kDType, kHeadDim, ScoreTerms::kStructured>(params, stream);
      }
    }
    return LaunchTiles<kDType, kHeadDim, ScoreTerms::kHiding>(params, stream);
  }
  if constexpr (!kIsF32) {
    params.bias_bytes = StagedBiasBytes(p, kPolicy.block_keys);
    int most = 0;
    const cudaError_t error = GetDeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most);
    if (error != cudaSuccess) return error;
    if (ForwardSharedBytes(kPolicy, params.bias_bytes) > most) params.bias_bytes = 0;
    if (has_ordinary_scores && params.bias_bytes != 0) {
      return LaunchTiles<kDType, kHeadDim, ScoreTerms::kBias>(params, stream);
    }
  }
  return LaunchTiles<kDType, kHeadDim, ScoreTerms::kAny>(params, stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_TILE_LAUNCH_CUH_
