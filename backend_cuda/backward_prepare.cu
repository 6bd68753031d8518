// Before the kernels that multiply (backward_kernel.cuh): planes of Q, K, V and dO, flags, and the
// statistics of rows.
#include "backend_cuda/backward.h"
#include "backend_cuda/backward_terms.cuh"

namespace tandem::cuda {
namespace {

constexpr int kThreads = 128;

// Eight columns of a row as f32; zeros beyond `columns`.
__device__ __forceinline__ void LoadColumns(const Array4& array, int64_t offset, int64_t columns,
                                            float (&x)[8]) {
  if (array.dtype != DType::kF32 && array.column_stride == 1 && columns >= 8) {
    const uint16_t* from = static_cast<const uint16_t*>(array.data) + offset;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(from);
      const uint32_t pairs[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const bool is_f16 = array.dtype == DType::kF16;
        x[2 * n] = is_f16 ? UnpackLow<DType::kF16>(pairs[n]) : UnpackLow<DType::kBF16>(pairs[n]);
        x[2 * n + 1] =
            is_f16 ? UnpackHigh<DType::kF16>(pairs[n]) : UnpackHigh<DType::kBF16>(pairs[n]);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    x[e] =
        e < columns ? LoadElement(array.data, array.dtype, offset + e * array.column_stride) : 0.0f;
  }
}

// An f32 as the sum of three bf16. The first part of a number near the largest is cut off rather
// than rounded, which could make it infinite.
__device__ __forceinline__ void SplitFloat(float x, float (&part)[3]) {
  const uint32_t bits = core::FloatToBits(x);
  part[0] = (bits & 0x7fffffffu) >= 0x7f000000u
                ? core::BitsToFloat(bits & 0xffff0000u)
                : core::Bf16ToFloat(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
  part[1] = core::Bf16ToFloat(__bfloat16_as_ushort(__float2bfloat16_rn(x - part[0])));
  part[2] = x - part[0] - part[1];
}

// Whether products with such an element are computed apart.
template <DType kDType>
__device__ __forceinline__ bool IsFlagged(float x) {
  return kDType == DType::kF32 ? OverflowsSplit(x) : !core::IsFinite(x);
}

// Writes eight columns of a row's planes. What is not finite becomes 0.
template <DType kDType, int kHeadDim>
__device__ __forceinline__ void StoreColumns(const float (&x)[8], uint16_t* row, int column) {
  constexpr DType kType = kMathType<kDType>;
  float part[3][8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float finite = core::IsFinite(x[e]) ? x[e] : 0.0f;
    if constexpr (kDType == DType::kF32) {
      float split[3];
      SplitFloat(finite, split);
#pragma unroll
      for (int n = 0; n < 3; ++n) part[n][e] = split[n];
    } else {
      part[0][e] = finite;
    }
  }
#pragma unroll
  for (int n = 0; n < (kDType == DType::kF32 ? 3 : 1); ++n) {
    StoreChunk(reinterpret_cast<char*>(row + n * kHeadDim + column),
               PackPair<kType>(part[n][0], part[n][1]), PackPair<kType>(part[n][2], part[n][3]),
               PackPair<kType>(part[n][4], part[n][5]), PackPair<kType>(part[n][6], part[n][7]));
  }
}

// 64 rows of a sequence and head.
struct RowTile {
  Sequence sequence;
  int64_t head;
  int64_t tile;
};

// kIsQueries: Q and dO, with the rows' statistics; else K and V.
template <bool kIsQueries>
__device__ __forceinline__ RowTile TileOf(const BackwardParams& params, int64_t block) {
  const Problem& p = params.problem;
  const int64_t words = kIsQueries ? params.queries.words : params.keys.words;
  const int64_t heads = kIsQueries ? p.q_heads : p.kv_heads;
  int32_t status = 0;
  RowTile tile = {};
  tile.sequence = core::ResolveSequence(p, block / words / heads, &status);
  tile.head = block / words % heads;
  tile.tile = block % words;
  if (threadIdx.x == 0 && status != 0 && tile.head == 0 && tile.tile == 0 &&
      p.device_status != nullptr) {
    atomicOr(p.device_status, status);
  }
  return tile;
}

// A row has one thread for each eight columns.
template <DType kDType, int kHeadDim, bool kIsQueries>
__device__ __forceinline__ void PrepareTile(const BackwardParams& params, const RowTile& of) {
  constexpr int kLanes = kHeadDim / 8;
  constexpr int kPassRows = kThreads / kLanes;
  constexpr int kRowElements = (kDType == DType::kF32 ? 3 : 1) * kHeadDim;
  const Problem& p = params.problem;
  const GradientPlanes& planes = kIsQueries ? params.queries : params.keys;
  const Sequence& s = of.sequence;
  const int64_t head = of.head;
  const int64_t tile = of.tile;
  const int64_t rows = kIsQueries ? s.q_rows : s.kv_rows;
  __shared__ unsigned long long flags[3];
  if (threadIdx.x < 3) flags[threadIdx.x] = 0;
  __syncthreads();
  const int64_t word = kIsQueries ? QueryFlagWord(params, s, head, tile * core::kTile)
                                  : KeyFlagWord(params, s, head, tile * core::kTile);
  const bool is_needed = tile * core::kTile < core::RoundUp(rows, kPlaneRows);
  const int64_t plane_row =
      kIsQueries ? QueryPlaneRow(params, s, head) : KeyPlaneRow(params, s, head);
  const Array4& first = kIsQueries ? p.q : p.k;
  const Array4& second = kIsQueries ? p.dout : p.v;
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  // A second time over where it turns out that the planes are needed.
  bool writes_planes = params.reads_tensors == 0;
  bool in_planes = true;
  bool has_large = false;
  for (bool is_done = false; !is_done;) {
    bool is_large = false;
    bool is_ordinary = true;  // of this thread's rows: they are there, and finite
    for (int n = static_cast<int>(threadIdx.x) / kLanes; is_needed && n < core::kTile;
         n += kPassRows) {
      const int64_t row = tile * core::kTile + n;
      bool exists = row < rows;
      float lse = core::NegativeInfinity();
      int64_t first_offset = 0;
      int64_t second_offset = 0;
      if constexpr (kIsQueries) {
        exists = exists && core::RowExists(s, row);
        if (exists) {
          lse = static_cast<const float*>(p.lse.data)[core::QueryOffset(p.lse, s, head, row)];
        }
        exists = exists && !core::GradientRowIsEmpty(lse);
        first_offset = core::QueryOffset(first, s, head, row);
        second_offset = core::QueryOffset(second, s, head, row);
      } else {
        exists = exists && row < core::LocalKeys(s);
        first_offset = core::KeyOffset(first, s, head, row);
        second_offset = core::KeyOffset(second, s, head, row);
      }
      float x[8] = {};
      float y[8] = {};
      float dot = 0.0f;
      if (exists) {
        LoadColumns(first, first_offset + column * first.column_stride, p.qk_dim - column, x);
        LoadColumns(second, second_offset + column * second.column_stride, p.v_dim - column, y);
        if constexpr (kIsQueries) {
          float out[8];
          LoadColumns(p.out, core::QueryOffset(p.out, s, head, row) + column * p.out.column_stride,
                      p.v_dim - column, out);
#pragma unroll
          for (int e = 0; e < 8; ++e) dot = fmaf(y[e], out[e], dot);
        }
      }
      if (writes_planes) {
        StoreColumns<kDType, kHeadDim>(x, planes.first + (plane_row + row) * kRowElements, column);
        StoreColumns<kDType, kHeadDim>(y, planes.second + (plane_row + row) * kRowElements, column);
      }
      int found = 0;  // bit 0: in x, bit 1: in y, bit 2: not finite in y, bit 3: not finite in x
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        found |= static_cast<int>(IsFlagged<kDType>(x[e])) |
                 static_cast<int>(IsFlagged<kDType>(y[e])) << 1 |
                 static_cast<int>(!core::IsFinite(y[e])) << 2 |
                 static_cast<int>(!core::IsFinite(x[e])) << 3;
      }
      is_ordinary = is_ordinary && exists && found == 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) is_large = is_large || fabsf(y[e]) >= 0x1p59f;
      if constexpr (kIsQueries) {
#pragma unroll
        for (int lanes = 1; lanes < kLanes; lanes *= 2) {
          dot += __shfl_xor_sync(~0u, dot, lanes);
          found |= __shfl_xor_sync(~0u, found, lanes);
        }
        if (column == 0) {
          constexpr float kUnit = kDType == DType::kF32 ? 1.0f : core::kLog2e;
          RowStatistics statistics = {core::BitsToFloat(0x7f800000u), 0.0f};
          if (exists) {
            const bool is_lost = kDType != DType::kF32 && (found & 8) != 0;
            // The products of 16-bit rows that are not finite are NaN.
            if (is_lost) lse = core::BitsToFloat(0x7fffffffu);
            statistics.lse = params.is_plain != 0 ? lse * kUnit : lse;
            statistics.offset = dot;
            if (p.dlse.data != nullptr) {
              statistics.offset -=
                  static_cast<const float*>(p.dlse.data)[core::QueryOffset(p.dlse, s, head, row)];
            }
            if (kDType != DType::kF32 && (found & 4) != 0) {
              statistics.offset = core::BitsToFloat(0x7fffffffu);
            }
            // Too large for base 2: PatchPair.
            if (core::IsFinite(lse) && !core::IsFinite(statistics.lse)) {
              statistics.lse = 0.0f;
              found |= 1;
            }
          }
          if (params.intervals != nullptr) {
            core::Interval keys = {0, 0};
            if (row < rows && core::RowExists(s, row)) {
              keys = core::VisibleKeys(p.mask, s, head, row);
            }
            params.intervals[plane_row + row] = {static_cast<int32_t>(keys.begin),
                                                 static_cast<int32_t>(keys.end)};
          }
          params.statistics[plane_row + row] = statistics;
          params.lse[plane_row + row] = lse;
        }
      }
#pragma unroll
      for (int bit = 0; bit < 3; ++bit) {
        if ((found >> bit & 1) != 0) atomicOr(&flags[bit], 1ull << n);
      }
    }
    in_planes = __syncthreads_and(is_ordinary) == 0;
    has_large = __syncthreads_or(is_large) != 0;
    is_done = writes_planes || !in_planes;
    writes_planes = true;
  }
  if (threadIdx.x != 0) return;
  planes.notes[word] = static_cast<uint8_t>(
      (params.reads_tensors == 0 || in_planes ? kInPlanes : 0) | (has_large ? kHasLarge : 0));
  planes.first_flags[word] = flags[0];
  planes.second_flags[word] = flags[1];
  if constexpr (kIsQueries) params.non_finite[word] = flags[2];
}

// One block per tile.
template <DType kDType, int kHeadDim, bool kIsQueries>
__global__ void __launch_bounds__(kThreads)
    PrepareKernel(const __grid_constant__ BackwardParams params) {
  PrepareTile<kDType, kHeadDim, kIsQueries>(params, TileOf<kIsQueries>(params, blockIdx.x));
}

// ---- where tensors are read in place ----

template <DType kDType, int kHeadDim, bool kIsQueries>
__device__ __noinline__ void PrepareUnusualTile(const BackwardParams& params, const RowTile& of) {
  PrepareTile<kDType, kHeadDim, kIsQueries>(params, of);
}

// Whether rows are whole chunks of eight elements of 16 bits.
__device__ __forceinline__ bool HasChunks(const Array4& array, DType dtype, int64_t columns) {
  const int64_t strides = array.batch_stride | array.head_stride | array.row_stride;
  return array.dtype == dtype && array.column_stride == 1 && strides % 8 == 0 && columns % 8 == 0 &&
         reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
}

// The larger magnitudes of pairs, by their bits.
__device__ __forceinline__ uint32_t LargerBits(uint32_t most, const uint4& chunk) {
  const uint32_t a = __vmaxu2(chunk.x & 0x7fff7fffu, chunk.y & 0x7fff7fffu);
  const uint32_t b = __vmaxu2(chunk.z & 0x7fff7fffu, chunk.w & 0x7fff7fffu);
  return __vmaxu2(most, __vmaxu2(a, b));
}
__device__ __forceinline__ uint32_t LargestBits(uint32_t pair) {
  return core::Max(pair & 0xffffu, pair >> 16);
}

template <DType kDType>
__device__ __forceinline__ float DotProduct(const uint4& a, const uint4& b) {
  const uint32_t x[] = {a.x, a.y, a.z, a.w};
  const uint32_t y[] = {b.x, b.y, b.z, b.w};
  float dot = 0.0f;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    dot = fmaf(UnpackLow<kDType>(x[n]), UnpackLow<kDType>(y[n]), dot);
    dot = fmaf(UnpackHigh<kDType>(x[n]), UnpackHigh<kDType>(y[n]), dot);
  }
  return dot;
}

// As PrepareTile, with many loads in flight, for tiles whose rows are all there and ordinary.
// False, and nothing written, for others.
template <DType kDType, int kHeadDim, bool kIsQueries>
__device__ __forceinline__ bool PrepareUsualTile(const BackwardParams& params, const RowTile& of) {
  constexpr int kLanes = kHeadDim / 8;
  constexpr int kPassRows = kThreads / kLanes;
  constexpr int kPasses = 4;  // whose loads are in flight together
  static_assert(core::kTile % (kPasses * kPassRows) == 0);
  constexpr uint32_t kInfinityBits = kDType == DType::kF16 ? 0x7c00u : 0x7f80u;
  constexpr uint32_t kLargeBits = kDType == DType::kF16 ? kInfinityBits : 0x5d00u;  // 2^59
  const Problem& p = params.problem;
  const Sequence& s = of.sequence;
  const Array4& first = kIsQueries ? p.q : p.k;
  const Array4& second = kIsQueries ? p.dout : p.v;
  const int64_t first_row = of.tile * core::kTile;
  const int64_t rows = kIsQueries ? core::Min(s.q_rows, s.q_len - s.q_offset) : core::LocalKeys(s);
  if (first_row + core::kTile > rows || !HasChunks(first, kDType, p.qk_dim) ||
      !HasChunks(second, kDType, p.v_dim) || (kIsQueries && !HasChunks(p.out, kDType, p.v_dim))) {
    return false;
  }
  const auto offset = [&](const Array4& array, int64_t row) {
    return kIsQueries ? core::QueryOffset(array, s, of.head, row)
                      : core::KeyOffset(array, s, of.head, row);
  };
  const auto chunk = [](const Array4& array, int64_t at) {
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(array.data) + at));
  };
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int pass_row = static_cast<int>(threadIdx.x) / kLanes;
  const bool has_first = lane * 8 < p.qk_dim;
  const bool has_second = lane * 8 < p.v_dim;
  __shared__ float dots[core::kTile];
  float lse = 0.0f;
  if (kIsQueries && threadIdx.x < core::kTile) {
    lse = static_cast<const float*>(p.lse.data)[offset(p.lse, first_row + threadIdx.x)];
  }
  uint32_t most_first = 0;
  uint32_t most_second = 0;
