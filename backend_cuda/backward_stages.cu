// The kernels beside those that multiply (backward_kernel.cuh): rows that belong to no sequence,
// NaN in dO, and gradients that are sums over rows.
#include "backend_cuda/backward.h"
#include "backend_cuda/backward_terms.cuh"

namespace tandem::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // of a launch; each block strides over its items

cudaError_t Launch(const void* kernel, int64_t blocks, int threads, void** arguments,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(core::Min(blocks, kMaxBlocks))),
                          dim3(threads), arguments, 0, stream);
}

// ---- rows of no sequence ----

__device__ void WriteZeros(const Array4& gradient, int64_t heads, int64_t columns, int64_t begin,
                           int64_t end) {
  if (gradient.data == nullptr) return;
  for (int64_t item = blockIdx.y; item < (end - begin) * heads; item += gridDim.y) {
    const int64_t offset = item / (end - begin) * gradient.head_stride +
                           (begin + item % (end - begin)) * gradient.row_stride;
    for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
      StoreElement(gradient.data, gradient.dtype, offset + column * gradient.column_stride, 0.0f);
    }
  }
}

// Gap g reaches from the end of sequence g - 1 to the start of sequence g.
__global__ void __launch_bounds__(kThreads)
    FillGradientGapsKernel(const __grid_constant__ Problem p, int64_t gaps) {
  for (int64_t gap = blockIdx.x; gap < gaps; gap += gridDim.x) {
    int32_t status = 0;
    int64_t q_begin = 0, kv_begin = 0;
    int64_t q_end = p.q_total, kv_end = p.kv_total;
    if (gap > 0) {
      const Sequence before = core::ResolveSequence(p, gap - 1, &status);
      q_begin = before.q_start + before.q_rows;
      kv_begin = before.kv_start + before.kv_rows;
    }
    if (gap < p.batch) {
      const Sequence after = core::ResolveSequence(p, gap, &status);
      q_end = after.q_start;
      kv_end = after.kv_start;
    }
    if (q_begin < q_end) WriteZeros(p.dq, p.q_heads, p.qk_dim, q_begin, q_end);
    if (kv_begin < kv_end) {
      WriteZeros(p.dk, p.kv_heads, p.qk_dim, kv_begin, kv_end);
      WriteZeros(p.dv, p.kv_heads, p.v_dim, kv_begin, kv_end);
    }
  }
}

// ---- NaN in dO ----

// One block per kMarkedTiles tiles of 64 keys of a sequence and key head. Rows of dO that are not
// finite are zeros in the planes; dV becomes NaN in the columns and at the keys where they are
// seen.
constexpr int64_t kMarkedTiles = 8;  // most blocks have nothing to do but to find out

__global__ void __launch_bounds__(kThreads)
    MarkNonFiniteKernel(const __grid_constant__ BackwardParams params, int64_t key_blocks) {
  const Problem& p = params.problem;
  const int64_t begin = blockIdx.x % key_blocks * (kMarkedTiles * core::kTile);
  const int64_t kv_head = blockIdx.x / key_blocks % p.kv_heads;
  const int64_t batch = blockIdx.x / key_blocks / p.kv_heads;
  int32_t status = 0;
  const Sequence s = core::ResolveSequence(p, batch, &status);
  const int64_t end = core::Min(begin + kMarkedTiles * core::kTile, core::LocalKeys(s));
  if (begin >= end) return;
  const int64_t words = core::CeilDiv<int64_t>(s.q_rows, core::kTile);
  __shared__ bool is_seen[core::kTile];
  for (int64_t head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head) {
    const uint64_t* flags = params.non_finite + QueryFlagWord(params, s, head, 0);
    bool any = false;
    for (int64_t w = threadIdx.x; w < words; w += kThreads) any = any || flags[w] != 0;
    if (__syncthreads_or(any) == 0) continue;
    for (int64_t first_key = begin; first_key < end; first_key += core::kTile) {
      for (int64_t w = 0; w < words; ++w) {
        for (uint64_t rows = flags[w]; rows != 0; rows &= rows - 1) {
          const int64_t row = w * core::kTile + __ffsll(static_cast<long long>(rows)) - 1;
          const int64_t key = first_key + threadIdx.x;
          if (threadIdx.x < core::kTile) {
            bool seen = ((VisibleKeys(p, s, head, row, first_key) >> threadIdx.x) & 1u) != 0;
            if (seen && p.bias.data != nullptr) {
              seen = LoadElement(p.bias.data, p.bias.dtype,
                                 core::BiasOffset(p.bias, s, head, s.q_offset + row,
                                                  s.kv_offset + key)) != core::NegativeInfinity();
            }
            if (seen && p.dropout.enabled != 0) {
              seen = core::DropoutKeeps(p.dropout, s.batch * p.q_heads + head, s.q_offset + row,
                                        s.kv_offset + key);
            }
            is_seen[threadIdx.x] = seen;
          }
          __syncthreads();
          const int64_t from = core::QueryOffset(p.dout, s, head, row);
          for (int64_t column = threadIdx.x; column < p.v_dim; column += kThreads) {
            if (core::IsFinite(
                    LoadElement(p.dout.data, p.dout.dtype, from + column * p.dout.column_stride))) {
              continue;
            }
            for (int n = 0; n < core::kTile; ++n) {
              if (!is_seen[n]) continue;
              StoreElement(
                  p.dv.data, p.dv.dtype,
                  core::KeyOffset(p.dv, s, kv_head, first_key + n) + column * p.dv.column_stride,
                  core::BitsToFloat(0x7fffffffu));
            }
          }
          __syncthreads();
        }
      }
    }
  }
}

