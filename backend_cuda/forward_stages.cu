// The kernels before and after the forward kernels: the split of f32 keys and values into planes,
// and the merge of the partial results of short sequences.
#include "backend_cuda/launch.h"
#include "backend_cuda/row_output.cuh"
#include "backend_cuda/tile_staging.cuh"

namespace tandem::cuda {
namespace {

constexpr int kThreads = 128;

// One block per 64 keys of a sequence and key head, and per tensor (keys, values).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    SplitPlanesKernel(const __grid_constant__ ForwardParams params) {
  constexpr int kChunks = kHeadDim / 8;
  const core::Problem& p = params.problem;
  __shared__ unsigned long long flags;
  if (threadIdx.x == 0) flags = 0;
  __syncthreads();
  const int64_t words = FlagWords(p);
  const int64_t word = blockIdx.x % words;
  const int64_t kv_head = blockIdx.x / words % p.kv_heads;
  const int64_t batch = blockIdx.x / words / p.kv_heads;
  const bool is_values = blockIdx.y != 0;
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, batch, &status);
  if (IsShort(p, s)) return;
  const core::Array4& array = is_values ? p.v : p.k;
  const SplitTensor& tensor = is_values ? params.values : params.keys;
  const int64_t dim = is_values ? p.v_dim : p.qk_dim;
  const int64_t first = word * core::kTile;
  const int count =
      static_cast<int>(core::Clamp<int64_t>(core::LocalKeys(s) - first, 0, core::kTile));
  if (count == 0) return;
  const int64_t plane_row = PlaneRow(p, s, kv_head) + first;
  // Rows beyond the last key are zeros up to the end of the tile.
  for (int c = threadIdx.x; c < core::kTile * kChunks; c += kThreads) {
    const int row = c / kChunks;
    const int column = c % kChunks * 8;
    const int64_t offset = core::KeyOffset(array, s, kv_head, first + row);
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = row < count && column + e < dim
                 ? LoadElement(array.data, DType::kF32, offset + (column + e) * array.column_stride)
                 : 0.0f;
    }
    char* target =
        reinterpret_cast<char*>(tensor.planes + (plane_row + row) * 3 * kHeadDim + column);
    uint64_t* word_flags = reinterpret_cast<uint64_t*>(&flags);
    if (is_values) {
      SplitChunk<TileUse::kValues>(x, target, kHeadDim * 2, word_flags, row);
    } else {
      SplitChunk<TileUse::kScores>(x, target, kHeadDim * 2, word_flags, row);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) tensor.flags[FlagIndex(p, batch, kv_head) + word] = flags;
}

constexpr int kMergeWarps = 8;  // at most; as many as there can be splits