#pragma unroll 1
  for (int pass = pass_row; pass < core::kTile; pass += kPasses * kPassRows) {
    uint4 a[kPasses] = {};
    uint4 b[kPasses] = {};
    uint4 out[kPasses] = {};
#pragma unroll
    for (int n = 0; n < kPasses; ++n) {
      const int64_t row = first_row + pass + n * kPassRows;
      if (has_first) a[n] = chunk(first, offset(first, row) + lane * 8);
      if (has_second) {
        b[n] = chunk(second, offset(second, row) + lane * 8);
        if (kIsQueries) out[n] = chunk(p.out, offset(p.out, row) + lane * 8);
      }
    }
#pragma unroll
    for (int n = 0; n < kPasses; ++n) {
      most_first = LargerBits(most_first, a[n]);
      most_second = LargerBits(most_second, b[n]);
      if constexpr (kIsQueries) {
        float dot = DotProduct<kDType>(b[n], out[n]);
#pragma unroll
        for (int lanes = 1; lanes < kLanes; lanes *= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
        if (lane == 0) dots[pass + n * kPassRows] = dot;
      }
    }
  }
  most_second = LargestBits(most_second);
  // One that is too large for base 2 is not usual either.
  const bool is_usual = LargestBits(most_first) < kInfinityBits && most_second < kInfinityBits &&
                        core::IsFinite(lse * core::kLog2e);
  if (__syncthreads_and(is_usual) == 0) return false;
  const bool has_large = __syncthreads_or(most_second >= kLargeBits) != 0;
  const GradientPlanes& planes = kIsQueries ? params.queries : params.keys;
  const int64_t word = kIsQueries ? QueryFlagWord(params, s, of.head, first_row)
                                  : KeyFlagWord(params, s, of.head, first_row);
  if (kIsQueries && threadIdx.x < core::kTile) {
    const int64_t row = first_row + threadIdx.x;
    const int64_t plane_row = QueryPlaneRow(params, s, of.head) + row;
    float offset_of_row = dots[threadIdx.x];
    if (p.dlse.data != nullptr) {
      offset_of_row -= static_cast<const float*>(p.dlse.data)[offset(p.dlse, row)];
    }
    params.statistics[plane_row] = {lse * core::kLog2e, offset_of_row};
    params.lse[plane_row] = lse;
    if (params.intervals != nullptr) {
      const core::Interval keys = core::VisibleKeys(p.mask, s, of.head, row);
      params.intervals[plane_row] = {static_cast<int32_t>(keys.begin),
                                     static_cast<int32_t>(keys.end)};
    }
  }
  if (threadIdx.x == 0) {
    planes.notes[word] = has_large ? kHasLarge : 0;
    planes.first_flags[word] = planes.second_flags[word] = 0;
    if (kIsQueries) params.non_finite[word] = 0;
  }
  return true;
}

