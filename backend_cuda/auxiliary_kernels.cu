// The kernels around the forward pass: preparation of masks, rows outside every packed sequence,
// strided copies. Each is a loop over independent items with the shared functions of core/ inside.
#include "backend_cuda/launch.h"
#include "backend_cuda/tensor_core.cuh"
#include "core/mask_prepare.h"

namespace tandem::cuda {
namespace {

using core::PreparationLayout;
using core::Problem;
using core::Sequence;

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // of a launch; each block strides over its items

cudaError_t Launch(const void* kernel, int64_t blocks, int threads, void** arguments,
                   cudaStream_t stream) {
  return cudaLaunchKernel(kernel,
                          dim3(static_cast<unsigned>(core::Clamp<int64_t>(blocks, 1, kMaxBlocks))),
                          dim3(threads), arguments, 0, stream);
}

__device__ void ReportStatus(const Problem& problem, int32_t status) {
  if (status != 0 && problem.device_status != nullptr) atomicOr(problem.device_status, status);
}

// One block of 64 threads per canonical tile, one row per thread.
__global__ void __launch_bounds__(core::kTile)
    PrepareDenseKernel(const __grid_constant__ Problem problem,
                       const __grid_constant__ PreparationLayout layout, void* buffer) {
  const int64_t words = core::DenseWordsPerRow(problem);
  const int64_t tile_rows = core::DenseTileRows(problem);
  int32_t status = 0;
  for (int64_t item = blockIdx.x; item < layout.dense_class_count; item += gridDim.x) {
    const int64_t word_index = item % words;
    const int64_t tile_row = item / words % tile_rows;
    const int64_t plane = item / words / tile_rows;
    const int64_t head = plane % problem.sources.dense_head_extent;
    const int64_t batch = plane / problem.sources.dense_head_extent;
    const int64_t row = tile_row * core::kTile + threadIdx.x;
    bool any = false;
    bool all = true;
    if (row < problem.sources.dense_row_extent) {
      const uint64_t word =
          core::PrepareDenseRow(problem, layout, buffer, batch, head, row, word_index, &status);
      any = word != 0;
      all = word == core::DenseWordCapacity(problem, word_index);
    }
    any = __syncthreads_or(any) != 0;
    all = __syncthreads_and(all) != 0;
    if (threadIdx.x == 0) {
      core::FinishDenseTile(problem, layout, buffer, batch, head, tile_row, word_index, any, all);
    }
  }
  ReportStatus(problem, status);
}

// One thread per (batch, head, query block).
__global__ void __launch_bounds__(kThreads)
    PrepareBlockListsKernel(const __grid_constant__ Problem problem,
                            const __grid_constant__ PreparationLayout layout, void* buffer,
                            int term) {
  const core::BlockSparseSource& source = problem.sources.block_sparse[term];
  const int64_t items = source.batch_extent * source.head_extent * source.q_blocks;
  int32_t status = 0;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const int64_t q_block = item % source.q_blocks;
    const int64_t head = item / source.q_blocks % source.head_extent;
    const int64_t batch = item / source.q_blocks / source.head_extent;
    core::PrepareBlockRow(problem, layout, buffer, term, batch, head, q_block, &status);
  }
  ReportStatus(problem, status);
}

// Gap g reaches from the end of sequence g - 1 to the start of sequence g.
// From row 0 to the last, sequences and gaps follow each other without a hole, whatever cu_seqlens
// hold: so every row is written by one of them.
__global__ void __launch_bounds__(kThreads)
    FillGapsKernel(const __grid_constant__ Problem problem, int64_t gaps) {
  for (int64_t gap = blockIdx.x; gap < gaps; gap += gridDim.x) {
    int32_t status = 0;
    int64_t begin = 0;
    int64_t end = problem.q_total;
    if (gap > 0) {
      const Sequence before = core::ResolveSequence(problem, gap - 1, &status);
      begin = before.q_start + before.q_rows;
    }
    if (gap < problem.batch) end = core::ResolveSequence(problem, gap, &status).q_start;
    if (end <= begin) continue;
    // Blocks of one gap share its rows and heads.
    const int64_t rows = end - begin;
    const core::Array4& out = problem.out;
    for (int64_t item = blockIdx.y; item < rows * problem.q_heads; item += gridDim.y) {
      const int64_t row = begin + item % rows;
      const int64_t head = item / rows;
      for (int64_t column = threadIdx.x; column < problem.v_dim; column += kThreads) {
        StoreElement(out.data, out.dtype,
                     head * out.head_stride + row * out.row_stride + column * out.column_stride,
                     0.0f);
      }
      if (threadIdx.x == 0 && problem.lse.data != nullptr) {
        static_cast<float*>(
            problem.lse.data)[head * problem.lse.head_stride + row * problem.lse.row_stride] =
            __int_as_float(0xff800000);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    CopyArrayKernel(const __grid_constant__ core::ArrayCopy copy, int64_t elements) {
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < elements;
       item += int64_t{gridDim.x} * kThreads) {
    int64_t rest = item;
    int64_t source = 0;
    int64_t destination = 0;
    for (int32_t axis = copy.rank - 1; axis >= 0; --axis) {
      const int64_t index = rest % copy.shape[axis];
      rest /= copy.shape[axis];
      source += index * copy.source_strides[axis];
      destination += index * copy.destination_strides[axis];
    }
    switch (copy.element_size) {
      case 1:
        static_cast<uint8_t*>(copy.destination)[destination] =
            static_cast<const uint8_t*>(copy.source)[source];
        break;
      case 2:
        static_cast<uint16_t*>(copy.destination)[destination] =
            static_cast<const uint16_t*>(copy.source)[source];
        break;
      case 4:
        static_cast<uint32_t*>(copy.destination)[destination] =
            static_cast<const uint32_t*>(copy.source)[source];
        break;
      default:
        static_cast<uint64_t*>(copy.destination)[destination] =
            static_cast<const uint64_t*>(copy.source)[source];
        break;
    }
  }
}

}  // namespace

cudaError_t LaunchPrepareMask(const Problem& problem, const PreparationLayout& layout, void* buffer,
                              cudaStream_t stream) {
  Problem problem_argument = problem;
  PreparationLayout layout_argument = layout;
  if (layout.dense_class_count > 0) {
    void* arguments[] = {&problem_argument, &layout_argument, &buffer};
    const cudaError_t error = Launch(reinterpret_cast<const void*>(&PrepareDenseKernel),
                                     layout.dense_class_count, core::kTile, arguments, stream);
    if (error != cudaSuccess) return error;
  }
  for (int term = 0; term < problem.sources.block_sparse_count; ++term) {
    if (layout.block_word_count[term] == 0) continue;
    const core::BlockSparseSource& source = problem.sources.block_sparse[term];
    const int64_t items = source.batch_extent * source.head_extent * source.q_blocks;
    void* arguments[] = {&problem_argument, &layout_argument, &buffer, &term};
    const cudaError_t error =
        Launch(reinterpret_cast<const void*>(&PrepareBlockListsKernel),
               core::CeilDiv<int64_t>(items, kThreads), kThreads, arguments, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchFillGaps(const Problem& problem, cudaStream_t stream) {
  Problem problem_argument = problem;
  int64_t gaps = problem.batch + 1;
  // A gap is usually nothing; enough blocks for each that one long gap is not one block's work.
  const int64_t sharers = core::Clamp<int64_t>(2048 / gaps, 1, 256);
  void* arguments[] = {&problem_argument, &gaps};
  const dim3 grid(static_cast<unsigned>(core::Min<int64_t>(gaps, kMaxBlocks)),
                  static_cast<unsigned>(sharers));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&FillGapsKernel), grid, dim3(kThreads),
                          arguments, 0, stream);
}

cudaError_t LaunchCopyArray(const core::ArrayCopy& copy, cudaStream_t stream) {
  core::ArrayCopy copy_argument = copy;
  int64_t elements = 1;
  for (int32_t axis = 0; axis < copy.rank; ++axis) elements *= copy.shape[axis];
  if (elements == 0) return cudaSuccess;
  void* arguments[] = {&copy_argument, &elements};
  return Launch(reinterpret_cast<const void*>(&CopyArrayKernel),
                core::CeilDiv<int64_t>(elements, kThreads), kThreads, arguments, stream);
}

}  // namespace tandem::cuda
