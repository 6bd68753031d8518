// Rows of the output in registers, on their way to memory.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_

#include "backend_cuda/hopper/forward_state.cuh"
#include "backend_cuda/tensor_core.cuh"

namespace tandem::cuda::hopper {

// Of pairs of the type.
template <DType kDType, int kWords>
static __device__ __forceinline__ bool AreFinite(const uint32_t (&words)[kWords]) {
  // Products by 0 are 0 or NaN.
  uint32_t zeros[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kWords; ++t) {
    zeros[t % 2] = MultiplyAddPair<kDType>(words[t], 0, zeros[t % 2]);
  }
  return ((zeros[0] | zeros[1]) & 0x7fff7fffu) == 0;
}

// Word t of a lane's row r of the output: elements 4 t + 2 r and the next, times `by`, rounded.
template <DType kDType, int kOutputs>
static __device__ __forceinline__ uint32_t RoundedPair(const float (&output)[kOutputs], int r,
                                                       int t, float by) {
  return PackPair<kDType>(output[4 * t + 2 * r] * by, output[4 * t + 2 * r + 1] * by);
}

// Of those of row r.
template <DType kDType, int kOutputs>
static __device__ __forceinline__ bool AreFinite(const float (&output)[kOutputs], int r, float by) {
  // Products by 0 are 0 or NaN.
  uint32_t zeros[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kOutputs / 4; ++t) {
    zeros[t % 2] = MultiplyAddPair<kDType>(RoundedPair<kDType>(output, r, t, by), 0, zeros[t % 2]);
  }
  return ((zeros[0] | zeros[1]) & 0x7fff7fffu) == 0;
}

// The lane without the bit keeps `low` and gives `high` for the other's `low`.
static __device__ __forceinline__ void Exchange(bool has_bit, int bit, uint32_t& low,
                                                uint32_t& high) {
  const uint32_t got = __shfl_xor_sync(~0u, has_bit ? low : high, bit);
  low = has_bit ? got : low;
  high = has_bit ? high : got;
}

// Lane c of a quad gets word c of each lane.
static __device__ __forceinline__ void TransposeInQuad(int lane, uint32_t& word0, uint32_t& word1,
                                                       uint32_t& word2, uint32_t& word3) {
  const bool is_odd = (lane & 1) != 0;
  const bool is_high = (lane & 2) != 0;
  Exchange(is_odd, 1, word0, word1);
  Exchange(is_odd, 1, word2, word3);
  Exchange(is_high, 2, word0, word2);
  Exchange(is_high, 2, word1, word3);
}

// words[r][t]: of row r of this lane, columns 8 t + 2 c and the next. Rows with
// bit r of `written` go to `to`, where row 0 begins, and 8 rows on; those with
// bit r of `empty` as zeros.
template <int kWords>
static __device__ __forceinline__ void StoreChunks(uint16_t* to, int64_t row_stride, int64_t dim,
                                                   int lane, uint32_t written, uint32_t empty,
                                                   uint32_t (&words)[2][kWords]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool is_empty = (empty >> r & 1) != 0;
#pragma unroll
    for (int t = 0; t < kWords; t += 4) {
      uint32_t(&x)[kWords] = words[r];
      TransposeInQuad(lane, x[t], x[t + 1], x[t + 2], x[t + 3]);
      const int column = 8 * (t + (lane & 3));
      if ((written >> r & 1) != 0 && column < dim) {
        *reinterpret_cast<uint4*>(to + 8 * r * row_stride + column) =
            is_empty ? make_uint4(0, 0, 0, 0) : make_uint4(x[t], x[t + 1], x[t + 2], x[t + 3]);
      }
    }
  }
}

// The 16 rows of a warp, all of which are written, from `first_row` of the item
// on, by way of shared memory at `rows`, in the order of a tile of kBlockRows
// rows. The copies are this warp's lane 0's.
template <int kBlockRows, int kWords>
static __device__ __forceinline__ void StoreThroughShared(uint32_t rows, int lane,
                                                          const uint32_t (&words)[2][kWords],
                                                          const CUtensorMap* map, const Item& item,
                                                          int first_row) {
  const uint32_t row = rows + (lane & 15) * 128;
#pragma unroll
  for (int t = 0; t < kWords; t += 2) {
    const int chunk = t % 8 + (lane >> 4);
    StoreMatrices(row + t / 8 * (kBlockRows * 128) + ((chunk ^ (lane & 7)) << 4), words[0][t],
                  words[1][t], words[0][t + 1], words[1][t + 1]);
  }
  PublishSharedWrites();
  __syncwarp();
  const int4 place = item.place;
  const int first = __shfl_sync(~0u, place.x + first_row, 0);
  const int head = __shfl_sync(~0u, place.y, 0);
  const int batch = __shfl_sync(~0u, place.z, 0);
  const uint32_t from = __shfl_sync(~0u, rows, 0);
  if (lane != 0) return;
#pragma unroll
  for (int part = 0; part < kWords / 8; ++part) {
    StoreBox(from + part * (kBlockRows * 128), map, 64 * part, first, head, batch);
  }
  CommitBoxes();
}

// Writes the rows `row` and `row` + 8 of an item, a lane's r = 0 and 1, times their factors. Bits
// r: those that are written, and those that are empty.
template <DType kDType, int kOutputs>
static __device__ __forceinline__ void StoreWideRows(const Problem& problem, const Item& item,
                                                     int lane, int row, uint32_t written,
                                                     uint32_t empty_rows, const float (&factor)[2],
                                                     const float (&output)[kOutputs]) {
  // Of unknown factors, so that these products are not those of AreFinite, kept until here.
  float again[2] = {factor[0], factor[1]};
  asm volatile("" : "+f"(again[0]), "+f"(again[1]));
  const core::Array4& out = problem.out;
  if (out.dtype != DType::kF32 && out.column_stride == 1 && problem.v_dim % 8 == 0 &&
      out.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(item.out) % 16 == 0) {
    uint16_t* const to = static_cast<uint16_t*>(item.out) + row * out.row_stride;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool is_empty = (empty_rows >> r & 1) != 0;
      const float by = again[r];
#pragma unroll
      for (int t = 0; t < kOutputs / 4; t += 4) {
        const auto word = [&](int n) { return RoundedPair<kDType>(output, r, t + n, by); };
        uint4 x = make_uint4(word(0), word(1), word(2), word(3));
        TransposeInQuad(lane, x.x, x.y, x.z, x.w);
        const int column = 8 * (t + (lane & 3));
        if ((written >> r & 1) != 0 && column < problem.v_dim) {
          *reinterpret_cast<uint4*>(to + 8 * r * out.row_stride + column) =
              is_empty ? make_uint4(0, 0, 0, 0) : x;
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int r = i / 2 % 2;
    const int column = 8 * (i / 4) + 2 * (lane & 3) + i % 2;
    const float value = (empty_rows >> r & 1) != 0 ? 0.0f : output[i] * again[r];
    if ((written >> r & 1) != 0 && column < problem.v_dim) {
      StoreElement(item.out, out.dtype, (row + 8 * r) * out.row_stride + column * out.column_stride,
                   value);
    }
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