// One block per row and head of a short sequence. Warp w adds up the splits w, w + 8, ... in their
// order, lane by lane of columns; then the warps are added up in theirs. kTurns: splits of a warp,
// at most; kColumns: of a lane. Fewer of both leave room for more blocks.
template <int kTurns, int kColumns>
__global__ void __launch_bounds__(32 * kMergeWarps, kTurns* kColumns > 32 ? 2 : 4)
    MergeSplitsKernel(const __grid_constant__ ForwardParams params) {
  AllowDependentLaunch();
  const core::Problem& p = params.problem;
  const PartialResults& partials = params.partials;
  const auto rows = static_cast<uint32_t>(partials.rows);
  const auto q_heads = static_cast<uint32_t>(p.q_heads);
  const int64_t row = blockIdx.x % rows;
  const int64_t head = blockIdx.x / rows % q_heads;
  const int64_t batch = blockIdx.x / rows / q_heads;
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, batch, &status);
  const int splits = static_cast<int>(SplitCount(s));
  WaitForEarlierLaunch();
  if (!IsShort(p, s) || row >= s.q_rows || splits <= 1) return;
  const int64_t first = PartialIndex(partials, p.q_heads, batch, head, row);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // The outputs come while the first warp is at the weights.
  const float* output = partials.output + first * p.v_dim;
  float part[kTurns][kColumns];
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int split = warp + n * warps;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = lane + 32 * c;
      part[n][c] = split < splits && column < p.v_dim ? output[split * p.v_dim + column] : 0.0f;
    }
  }

  // Weights of the splits and the sum, by the first warp, two splits a lane.
  static_assert(kMostSplits == 64);
  __shared__ float weights[kMostSplits];
  __shared__ float row_maximum;
  __shared__ float row_sum;
  if (warp == 0) {
    float maxima[2];
    float sums[2];
    for (int half = 0; half < 2; ++half) {
      const int split = lane + 32 * half;
      maxima[half] = split < splits ? partials.maximum[first + split] : core::NegativeInfinity();
      sums[half] = split < splits ? partials.sum[first + split] : 0.0f;
    }
    float maximum = core::MaxKeepNan(maxima[0], maxima[1]);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      maximum = core::MaxKeepNan(maximum, __shfl_xor_sync(~0u, maximum, lanes));
    }
    float sum = 0.0f;
    for (int half = 0; half < 2; ++half) {
      const float weight = core::SoftmaxRescale(maxima[half], maximum);
      weights[lane + 32 * half] = weight;
      sum += sums[half] * weight;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) {
      row_maximum = maximum;
      row_sum = sum;
    }
  }
  __syncthreads();

  float value[kColumns] = {};
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int split = warp + n * warps;
    if (split >= splits) break;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] += part[n][c] * weights[split];
  }
  __shared__ float values[kMergeWarps][32 * kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) values[warp][lane + 32 * c] = value[c];
  __syncthreads();
  const RowEnd end = FinishRow(p, s, head, row, row_maximum, row_sum);
  for (int column = threadIdx.x; column < p.v_dim; column += 32 * warps) {
    float merged = 0.0f;
    for (int w = 0; w < warps; ++w) merged += values[w][column];
    StoreOutput(p, s, head, row, column, end.is_empty ? 0.0f : merged * end.factor);
  }
  if (threadIdx.x == 0) StoreLse(p, s, head, row, end.Lse());
}

constexpr int kFewSplits = 2 * kMergeWarps;
constexpr int kFewColumns = 4 * kWarpSize;

// MergeSplitsKernel for problems with so few splits and columns, in multiples of four: a warp to a
// row, so that few blocks are needed, which find room beside those of the splits. The same sums in
// the same order.
__global__ void __launch_bounds__(kThreads, 8)
    MergeFewSplitsKernel(const __grid_constant__ ForwardParams params) {
  AllowDependentLaunch();
  const core::Problem& p = params.problem;
  const PartialResults& partials = params.partials;
  const uint32_t index = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const auto rows = static_cast<uint32_t>(partials.rows);
  const auto q_heads = static_cast<uint32_t>(p.q_heads);
  const int64_t row = index % rows;
  const int64_t head = index / rows % q_heads;
  const int64_t batch = index / rows / q_heads;
  if (batch >= p.batch) return;
  const int lane = threadIdx.x % kWarpSize;
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, batch, &status);
  const int splits = static_cast<int>(SplitCount(s));
  WaitForEarlierLaunch();
  if (!IsShort(p, s) || row >= s.q_rows || splits <= 1) return;
  const int64_t first = PartialIndex(partials, p.q_heads, batch, head, row);
  const float own_maximum =
      lane < splits ? partials.maximum[first + lane] : core::NegativeInfinity();
  const float own_sum = lane < splits ? partials.sum[first + lane] : 0.0f;

  const float4* const output =
      reinterpret_cast<const float4*>(partials.output + first * p.v_dim) + lane;
  const int stride = static_cast<int>(p.v_dim / 4);  // of splits
  const auto load = [&](int split) {
    return split < splits && lane < stride ? output[split * stride]
                                           : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  float maximum = own_maximum;
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    maximum = core::MaxKeepNan(maximum, __shfl_xor_sync(~0u, maximum, lanes));
  }
  const float own_weight = core::SoftmaxRescale(own_maximum, maximum);
  float sum = own_sum * own_weight;
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(~0u, sum, lanes);
  }
  float4 value = {};
