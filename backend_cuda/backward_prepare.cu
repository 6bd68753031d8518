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

// One block per 64 rows of a sequence and head; a row has one thread for each eight columns.
// kIsQueries: Q and dO, with the rows' statistics; else K and V.
template <DType kDType, int kHeadDim, bool kIsQueries>
__global__ void __launch_bounds__(kThreads)
    PrepareKernel(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim / 8;
  constexpr int kPassRows = kThreads / kLanes;
  constexpr int kRowElements = (kDType == DType::kF32 ? 3 : 1) * kHeadDim;
  const Problem& p = params.problem;
  const GradientPlanes& planes = kIsQueries ? params.queries : params.keys;
  const int64_t heads = kIsQueries ? p.q_heads : p.kv_heads;
  const int64_t tile = blockIdx.x % planes.words;
  const int64_t head = blockIdx.x / planes.words % heads;
  const int64_t batch = blockIdx.x / planes.words / heads;
  int32_t status = 0;
  const Sequence s = core::ResolveSequence(p, batch, &status);
  if (threadIdx.x == 0 && status != 0 && head == 0 && tile == 0 && p.device_status != nullptr) {
    atomicOr(p.device_status, status);
  }
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

template <DType kDType, int kHeadDim>
cudaError_t LaunchPrepareOf(BackwardParams params, cudaStream_t stream) {
  const Problem& p = params.problem;
  const int64_t query_blocks = p.batch * p.q_heads * params.queries.words;
  const int64_t key_blocks = p.batch * p.kv_heads * params.keys.words;
  if (core::Max(query_blocks, key_blocks) > INT32_MAX) return cudaErrorInvalidConfiguration;
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

template <DType kDType>
cudaError_t LaunchPrepareType(const BackwardParams& params, cudaStream_t stream) {
  switch (GradientHeadDim(core::Max(params.problem.qk_dim, params.problem.v_dim))) {
    case 64:
      return LaunchPrepareOf<kDType, 64>(params, stream);
    case 128:
      return LaunchPrepareOf<kDType, 128>(params, stream);
    default:
      return LaunchPrepareOf<kDType, 256>(params, stream);
  }
}

}  // namespace

cudaError_t LaunchPrepareGradients(const BackwardParams& params, cudaStream_t stream) {
  switch (GradientMath(params.problem)) {
    case DType::kF16:
      return LaunchPrepareType<DType::kF16>(params, stream);
    case DType::kBF16:
      return LaunchPrepareType<DType::kBF16>(params, stream);
    default:
      return LaunchPrepareType<DType::kF32>(params, stream);
  }
}

}  // namespace tandem::cuda
