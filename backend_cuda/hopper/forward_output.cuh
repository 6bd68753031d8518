// Rows of the output in registers, on their way to memory.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

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
                                                          const CUtensorMap* map,
                                                          const Problem& problem, const Item& item,
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
  if (lane != 0) return;
  const Sequence& s = item.sequence;
#pragma unroll
  for (int part = 0; part < kWords / 8; ++part) {
    StoreBox(rows + part * (kBlockRows * 128), map, 64 * part,
             static_cast<int>(s.q_start + item.first_row) + first_row, static_cast<int>(item.head),
             BatchIndex(problem, s));
  }
  CommitBoxes();
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_OUTPUT_CUH_