// Zeros for the sums of a tile's rows, which follow the workspace, and for the count behind them.
template <int kHeadDim>
__device__ __forceinline__ void ClearSums(const BackwardParams& params, const RowTile& of) {
  const Problem& p = params.problem;
  float* const sums = reinterpret_cast<float*>(params.rest);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const int64_t batch = core::IsPacked(p) ? 1 : p.batch;
    sums[batch * p.q_heads * params.queries.rows * kHeadDim] = 0.0f;
  }
  if (of.tile * core::kTile >= core::RoundUp(of.sequence.q_rows, kPlaneRows)) return;
  float4* const rows = reinterpret_cast<float4*>(
      sums + (QueryPlaneRow(params, of.sequence, of.head) + of.tile * core::kTile) * kHeadDim);
#pragma unroll
  for (int n = 0; n < core::kTile * kHeadDim / 4; n += kThreads) {
    __stcs(rows + n + threadIdx.x, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
}

// One block per tile, those of the queries first.
template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    PrepareInPlaceKernel(const __grid_constant__ BackwardParams params, unsigned query_blocks) {
  if (blockIdx.x < query_blocks) {
    const RowTile tile = TileOf<true>(params, blockIdx.x);
    ClearSums<kHeadDim>(params, tile);
    if (!PrepareUsualTile<kDType, kHeadDim, true>(params, tile)) {
      PrepareUnusualTile<kDType, kHeadDim, true>(params, tile);
    }
  } else {
    const RowTile tile = TileOf<false>(params, blockIdx.x - query_blocks);
    if (!PrepareUsualTile<kDType, kHeadDim, false>(params, tile)) {
      PrepareUnusualTile<kDType, kHeadDim, false>(params, tile);
    }
  }
}

template <DType kDType, int kHeadDim>
cudaError_t LaunchPrepareOf(BackwardParams params, cudaStream_t stream) {
  const Problem& p = params.problem;
  const int64_t query_blocks = p.batch * p.q_heads * params.queries.words;
  const int64_t key_blocks = p.batch * p.kv_heads * params.keys.words;
  if (core::Max(query_blocks, key_blocks) > INT32_MAX) return cudaErrorInvalidConfiguration;
  if constexpr (kDType != DType::kF32 && kHeadDim <= 128) {
    if (params.reads_tensors != 0 && query_blocks > 0) {
      if (query_blocks + key_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
      auto queries = static_cast<unsigned>(query_blocks);
      void* arguments[] = {&params, &queries};
      return cudaLaunchKernel(
          reinterpret_cast<const void*>(&PrepareInPlaceKernel<kDType, kHeadDim>),
          dim3(static_cast<unsigned>(query_blocks + key_blocks)), dim3(kThreads), arguments, 0,
          stream);
    }
  }
  void* arguments[] = {&params};
  if (query_blocks > 0) {
    const cudaError_t error = cudaLaunchKernel(
        reinterpret_cast<const void*>(&PrepareKernel<kDType, kHeadDim, true>),
        dim3(static_cast<unsigned>(query_blocks)), dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  if (key_blocks == 0) return cudaSuccess;
  return cudaLaunchKernel(reinterpret_cast<const void*>(&PrepareKernel<kDType, kHeadDim, false>),
                          dim3(static_cast<unsigned>(key_blocks)), dim3(kThreads), arguments, 0,
                          stream);
}

}  // namespace

cudaError_t LaunchPrepareGradients(const BackwardParams& params, cudaStream_t stream) {
  return LaunchForPlanes(params.problem, [&]<DType kDType, int kHeadDim>() {
    return LaunchPrepareOf<kDType, kHeadDim>(params, stream);
  });
}

}  // namespace tandem::cuda
