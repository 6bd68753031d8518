// The launcher of the forward kernels of one type and head dimension; hopper/instantiations/ has a
// line for each.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_

#include "backend_cuda/hopper/forward_kernel.cuh"
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/launch.h"

namespace tandem::cuda::hopper {

template <DType kDType, int kHeadDim, Variant kVariant>
__global__ void __launch_bounds__(ForwardPolicy(kHeadDim).threads, 1)
    ForwardKernel(const __grid_constant__ Params params) {
  using Rows = Warpgroup<kDType, kHeadDim, kVariant>;
  constexpr TilePolicy kPolicy = Rows::kPolicy;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t address = SharedAddress(shared);
  using State = BlockState<kHeadDim, kVariant>;
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  if constexpr (IsCareful(kVariant)) {
    WaitForEarlierLaunch();
    const bool has_any =
        threadIdx.x < gridDim.x && IsFlagged<kPolicy.warpgroups>(params.any_flags[threadIdx.x]);
    if (__syncthreads_or(has_any) == 0) return;
  }
  if (threadIdx.x == 0) {
    PrefetchMap(&params.query);
    PrefetchMap(&params.keys);
    PrefetchMap(&params.values);
    if (params.has_out_map != 0) PrefetchMap(&params.out);
    constexpr int kReaders = 4 * kPolicy.warpgroups;
    for (int stage = 0; stage < kPolicy.query_stages; ++stage) {
      InitBarrier(SharedAddress(&state.query_full[stage]), 1);
      InitBarrier(SharedAddress(&state.query_empty[stage]), kReaders);
    }
    for (int item = 0; item < kItems; ++item) {
      InitBarrier(SharedAddress(&state.item_full[item]), 1);
    }
    for (int stage = 0; stage < kPolicy.stages; ++stage) {
      const int writers = HasWords<kVariant>(params)          ? 1
                          : CopiesDenseRows<kVariant>(params) ? kWarpSize
                                                              : 0;
      InitBarrier(SharedAddress(&state.key_full[stage]), 1 + writers);
      InitBarrier(SharedAddress(&state.key_empty[stage]), kReaders);
    }
    for (int stage = 0; stage < kPolicy.value_stages; ++stage) {
      InitBarrier(SharedAddress(&state.value_full[stage]), 1);
      InitBarrier(SharedAddress(&state.value_empty[stage]), kReaders);
    }
    InitBarrier(SharedAddress(&state.values_known), kReaders * kWarpSize);
    if constexpr (MayHaveWords(kVariant)) state.InitWordBarriers();
    if constexpr (HasDenseRows(kVariant)) state.InitDenseBarriers();
    if constexpr (HasBias(kVariant)) state.InitBiasBarriers(kReaders);
    PublishBarriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<kPolicy.loading_registers>();
    if (threadIdx.x < kWarpSize) {
      ItemWarp<kHeadDim, kVariant>(params, address, state).Run();
      // Not at once: blocks of threads of the next launch that wait where this one has ended cost
      // causal masks 1 to 3 %.
      if (!IsCareful(kVariant)) AllowDependentLaunch();
    } else if (threadIdx.x < 2 * kWarpSize) {
      TileWarp<kHeadDim, kVariant>(params, address, state).Run();
    } else if constexpr (MayHaveWords(kVariant)) {
      if (!HasWords<kVariant>(params)) return;
      if (threadIdx.x < 3 * kWarpSize) {
        ClassWarp<kHeadDim, kVariant>(params, address, state).Run();
      } else {
        WordWarp<kHeadDim, kVariant>(params, address, state).Run();
      }
    } else if constexpr (HasDenseRows(kVariant)) {
      if (threadIdx.x < 3 * kWarpSize && CopiesDenseRows<kVariant>(params)) {
        DenseWarp<kHeadDim, kVariant>(params, address, state).Run();
      }
    }
  } else {
    TakeRegisters<kPolicy.registers>();
    Rows(params, address, state, warpgroup - 1).Run();
  }
}

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
  config.gridDim = dim3(static_cast<unsigned>(
      core::Min<int64_t>(params.units, core::Min(multiprocessors, kMostBlocks))));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent ? 1 : 0;
  Params argument = params;
  void* arguments[] = {&argument};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

// The kernel of a variant, and the careful one for what it leaves.
template <core::DType kDType, int kHeadDim, Variant kVariant, Variant kCareful>
cudaError_t LaunchBoth(const Params& params, cudaStream_t stream) {
  constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim, kVariant);
  if (params.units == 0) return cudaSuccess;
  const bool has_queue = params.queue.taken != nullptr;
  cudaError_t error = has_queue ? LaunchFillQueue(params, stream) : cudaSuccess;
  if (error != cudaSuccess) return error;
  error = LaunchPersistent(
      reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, kVariant>), params,
      kPolicy.threads, kSharedBytes<kHeadDim, kVariant>, has_queue, stream);
  if (error != cudaSuccess) return error;
  return LaunchPersistent(reinterpret_cast<const void*>(&ForwardKernel<kDType, kHeadDim, kCareful>),
                          params, kPolicy.threads, kSharedBytes<kHeadDim, kCareful>, true, stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForward(const Params& params, cudaStream_t stream) {
  const core::Mask& mask = params.problem.mask;
  if (mask.dense.words != nullptr) {
    return LaunchBoth<kDType, kHeadDim, Variant::kMasked, Variant::kCareful>(params, stream);
  }
  return core::HasTerms(mask)
             ? LaunchBoth<kDType, kHeadDim, Variant::kBands, Variant::kCareful>(params, stream)
             : LaunchBoth<kDType, kHeadDim, Variant::kPlain, Variant::kCareful>(params, stream);
}
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchWords(const Params& params, cudaStream_t stream) {
  return LaunchBoth<kDType, kHeadDim, Variant::kWords, Variant::kWordsCareful>(params, stream);
}
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBias(const Params& params, cudaStream_t stream) {
  return LaunchBoth<kDType, kHeadDim, Variant::kBias, Variant::kBiasCareful>(params, stream);
}

template <core::DType kDType, int kHeadDim>
cudaError_t LaunchAlibi(const Params& params, cudaStream_t stream) {
  return LaunchBoth<kDType, kHeadDim, Variant::kAlibi, Variant::kAlibiCareful>(params, stream);
}
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchTerms(const Params& params, cudaStream_t stream) {
  return LaunchBoth<kDType, kHeadDim, Variant::kTerms, Variant::kTermsCareful>(params, stream);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LAUNCH_CUH_
