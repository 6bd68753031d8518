// The launchers of one backward variant; backend_cuda/instantiations/ has a file for each.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_BACKWARD_LAUNCH_CUH_

#include "backend_cuda/backward_bias.cuh"
#include "backend_cuda/launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda {

template <core::DType kDType, int kHeadDim, GradientSide kSide, bool kHasTerms>
cudaError_t LaunchBlocks(BackwardParams& params, cudaStream_t stream) {
  using Block = GradientBlock<kDType, kHeadDim, kSide, kHasTerms>;
  static_assert(Block::kSharedBytes <= kSmallestSharedBytes, "more shared memory than sm_86 has");
  const core::Problem& p = params.problem;
  const bool keeps_keys = kSide == GradientSide::kKeys;
  const int64_t rows = keeps_keys ? p.kv_rows : p.q_rows;
  const int64_t heads = p.batch * (keeps_keys ? p.kv_heads : p.q_heads);
  params.blocks = core::CeilDiv<int64_t>(rows, Block::kPolicy.block_rows);
  if (params.blocks * heads == 0) return cudaSuccess;
  if (params.blocks * heads > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t head_bytes =
      (keeps_keys ? p.group * p.q_rows : p.kv_rows) * 4 * Planes(kDType) * kHeadDim;
  params.section_heads = SectionHeads(p, heads, head_bytes, 1);
  void* arguments[] = {&params};
  return LaunchShared(
      reinterpret_cast<const void*>(&GradientKernel<kDType, kHeadDim, kSide, kHasTerms>),
      dim3(static_cast<unsigned>(params.blocks * heads), Block::kPolicy.has_parts ? 2 : 1),
      Block::kPolicy.threads, Block::kSharedBytes, arguments, stream);
}

template <core::DType kDType, int kHeadDim, GradientSide kSide>
cudaError_t LaunchSide(BackwardParams& params, cudaStream_t stream) {
  return params.is_plain != 0 ? LaunchBlocks<kDType, kHeadDim, kSide, false>(params, stream)
                              : LaunchBlocks<kDType, kHeadDim, kSide, true>(params, stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchGradients(BackwardParams params, GradientSide side, cudaStream_t stream) {
  return side == GradientSide::kKeys
             ? LaunchSide<kDType, kHeadDim, GradientSide::kKeys>(params, stream)
             : LaunchSide<kDType, kHeadDim, GradientSide::kQueries>(params, stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBiasMatrix(BackwardParams params, cudaStream_t stream) {
  constexpr BiasPolicy kPolicy = MakeBiasPolicy(kDType, kHeadDim);
  constexpr int kSharedBytes = 4 * kPolicy.tile_bytes;
  static_assert(kSharedBytes + kPolicy.rows * 16 + 128 <= kSmallestSharedBytes,
                "more shared memory than sm_86 has");
  const core::Problem& p = params.problem;
  int64_t row_tiles = core::CeilDiv<int64_t>(p.q_rows, kPolicy.rows);
  int64_t key_tiles = core::CeilDiv<int64_t>(p.kv_rows, kPolicy.rows);
  const int64_t planes =
      (p.dbias.batch_stride != 0 ? p.batch : 1) * (p.dbias.head_stride != 0 ? p.q_heads : 1);
  const int64_t blocks = planes * row_tiles * key_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&params, &row_tiles, &key_tiles};
  return LaunchShared(reinterpret_cast<const void*>(&BiasMatrixKernel<kDType, kHeadDim>),
                      dim3(static_cast<unsigned>(blocks)), kPolicy.threads, kSharedBytes, arguments,
                      stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_LAUNCH_CUH_
