// Segments as a warp that loads finds out what they hide: which tiles have pairs of one segment,
// and what a row sees of 64 keys. All lanes of the warp take part.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SEGMENTS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SEGMENTS_CUH_

#include "backend_cuda/hopper/backward_visibility.cuh"

namespace tandem::cuda::hopper {

// Whether segments are looked at beside the intervals that other terms leave.
__device__ __forceinline__ bool HasSegments(const BackwardParams& base) {
  return base.problem.mask.segments_count != 0 && base.intervals != nullptr;
}

// Local rows [first, end) of one side.
struct SegmentRows {
  int first;
  int end;
};
struct SegmentRange {
  int least;
  int most;

  __device__ __forceinline__ bool IsOne() const { return least == most; }
};

template <bool kKeys>
__device__ __forceinline__ int SegmentOf(const core::SegmentsTerm& term, const Sequence& s,
                                         int row) {
  return kKeys ? core::KeySegment(term, s, s.kv_offset + row)
               : core::QuerySegment(term, s, s.q_offset + row);
}

template <bool kKeys>
__device__ __forceinline__ SegmentRange RangeOfSegments(const core::SegmentsTerm& term,
                                                        const Sequence& s, SegmentRows rows,
                                                        int lane) {
  SegmentRange range = {INT32_MAX, INT32_MIN};
#pragma unroll 2
  for (int row = rows.first + lane; row < rows.end; row += kWarpSize) {
    const int segment = SegmentOf<kKeys>(term, s, row);
    range.least = core::Min(range.least, segment);
    range.most = core::Max(range.most, segment);
  }
  return {__reduce_min_sync(~0u, range.least), __reduce_max_sync(~0u, range.most)};
}

// Of the tiles from `tile` on, one for each lane, by steps of kRows rows: what is known of them but
// for segments (kNoTile, or properties), and then with those. kept: the rows that are kept.
template <bool kKeepsKeys, int kRows>
__device__ __forceinline__ uint32_t WithSegments(const BackwardParams& base, const Sequence& s,
                                                 SegmentRows kept, int tile, uint32_t mine,
                                                 int lane) {
  const int keys = static_cast<int>(core::LocalKeys(s));
  const int queries = ExistingRows(s);
  kept.end = core::Min(kept.end, kKeepsKeys ? keys : queries);
#pragma unroll 1
  for (int t = 0; t < base.problem.mask.segments_count; ++t) {
    const core::SegmentsTerm& term = base.problem.mask.segments[t];
    const SegmentRange of_kept = RangeOfSegments<kKeepsKeys>(term, s, kept, lane);
#pragma unroll 1
    for (uint32_t left = __ballot_sync(~0u, mine != kNoTile); left != 0; left &= left - 1) {
      const int n = __ffs(static_cast<int>(left)) - 1;
      const int first = (tile + n) * kRows;
      const SegmentRange others = RangeOfSegments<!kKeepsKeys>(
          term, s, {first, core::Min(first + kRows, kKeepsKeys ? queries : keys)}, lane);
      if (lane != n) continue;
      // Queries of a negative segment see nothing.
      const int most_shared = core::Min(of_kept.most, others.most);
      if (most_shared < 0 || most_shared < core::Max(of_kept.least, others.least)) {
        mine = kNoTile;
      } else if (!of_kept.IsOne() || !others.IsOne()) {
        mine |= StepTile::kStructuredPart;
      }
    }
  }
  return mine;
}

// What a row sees of 64 keys from local key `key` on, which is the same for all lanes; in quad
// order.
__device__ __forceinline__ uint64_t SegmentWord(const BackwardParams& base, const Sequence& s,
                                                int row, int key, int lane) {
  const bool exists = row < ExistingRows(s);
  uint32_t halves[2] = {~0u, ~0u};
#pragma unroll 1
  for (int t = 0; t < base.problem.mask.segments_count; ++t) {
    const core::SegmentsTerm& term = base.problem.mask.segments[t];
    const int mine = exists ? SegmentOf<false>(term, s, row) : -1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = key + half * kWarpSize + lane;
      const int of_key = from < core::LocalKeys(s) ? SegmentOf<true>(term, s, from) : -1;
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < kWarpSize; ++n) {
        if (__shfl_sync(~0u, of_key, n) == mine) bits |= 1u << n;
      }
      halves[half] &= mine < 0 ? 0u : bits;
    }
  }
  return core::ToQuadOrder(halves[0] | uint64_t{halves[1]} << 32);
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SEGMENTS_CUH_