#pragma unroll
  for (int half = 0; half < kMergeWarps; half += kMergeWarps / 2) {
    float4 part[kMergeWarps / 2][2];
#pragma unroll
    for (int n = 0; n < kMergeWarps / 2; ++n) {
      part[n][0] = load(half + n);
      part[n][1] = load(half + n + kMergeWarps);
    }
#pragma unroll
    for (int n = 0; n < kMergeWarps / 2; ++n) {
      float4 both = {};
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        const float weight = __shfl_sync(~0u, own_weight, half + n + turn * kMergeWarps);
        both.x = fmaf(part[n][turn].x, weight, both.x);
        both.y = fmaf(part[n][turn].y, weight, both.y);
        both.z = fmaf(part[n][turn].z, weight, both.z);
        both.w = fmaf(part[n][turn].w, weight, both.w);
      }
      value.x += both.x;
      value.y += both.y;
      value.z += both.z;
      value.w += both.w;
    }
  }
  const RowEnd end = FinishRow(p, s, head, row, maximum, sum);
  if (lane < stride) {
    const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      StoreOutput(p, s, head, row, 4 * lane + c, end.is_empty ? 0.0f : values[c] * end.factor);
    }
  }
  if (lane == 0) StoreLse(p, s, head, row, end.Lse());
}

// The merge with as few turns as the splits of a problem need.
template <int kColumns>
const void* MergeKernel(const ForwardParams& params) {
  constexpr int kMostTurns = static_cast<int>(kMostSplits) / kMergeWarps;
  return params.partials.splits <= kMergeWarps
             ? reinterpret_cast<const void*>(&MergeSplitsKernel<1, kColumns>)
             : reinterpret_cast<const void*>(&MergeSplitsKernel<kMostTurns, kColumns>);
}

}  // namespace

cudaError_t LaunchSplitPlanes(const ForwardParams& params, cudaStream_t stream) {
  const core::Problem& p = params.problem;
  const int64_t blocks = p.batch * p.kv_heads * FlagWords(p);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const void* kernel = nullptr;
  switch (HeadDimBucket(core::Max(p.qk_dim, p.v_dim))) {
    case 32:
      kernel = reinterpret_cast<const void*>(&SplitPlanesKernel<32>);
      break;
    case 64:
      kernel = reinterpret_cast<const void*>(&SplitPlanesKernel<64>);
      break;
    case 128:
      kernel = reinterpret_cast<const void*>(&SplitPlanesKernel<128>);
      break;
    default:
      kernel = reinterpret_cast<const void*>(&SplitPlanesKernel<256>);
      break;
  }
  ForwardParams argument = params;
  void* arguments[] = {&argument};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks), 2), dim3(kThreads), arguments,
                          0, stream);
}

cudaError_t LaunchMergeSplits(const ForwardParams& params, cudaStream_t stream) {
  const core::Problem& p = params.problem;
  const int64_t blocks = p.batch * p.q_heads * params.partials.rows;
  if (params.partials.splits <= 1 || blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  // Its blocks come up while the last splits are at work. Only where the code for sm_90 is what
  // runs: other code has no WaitForEarlierLaunch.
  int major = 0;
  const cudaError_t error = GetDeviceAttribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const bool is_few =
      params.partials.splits <= kFewSplits && p.v_dim <= kFewColumns && p.v_dim % 4 == 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      is_few ? core::CeilDiv<int64_t>(blocks, kThreads / kWarpSize) : blocks));
  config.blockDim = dim3(is_few ? kThreads
                                : kWarpSize * static_cast<unsigned>(core::Min<int64_t>(
                                                  kMergeWarps, params.partials.splits)));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = major == 9 ? 1 : 0;
  ForwardParams argument = params;
  void* arguments[] = {&argument};
  constexpr int kMostColumns = kMaxHeadDim / 32;
  const void* kernel = p.v_dim <= kMaxHeadDim / 2 ? MergeKernel<kMostColumns / 2>(params)
                                                  : MergeKernel<kMostColumns>(params);
  if (is_few) kernel = reinterpret_cast<const void*>(&MergeFewSplitsKernel);
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace tandem::cuda
