// The end of a warp's rows in the forward kernel: normalised outputs on their way from registers
// to device memory.
#ifndef TANDEM_BACKEND_CUDA_WARP_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_WARP_OUTPUT_CUH_

#include "backend_cuda/row_output.cuh"
#include "backend_cuda/warp_attention.cuh"

namespace tandem::cuda {

// Where chunk `chunk` of 8 normalised f32 columns of a warp's row `n` lies before it is stored.
// Rows of a fragment lie in different banks.
template <int kHeadDim>
__device__ __forceinline__ float* OutputChunk(char* place, int n, int chunk) {
  constexpr int kChunks = kHeadDim / 8;
  const int swizzled = chunk ^ (n & (core::Min(kChunks, 8) - 1));
  return reinterpret_cast<float*>(place) + (n * kChunks + swizzled) * 8;
}

// Writes rows [first_row, first_row + 16 * kRowTiles) of a sequence and head, as far as they are
// the tensor's. scale: of the warp's maxima; place: shared memory for the rows in f32.
template <DType kDType, int kHeadDim, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void WriteWarpRows(
    const Problem& problem, const Sequence& s, int64_t head, int64_t first_row, float scale,
    WarpAttention<kDType, kHeadDim, kRowTiles, kKeyTiles>& warp, char* place) {
  using Warp = WarpAttention<kDType, kHeadDim, kRowTiles, kKeyTiles>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kWarpRows = 16 * kRowTiles;
  const int lane = threadIdx.x % kWarpSize;
  warp.FinishSums();
  // Each of the four lanes that share rows finishes one of them.
  const int own = lane & 3;
  float maximum = 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (own != 2 * m + r) continue;
      maximum = warp.maximum[m][r];
      sum = warp.sum[m][r];
    }
  }
  RowEnd end = {0.0f, true, 0.0f};
  const int64_t own_row = first_row + 8 * own + (lane >> 2);
  if (own < 2 * kRowTiles && own_row < s.q_rows) {
    end = FinishRow(problem, s, head, own_row, maximum * scale, sum);
    StoreLse(problem, s, head, own_row, end.Lse());
  }
  const uint32_t are_empty = __ballot_sync(~0u, end.is_empty);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = Warp::LaneRow(m, r);
      const int owner = (lane & ~3) | (2 * m + r);
      const float factor = __shfl_sync(~0u, end.factor, owner);
      const bool is_empty = (are_empty >> owner & 1u) != 0;
#pragma unroll
      for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
        const float low = warp.output[m][chunk][2 * r] * factor;
        const float high = warp.output[m][chunk][2 * r + 1] * factor;
        *reinterpret_cast<float2*>(OutputChunk<kHeadDim>(place, n, chunk) + 2 * (lane & 3)) =
            is_empty ? make_float2(0.0f, 0.0f) : make_float2(low, high);
      }
    }
  }
  __syncwarp();
  const Array4& out = problem.out;
  const int64_t offset = core::QueryOffset(out, s, head, first_row);
  const int rows = static_cast<int>(core::Clamp<int64_t>(s.q_rows - first_row, 0, kWarpRows));
  const bool is_vector =
      out.dtype != DType::kF32 && out.column_stride == 1 && problem.v_dim % 8 == 0 &&
      out.row_stride % 8 == 0 &&
      reinterpret_cast<uintptr_t>(static_cast<uint16_t*>(out.data) + offset) % 16 == 0;
  if (is_vector) {
    constexpr int kPassRows = kWarpSize / kChunks;
    const int chunk = lane % kChunks;
    if (8 * chunk >= problem.v_dim) return;
    uint16_t* to =
        static_cast<uint16_t*>(out.data) + offset + lane / kChunks * out.row_stride + 8 * chunk;
#pragma unroll 4
    for (int n = lane / kChunks; n < rows; n += kPassRows) {
      const float4* from = reinterpret_cast<const float4*>(OutputChunk<kHeadDim>(place, n, chunk));
      const float4 low = from[0];
      const float4 high = from[1];
      *reinterpret_cast<uint4*>(to) = make_uint4(
          PackPair<kMathType<kDType>>(low.x, low.y), PackPair<kMathType<kDType>>(low.z, low.w),
          PackPair<kMathType<kDType>>(high.x, high.y), PackPair<kMathType<kDType>>(high.z, high.w));
      to += kPassRows * out.row_stride;
    }
    return;
  }
  for (int n = 0; n < rows; ++n) {
    for (int column = lane; column < problem.v_dim; column += kWarpSize) {
      StoreElement(out.data, out.dtype, offset + n * out.row_stride + column * out.column_stride,
                   OutputChunk<kHeadDim>(place, n, column / 8)[column % 8]);
    }
  }
}

// Writes rows [begin, end) of a sequence and head that see nothing, with all warps of the block.
__device__ __forceinline__ void WriteEmptyRows(const Problem& problem, const Sequence& s,
                                               int64_t head, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t row = begin + threadIdx.x / kWarpSize; row < end; row += blockDim.x / kWarpSize) {
    for (int64_t column = lane; column < problem.v_dim; column += kWarpSize) {
      StoreOutput(problem, s, head, row, column, 0.0f);
    }
    if (lane == 0) StoreLse(problem, s, head, row, core::NegativeInfinity());
  }
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_WARP_OUTPUT_CUH_