// ---- sums ----

__global__ void __launch_bounds__(kThreads)
    FillBiasKernel(const __grid_constant__ Array4 dbias, int64_t batch, int64_t heads, int64_t rows,
                   int64_t keys) {
  for (int64_t line = blockIdx.x; line < batch * heads * rows; line += gridDim.x) {
    float* to = static_cast<float*>(dbias.data) + line / rows / heads * dbias.batch_stride +
                line / rows % heads * dbias.head_stride + line % rows * dbias.row_stride;
    for (int64_t j = threadIdx.x; j < keys; j += kThreads) to[j * dbias.column_stride] = 0.0f;
  }
}

// The threads' parts, added up in a fixed order; thread 0 has the sum.
__device__ double SumOfThreads(double part) {
  __shared__ double parts[kThreads];
  __syncthreads();
  parts[threadIdx.x] = part;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

// One block per head.
__global__ void __launch_bounds__(kThreads)
    SinkGradientKernel(const __grid_constant__ BackwardParams params) {
  const Problem& p = params.problem;
  const int64_t head = blockIdx.x;
  const float sink = p.sink[head * p.sink_stride];
  double sum = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(p, b, &status);
    const int64_t plane_row = QueryPlaneRow(params, s, head);
    for (int64_t i = threadIdx.x; i < s.q_rows; i += kThreads) {
      if (core::GradientRowIsEmpty(params.lse[plane_row + i])) continue;
      // The planes' LSE is NaN where Q is, and a sink does not see Q.
      const float lse = static_cast<const float*>(p.lse.data)[core::QueryOffset(p.lse, s, head, i)];
      sum += double{core::SinkGradient(sink, lse, params.statistics[plane_row + i].offset)};
    }
  }
  sum = SumOfThreads(sum);
  if (threadIdx.x == 0) p.dsink[head * p.dsink_stride] = static_cast<float>(sum) + 0.0f;
}

// One block per element of dALiBi, or of dBias where it has no rows or keys of its own. Indices of
// dimensions that are broadcast are 0.
struct SumShape {
  float* data;
  int64_t batch, heads, rows, keys;  // extents
  int64_t batch_stride, head_stride, row_stride, column_stride;
  int32_t is_slope;
};

__global__ void __launch_bounds__(kThreads)
    ReduceSumsKernel(const __grid_constant__ BackwardParams params,
                     const __grid_constant__ SumShape shape) {
  const Problem& p = params.problem;
  const int64_t count = shape.batch * shape.heads * shape.rows * shape.keys;
  const bool of_rows = shape.is_slope != 0 || shape.column_stride == 0;
  for (int64_t item = blockIdx.x; item < count; item += gridDim.x) {
    const int64_t j = item % shape.keys;
    const int64_t i = item / shape.keys % shape.rows;
    const int64_t h = item / shape.keys / shape.rows % shape.heads;
    const int64_t b = item / shape.keys / shape.rows / shape.heads;
    double sum = 0.0;
    for (int64_t batch = shape.batch_stride != 0 ? b : 0;
         batch < (shape.batch_stride != 0 ? b + 1 : p.batch); ++batch) {
      int32_t status = 0;
      const Sequence s = core::ResolveSequence(p, batch, &status);
      for (int64_t head = shape.head_stride != 0 ? h : 0;
           head < (shape.head_stride != 0 ? h + 1 : p.q_heads); ++head) {
        const bool is_one = of_rows ? shape.row_stride != 0 : true;
        const int64_t first = !is_one ? 0 : of_rows ? i - s.q_offset : j - s.kv_offset;
        const int64_t end =
            core::Min(is_one ? first + 1 : s.q_rows, of_rows ? s.q_rows : s.kv_rows);
        const float* sums =
            of_rows ? params.row_sums + 2 * QueryPlaneRow(params, s, head) + shape.is_slope
                    : params.key_sums + KeySumRow(params, s, head);
        for (int64_t n = first + threadIdx.x; n < end; n += kThreads) {
          if (n >= 0) sum += double{sums[of_rows ? 2 * n : n]};
        }
      }
    }
    sum = SumOfThreads(sum);
    if (threadIdx.x == 0) {
      shape.data[b * shape.batch_stride + h * shape.head_stride + i * shape.row_stride +
                 j * shape.column_stride] =
          static_cast<float>(shape.is_slope != 0 ? -sum : sum) + 0.0f;
    }
  }
}

