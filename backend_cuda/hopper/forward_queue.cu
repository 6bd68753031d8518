// The queue of the forward kernels' work (WorkQueue), by one block of threads.
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/tensor_core.cuh"

namespace tandem::cuda::hopper {
namespace {

constexpr int kThreads = 256;
constexpr int kClasses = 256;   // of lengths
constexpr int kTileKeys = 128;  // in which lengths are counted

// Smaller for more tiles of keys: those of a class differ by an eighth at most.
__device__ int LengthClass(int64_t tiles) {
  const auto count = static_cast<uint32_t>(tiles);
  if (count < 8) return kClasses - 1 - static_cast<int>(count);
  const int shift = 28 - __clz(static_cast<int>(count));
  return kClasses - 1 - 8 * (shift + 1) - static_cast<int>(count >> shift & 7);
}

// The sum of the values of this thread's and all threads before it. All threads of the block come.
__device__ int SumUpToMine(int value, int (&warps)[kThreads / kWarpSize]) {
  const int lane = threadIdx.x % kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += before;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(threadIdx.x) / kWarpSize; ++warp) value += warps[warp];
  return value;
}

__global__ void __launch_bounds__(kThreads)
    FillQueueKernel(const __grid_constant__ core::Problem problem, WorkQueue queue,
                    int block_rows) {
  static_assert(kThreads == kClasses);
  __shared__ int places[kClasses];  // where the next sequence of a class goes
  __shared__ int warps[kThreads / kWarpSize];
  AllowDependentLaunch();
  const int thread = static_cast<int>(threadIdx.x);
  const int sequences = static_cast<int>(problem.batch);
  places[thread] = 0;
  __syncthreads();
  int32_t status = 0;
  const auto class_of = [&](int batch) {
    const core::Sequence s = core::ResolveSequence(problem, batch, &status);
    return LengthClass(core::CeilDiv<int64_t>(core::LocalKeys(s), kTileKeys));
  };
  for (int batch = thread; batch < sequences; batch += kThreads) {
    atomicAdd(&places[class_of(batch)], 1);
  }
  if (status != 0 && problem.device_status != nullptr) atomicOr(problem.device_status, status);
  __syncthreads();
  const int count = places[thread];
  const int first = SumUpToMine(count, warps) - count;
  places[thread] = first;
  __syncthreads();
  for (int batch = thread; batch < sequences; batch += kThreads) {
    queue.sequences[atomicAdd(&places[class_of(batch)], 1)] = batch;
  }
  __syncthreads();
  int units_before = 0;
  for (int base = 0; base < sequences; base += kThreads) {
    const int place = base + thread;
    int units = 0;
    if (place < sequences) {
      const core::Sequence s = core::ResolveSequence(problem, queue.sequences[place], &status);
      units = static_cast<int>(problem.q_heads * core::CeilDiv<int64_t>(s.q_rows, block_rows));
    }
    const int end = units_before + SumUpToMine(units, warps);
    if (place < sequences) queue.first_units[place + 1] = end;
    if (thread == kThreads - 1) places[0] = end;
    __syncthreads();
    units_before = places[0];
    __syncthreads();
  }
  if (thread == 0) {
    *queue.taken = 0;
    queue.first_units[0] = 0;
  }
  // So that the end of this launch is that of all before it, too.
  WaitForEarlierLaunch();
}

}  // namespace

cudaError_t LaunchFillQueue(const Params& params, cudaStream_t stream) {
  core::Problem problem = params.problem;
  WorkQueue queue = params.queue;
  int block_rows =
      ForwardPolicy(ForwardBucket(core::Max(problem.qk_dim, problem.v_dim))).block_rows;
  void* arguments[] = {&problem, &queue, &block_rows};
  // After those of the short sequences it begins while they run: they were not launched so, and
  // what came before them has ended.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = MayBeShort(problem) ? 1 : 0;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(&FillQueueKernel), arguments);
}

}  // namespace tandem::cuda::hopper
