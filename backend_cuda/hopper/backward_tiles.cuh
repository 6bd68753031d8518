// The tiles that a block of the backward pass visits.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_TILES_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_TILES_CUH_

#include "backend_cuda/hopper/backward_segments.cuh"

namespace tandem::cuda::hopper {

// One warp's view of the tiles of a block.
template <GradientSide kSide, GradientTerms kTerms = GradientTerms::kFewest>
class GradientTiles {
 public:
  static constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  static constexpr bool kEveryMask = ServesEveryMask(kTerms);

  __device__ GradientTiles(const BackwardParams& base, const KeptBlock& block)
      : base_(base),
        problem_(base.problem),
        s_(block.sequence),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_(static_cast<int>(block.first_row)),
        existing_rows_(ExistingRows(s_)) {}

 protected:
  // Before the tiles of a block are listed. head: of the rows that are kept.
  __device__ __forceinline__ void FindKeptFlags(int64_t head) {
    has_kept_flags_ =
        kKeepsKeys ? HasKeyFlags(head, first_, kKeptRows) : HasQueryFlags(head, first_, kKeptRows);
  }

  // Calls visit(tile) for each tile of a query head that has visible pairs, first rows first.
  template <typename Visit>
  __device__ __forceinline__ void ListHead(int64_t head, int64_t kv_head, const Visit& visit) {
    query_row_ = static_cast<int>(QueryPlaneRow(base_, s_, head));
    key_row_ = static_cast<int>(KeyPlaneRow(base_, s_, kv_head));
    int begin = 0;
    int end = existing_rows_;
    if (!kKeepsKeys) {
      FindSteps<kEveryMask, kStepRows>(base_, RowsOf(head), first_, kKeptRows, begin, end);
    }
    end = core::CeilDiv(end, kStepRows);
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWarpSize) {
      uint32_t mine = tile + lane_ < end ? Properties(head, kv_head, tile + lane_) : kNoTile;
      if (kEveryMask && HasSegments(base_)) {
        mine = WithSegments<kKeepsKeys, kStepRows>(base_, s_, {first_, first_ + kKeptRows}, tile,
                                                   mine, lane_);
      }
#pragma unroll 1
      for (uint32_t left = __ballot_sync(~0u, mine != kNoTile); left != 0; left &= left - 1) {
        const int n = __ffs(static_cast<int>(left)) - 1;
        const uint32_t properties = __shfl_sync(~0u, mine, n);
        visit({static_cast<uint32_t>(tile + n) << StepTile::kPropertyBits | properties,
               static_cast<uint32_t>(head)});
      }
    }
  }

  __device__ __forceinline__ HeadRows RowsOf(int64_t head) const {
    return {s_, head, query_row_, existing_rows_};
  }

  // Of a tile with visible pairs; else kNoTile.
  __device__ __forceinline__ uint32_t Properties(int64_t head, int64_t kv_head, int tile) const {
    constexpr int kRows = kKeepsKeys ? kStepRows : kKeptRows;
    constexpr int kKeys = kKeepsKeys ? kKeptRows : kStepRows;
    const int row = kKeepsKeys ? tile * kStepRows : first_;
    const int key = kKeepsKeys ? first_ : tile * kStepRows;
    uint32_t properties = HidingParts<kEveryMask>(base_, RowsOf(head), row, kRows, key, kKeys);
    if (properties == kNoTile) return kNoTile;
    const bool has_flags =
        kKeepsKeys ? HasQueryFlags(head, row, kRows) : HasKeyFlags(kv_head, key, kKeys);
    const bool is_flagged = has_flags || has_kept_flags_;
    if (is_flagged) properties |= StepTile::kFlagged;
    // Else rows that are not there show it by their statistics.
    if ((kTerms == GradientTerms::kBias || is_flagged) && row + kRows > existing_rows_) {
      properties |= StepTile::kStructuredPart;
    }
    return properties;
  }

  __device__ __forceinline__ bool HasKeyFlags(int64_t kv_head, int key, int keys) const {
    const int64_t word = KeyFlagWord(base_, s_, kv_head, key);
    uint64_t flags = base_.keys.first_flags[word] | base_.keys.second_flags[word];
    if (keys > core::kTile) {
      flags |= base_.keys.first_flags[word + 1] | base_.keys.second_flags[word + 1];
    }
    return flags != 0;
  }
  // Rows of dO show what they are by their statistics.
  __device__ __forceinline__ bool HasQueryFlags(int64_t head, int row, int rows) const {
    const int64_t word = QueryFlagWord(base_, s_, head, row);
    uint64_t flags = base_.queries.first_flags[word];
    if (rows > core::kTile) flags |= base_.queries.first_flags[word + 1];
    return flags != 0;
  }

  // ---- what is visible ----

  // Words in quad order: lane c's 16 bits stand for rows 8 n + 2 c + e of the step, as bit 2 n + e.
  __device__ __forceinline__ void MakeWords(const StepTile& tile, uint64_t* words) const {
    MakeWords(tile, words, [&](int row, int key) { return Word(tile, row, key); });
  }
  // The same of any words of 64 keys, in quad order.
  template <typename WordOf>
  __device__ __forceinline__ void MakeWords(const StepTile& tile, uint64_t* words,
                                            const WordOf& word_of) const {
    if constexpr (kKeepsKeys) {
      // 32 keys by 32 rows at a time. This lane asks for the row of bit `lane` of the result, and
      // what it gets has the keys in an order of their own, which says where the result goes.
      const int row = tile.FirstRow() + lane_ % 16 / 2 * 8 + lane_ / 16 * 2 + lane_ % 2;
      words += lane_ % 8 / 2 * 8 + lane_ / 8 * 2 + lane_ % 2;
#pragma unroll 1
      for (int block = 0; block < kKeptRows; block += core::kTile) {
        uint64_t rows[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) rows[n] = word_of(row + 4 * n, first_ + block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t bits[2];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            bits[n] = TransposeBits(
                __byte_perm(static_cast<uint32_t>(rows[n]), static_cast<uint32_t>(rows[n] >> 32),
                            half == 0 ? 0x6420 : 0x7531),
                lane_);
          }
          words[half * kWarpSize] = bits[0] | uint64_t{bits[1]} << 32;
        }
        words += core::kTile;
      }
    } else {
#pragma unroll 2
      for (int n = lane_; n < kKeptRows; n += kWarpSize) {
        words[n] = word_of(first_ + n, tile.FirstRow());
      }
    }
  }

  __device__ __forceinline__ uint64_t Word(const StepTile& tile, int row, int key) const {
    const uint64_t word = RowWord<kEveryMask>(base_, RowsOf(tile.head), tile.word, row, key);
    if (!kEveryMask || !HasSegments(base_)) return word;
    return word & SegmentWord(base_, s_, row, key, lane_);
  }

  const BackwardParams& base_;
  const Problem& problem_;
  const Sequence& s_;
  const int lane_;
  const int first_;          // row that is kept
  const int existing_rows_;  // of Q
  int query_row_ = 0;        // of the planes, for local row 0 of the head at work
  int key_row_ = 0;
  bool has_kept_flags_ = false;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_TILES_CUH_
