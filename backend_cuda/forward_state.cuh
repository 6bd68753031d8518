// What the threads of a block of the forward kernel share, and how it tells which pairs a key tile
// hides.
#ifndef TANDEM_BACKEND_CUDA_FORWARD_STATE_CUH_
#define TANDEM_BACKEND_CUDA_FORWARD_STATE_CUH_

#include "backend_cuda/tile_staging.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda {

// What hides pairs of a listed tile: row intervals, other structured terms, the dense term.
inline constexpr int kIntervalPart = 1;
inline constexpr int kStructuredPart = 2;
inline constexpr int kDensePart = 4;
inline constexpr int kHiddenMask = kIntervalPart | kStructuredPart | kDensePart;
// What the split planes of f32 cannot serve, of a listed tile.
inline constexpr int kFlaggedKeys = 8;
inline constexpr int kFlaggedValues = 16;
// The tile reaches beyond the last key.
inline constexpr int kCut = 32;
inline constexpr int kPropertyBits = 6;

// The keys that the rows of a block see where the structured terms are lengths and bands without a
// prefix: row n of the block sees those in [max(begin, n + band_begin), min(end, n + band_end)), if
// n < rows.
struct RowIntervals {
  int64_t begin;
  int64_t end;
  int64_t band_begin;
  int64_t band_end;
  int32_t rows;        // that exist
  bool are_all_terms;  // else the other members mean nothing

  // What one of the first `count` rows sees, and what each of them does.
  __device__ __forceinline__ core::Interval Hull() const {
    const core::Interval hull = {core::Max<int64_t>(begin, band_begin),
                                 core::Min<int64_t>(end, band_end + rows - 1)};
    return rows == 0 || hull.end < hull.begin ? core::Interval{0, 0} : hull;
  }
  __device__ __forceinline__ core::Interval Common(int count) const {
    if (rows < count) return {0, 0};
    return {core::Max<int64_t>(begin, band_begin + count - 1),
            core::Max<int64_t>(core::Min<int64_t>(end, band_end), 0)};
  }
};

// Those of the rows from `first_row` on.
TANDEM_HD RowIntervals FindRowIntervals(const core::Mask& mask, const core::Sequence& s,
                                        int64_t head, int64_t first_row, int rows) {
  RowIntervals result = {0, core::LocalKeys(s), -core::kUnbounded, core::kUnbounded, 0, true};
  result.rows =
      static_cast<int32_t>(core::Clamp<int64_t>(s.q_len - s.q_offset - first_row, 0, rows));
  for (int t = 0; t < mask.band_count; ++t) {
    const core::BandTerm& band = mask.bands[t];
    const core::Interval keys = core::BandInterval(band, s, head, s.q_offset + first_row);
    result.band_begin = core::Max<int64_t>(result.band_begin, keys.begin - s.kv_offset);
    result.band_end = core::Min<int64_t>(result.band_end, keys.end - s.kv_offset);
    if (band.prefix != nullptr) result.are_all_terms = false;
  }
  if (mask.row_ranges_count + mask.segments_count + mask.block_sparse_count != 0) {
    result.are_all_terms = false;
  }
  return result;
}

// Row intervals from the view of a lane: relative to its first key of a step, whose keys are its
// bits of a word.
class LaneIntervals {
 public:
  __device__ __forceinline__ LaneIntervals(const RowIntervals& intervals, int64_t first_key)
      : begin_(Relative(intervals.begin, first_key)),
        end_(Relative(intervals.end, first_key)),
        band_begin_(Relative(intervals.band_begin, first_key)),
        band_end_(Relative(intervals.band_end, first_key)),
        rows_(intervals.rows) {}

  // The bits of a row of the block. BitsBelow: those of keys less than a number.
  template <typename BitsBelow>
  __device__ __forceinline__ uint32_t Row(int row, BitsBelow bits_below) const {
    if (row >= rows_) return 0;
    return bits_below(core::Min(end_, row + band_end_)) &
           ~bits_below(core::Max(begin_, row + band_begin_));
  }

 private:
  // A bound further off than any row and key of a step is as good as one so far.
  static __device__ __forceinline__ int Relative(int64_t key, int64_t first_key) {
    constexpr int kFar = 512;
    return static_cast<int>(core::Clamp<int64_t>(key - first_key, -kFar, kFar));
  }

  int begin_;
  int end_;
  int band_begin_;
  int band_end_;
  int rows_;
};

// What the threads of a block share beside the tiles. What is the same for all of them but not
// needed in the inner loops is here too, to spare registers.
struct alignas(16) BlockState {
  core::Sequence sequence;
  int64_t head;
  int64_t first_row;
  int64_t rows_end;
  int64_t tile_begin;  // the key tiles that these rows may see
  int64_t tile_end;
  int64_t full_begin;  // those of them that are full by the intervals
  int64_t full_end;
  RowIntervals intervals;
  RowSource keys;
  RowSource values;
  const char* bias;                 // where its tiles are staged, of the first row and key 0
  uint64_t visible_words[128];      // of the step's rows, in quad order
  const uint64_t* dense_rows[128];  // where each thread's row has its words, see DenseRow
  uint64_t query_flags[2];          // rows that the split products cannot serve (f32)
  int32_t warp_counts[4];
  // Key tiles to visit, (tile - first of the chunk) << kPropertyBits | properties, and a kCut.
  uint16_t list[128 + 1];
};

// Bytes from row to row of a staged bias tile; the padding keeps the rows of a fragment in
// different banks.
__host__ __device__ constexpr int BiasPitch(int bias_bytes) {
  return 64 * bias_bytes + (bias_bytes == 2 ? 16 : 32);
}

constexpr int ForwardSharedBytes(const TilePolicy& policy, int bias_bytes) {
  const int bias = bias_bytes == 0 ? 0 : policy.block_rows * BiasPitch(bias_bytes);
  return policy.query_bytes + 2 * policy.tile_bytes + bias + static_cast<int>(sizeof(BlockState));
}

// What a kernel is compiled for. kStructured, kHiding: terms change a score only by hiding it, and
// the scale is an ordinary number; kStructured: there is no dense term. kBias: also a bias of
// staged tiles. kAny: everything.
enum class ScoreTerms { kStructured, kHiding, kBias, kAny };

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_FORWARD_STATE_CUH_
