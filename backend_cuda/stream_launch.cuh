// The launcher of the streaming kernel for short queries, of one type and head dimension.
#ifndef TANDEM_BACKEND_CUDA_STREAM_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_STREAM_LAUNCH_CUH_

#include "backend_cuda/forward_launch.cuh"
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/stream_kernel.cuh"

namespace tandem::cuda {

// Whether the streaming kernel serves a problem's short sequences: scores are products, lengths
// alone hide pairs, and rows are whole chunks.
inline bool CanStream(const core::Problem& p) {
  return p.bias.data == nullptr && p.alibi_slopes == nullptr && p.softcap <= 0.0f &&
         p.dropout.enabled == 0 && !core::HasTerms(p.mask) && HasKeyChunks(p) &&
         HasChunks(p.q, p.qk_dim);
}

// Of a problem whose sequences are alike and short, with keys to the end of the tensor; else none.
inline StreamPlan MakeStreamPlan(const ForwardParams& params) {
  const core::Problem& p = params.problem;
  StreamPlan plan = {};
  if (core::IsPacked(p) || p.q_lengths.data != nullptr || p.kv_lengths.data != nullptr) return plan;
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, 0, &status);
  if (core::LocalKeys(s) != p.kv_rows || p.kv_rows == 0 || !IsShort(p, s)) return plan;
  plan.group = static_cast<int32_t>(p.group);
  plan.rows = static_cast<int32_t>(core::Min(p.q_rows, params.partials.rows) * p.group);
  plan.row_tiles = core::CeilDiv(plan.rows, kShortBlockRows);
  plan.splits = static_cast<int32_t>(SplitCount(s));
  plan.split_keys = static_cast<int32_t>(SplitKeys(s));
  plan.keys = static_cast<int32_t>(p.kv_rows);
  plan.items = plan.row_tiles * plan.splits * static_cast<int32_t>(p.kv_heads);
  plan.all_items = plan.items * static_cast<int32_t>(p.batch);
  return plan;
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchStream(ForwardParams params, cudaStream_t stream) {
  using Block = StreamBlock<kDType, kHeadDim>;
  constexpr StreamPolicy kPolicy = Block::kPolicy;
  static_assert(Block::kFixedBytes + Block::kStageBytes <= kSmallestSharedBytes,
                "more shared memory than sm_86 has");
  const core::Problem& p = params.problem;
  params.items = p.batch * p.kv_heads * core::Max<int64_t>(params.partials.splits, 1) *
                 core::CeilDiv<int64_t>(params.partials.rows * p.group, kShortBlockRows);
  if (params.items == 0) return cudaSuccess;
  if (params.items > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const auto steps = [](int64_t row_stride) {
    return CopySteps{Block::kPolicy.keys * row_stride * 2,
                     Block::Column::kRowStep * row_stride * 2};
  };
  params.key_steps = steps(p.k.row_stride);
  params.value_steps = steps(p.v.row_stride);
  int multiprocessors = 0;
  int block_bytes = 0;  // of shared memory, at most
  int all_bytes = 0;    // of a multiprocessor
  cudaError_t error = GetDeviceAttribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error == cudaSuccess) {
    error = GetDeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &block_bytes);
  }
  if (error == cudaSuccess) {
    error = GetDeviceAttribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &all_bytes);
  }
  if (error != cudaSuccess) return error;
  const auto stages = [&](int blocks) {
    // The system takes 1 KB for each block.
    const int bytes = core::Min(all_bytes / blocks - 1024, block_bytes);
    return core::Min((bytes - Block::kFixedBytes) / Block::kStageBytes, kMostStreamStages);
  };
  int blocks = kPolicy.blocks_per_multiprocessor;
  if (stages(blocks) < 2) blocks = 1;
  params.stages = stages(blocks);
  const int shared_bytes = Block::kFixedBytes + params.stages * Block::kStageBytes;
  StreamParams argument = {};
  int major = 0;
  error = GetDeviceAttribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error != cudaSuccess) return error;
  // Only where the code for sm_90 is what runs.
  argument.has_maps = major == 9 && kHeadDim >= 64 && !p.has_block_table &&
                      hopper::MakeStreamMaps(p, kPolicy.keys, &argument.keys, &argument.values);
  argument.forward = params;
  const void* kernel = reinterpret_cast<const void*>(&StreamKernel<kDType, kHeadDim, false>);
  if constexpr (kHeadDim >= 64) {
    if (argument.has_maps) argument.plan = MakeStreamPlan(params);
    if (argument.plan.items != 0) {
      kernel = reinterpret_cast<const void*>(&StreamKernel<kDType, kHeadDim, true>);
    }
  }
  void* arguments[] = {&argument};
  error = LaunchShared(
      kernel,
      dim3(static_cast<unsigned>(core::Min<int64_t>(params.items, multiprocessors * blocks))),
      kPolicy.threads, shared_bytes, arguments, stream);
  return error != cudaSuccess ? error : LaunchMergeSplits(params, stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_STREAM_LAUNCH_CUH_