cudaError_t LaunchReduce(const BackwardParams& params, SumShape shape, cudaStream_t stream) {
  BackwardParams argument = params;
  void* arguments[] = {&argument, &shape};
  return Launch(reinterpret_cast<const void*>(&ReduceSumsKernel),
                shape.batch * shape.heads * shape.rows * shape.keys, kThreads, arguments, stream);
}

}  // namespace

cudaError_t LaunchFillGradientGaps(const Problem& problem, cudaStream_t stream) {
  Problem argument = problem;
  int64_t gaps = problem.batch + 1;
  void* arguments[] = {&argument, &gaps};
  // A gap is usually nothing; enough blocks for each that one long gap is not one block's work.
  const dim3 grid(static_cast<unsigned>(core::Min<int64_t>(gaps, kMaxBlocks)),
                  static_cast<unsigned>(core::Clamp<int64_t>(2048 / gaps, 1, 256)));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&FillGradientGapsKernel), grid,
                          dim3(kThreads), arguments, 0, stream);
}

cudaError_t LaunchFillBias(const Problem& problem, cudaStream_t stream) {
  Array4 dbias = problem.dbias;
  int64_t batch = dbias.batch_stride != 0 ? problem.batch : 1;
  int64_t heads = dbias.head_stride != 0 ? problem.q_heads : 1;
  int64_t rows = dbias.row_stride != 0 ? problem.global_q_len : 1;
  int64_t keys = dbias.column_stride != 0 ? problem.global_kv_len : 1;
  void* arguments[] = {&dbias, &batch, &heads, &rows, &keys};
  return Launch(reinterpret_cast<const void*>(&FillBiasKernel), batch * heads * rows, kThreads,
                arguments, stream);
}

cudaError_t LaunchMarkNonFinite(const BackwardParams& params, cudaStream_t stream) {
  const Problem& p = params.problem;
  BackwardParams argument = params;
  int64_t key_blocks = core::CeilDiv<int64_t>(p.kv_rows, kMarkedTiles * core::kTile);
  const int64_t blocks = p.batch * p.kv_heads * key_blocks;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&argument, &key_blocks};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&MarkNonFiniteKernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                          stream);
}

cudaError_t LaunchReduceSums(const BackwardParams& params, cudaStream_t stream) {
  const Problem& p = params.problem;
  if (p.dsink != nullptr) {
    BackwardParams argument = params;
    void* arguments[] = {&argument};
    const cudaError_t error = Launch(reinterpret_cast<const void*>(&SinkGradientKernel), p.q_heads,
                                     kThreads, arguments, stream);
    if (error != cudaSuccess) return error;
  }
  if (p.dalibi != nullptr) {
    const bool is_per_batch = p.dalibi_batch_stride != 0;
    const bool is_per_head = p.dalibi_head_stride != 0;
    const cudaError_t error =
        LaunchReduce(params,
                     {p.dalibi, is_per_batch ? p.batch : 1, is_per_head ? p.q_heads : 1, 1, 1,
                      p.dalibi_batch_stride, p.dalibi_head_stride, 0, 0, 1},
                     stream);
    if (error != cudaSuccess) return error;
  }
  if (p.dbias.data == nullptr || HasBiasMatrix(p)) return cudaSuccess;
  const Array4& d = p.dbias;
  return LaunchReduce(params,
                      {static_cast<float*>(d.data), d.batch_stride != 0 ? p.batch : 1,
                       d.head_stride != 0 ? p.q_heads : 1, d.row_stride != 0 ? p.global_q_len : 1,
                       d.column_stride != 0 ? p.global_kv_len : 1, d.batch_stride, d.head_stride,
                       d.row_stride, d.column_stride, 0},
                      stream);
}

}  // namespace tandem::cuda
