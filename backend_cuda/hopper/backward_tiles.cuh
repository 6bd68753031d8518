// Which tiles a block of the backward pass visits, and what is visible in them.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_TILES_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_TILES_CUH_

#include "backend_cuda/hopper/backward_params.h"
#include "backend_cuda/hopper/instructions.cuh"
#include "backend_cuda/tensor_core.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda::hopper {

using core::Problem;
using core::Sequence;

// A step's tile: 64 rows of the side that is walked over.
struct StepTile {
  uint32_t word;  // index << kPropertyBits | properties
  uint32_t head;  // of the queries

  static constexpr uint32_t kEnd = 1;             // there is no tile, nor another one
  static constexpr uint32_t kStructuredPart = 2;  // lengths and bands hide pairs
  static constexpr uint32_t kDensePart = 4;
  static constexpr uint32_t kFlagged = 8;  // it has elements that products cannot serve
  static constexpr uint32_t kLast = 16;  // no tile of the block follows; unused where kEnd says so
  static constexpr int kPropertyBits = 5;

  __device__ __forceinline__ int FirstRow() const {
    return static_cast<int>(word >> kPropertyBits) * kStepRows;
  }
  __device__ __forceinline__ bool IsEnd() const { return (word & kEnd) != 0; }
  __device__ __forceinline__ bool IsLast() const { return (word & kLast) != 0; }
  __device__ __forceinline__ bool IsHidden() const {
    return (word & (kStructuredPart | kDensePart)) != 0;
  }
  __device__ __forceinline__ bool IsFlagged() const { return (word & kFlagged) != 0; }
};

// What a block serves: kKeptRows rows of one head.
struct KeptBlock {
  Sequence sequence;
  int64_t head;  // of the queries, or of the keys where those are kept
  int64_t first_row;
};

// That of a block of the launch, which keeps kRows rows: as the portable kernel, heads in sections
// whose rows stay in the L2 cache, the longest blocks first in each.
template <GradientSide kSide, int kRows>
__device__ __forceinline__ KeptBlock MakeKeptBlock(const BackwardParams& base) {
  constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  const Problem& p = base.problem;
  const auto blocks = static_cast<uint32_t>(base.blocks);
  const auto section = static_cast<uint32_t>(base.section_heads);
  const auto heads = static_cast<uint32_t>(kKeepsKeys ? p.kv_heads : p.q_heads);
  const uint32_t first_head = blockIdx.x / (section * blocks) * section;
  const uint32_t rest = blockIdx.x - first_head * blocks;
  const uint32_t heads_here =
      core::Min(section, static_cast<uint32_t>(p.batch) * heads - first_head);
  const uint32_t turn = rest / heads_here;
  const uint32_t head = first_head + rest % heads_here;
  KeptBlock block;
  int32_t status = 0;
  block.sequence = core::ResolveSequence(p, head / heads, &status);
  block.head = head % heads;
  block.first_row = int64_t{kKeepsKeys ? turn : blocks - 1 - turn} * kRows;
  return block;
}

// Where a row of a step has its statistics: what lane c reads at once, rows 8 t + 2 c + e of two t,
// lies together.
__device__ __forceinline__ int StatisticsPlace(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// Bit l of word k becomes bit k of word l, for the words of a warp's lanes.
static __device__ __forceinline__ uint32_t TransposeBits(uint32_t word, int lane) {
#pragma unroll
  for (int j = 16; j > 0; j /= 2) {
    const uint32_t low = j == 16  ? 0x0000ffffu
                         : j == 8 ? 0x00ff00ffu
                         : j == 4 ? 0x0f0f0f0fu
                         : j == 2 ? 0x33333333u
                                  : 0x55555555u;
    const uint32_t other = __shfl_xor_sync(~0u, word, j);
    word = (lane & j) == 0 ? (word & low) | (other & low) << j : (word & ~low) | (other >> j & low);
  }
  return word;
}

// Rows of the queries of one head, of which the first `existing` are there.
struct HeadRows {
  const Sequence& sequence;
  int64_t head;
  int query_row;  // of the planes, for local row 0
  int existing;

  // Those of the first row of some, and of the last one that exists.
  __device__ __forceinline__ KeyInterval FirstInterval(const BackwardParams& base, int row) const {
    return base.intervals[query_row + row];
  }
  __device__ __forceinline__ KeyInterval LastInterval(const BackwardParams& base, int end) const {
    return base.intervals[query_row + core::Min(end, existing) - 1];
  }
};
__device__ __forceinline__ int ExistingRows(const Sequence& s) {
  return static_cast<int>(core::Clamp<int64_t>(s.q_len - s.q_offset, 0, s.q_rows));
}

// What hides pairs of a tile that has visible ones; else kNoTile.
inline constexpr uint32_t kNoTile = ~0u;
__device__ __forceinline__ uint32_t HidingParts(const BackwardParams& base, const HeadRows& rows,
                                                int row, int row_count, int key, int key_count) {
  const Sequence& s = rows.sequence;
  const KeyInterval first = rows.FirstInterval(base, row);
  const KeyInterval last = rows.LastInterval(base, row + row_count);
  if (last.end <= key || first.begin >= key + key_count) return kNoTile;
  uint32_t parts = 0;
  if (last.begin > key || first.end < key + key_count) parts |= StepTile::kStructuredPart;
  if (base.problem.mask.dense.words != nullptr) {
    const core::TileClass by_dense = core::ClassifyDense(
        base.problem.mask.dense, s, rows.head, s.q_offset + row,
        s.q_offset + core::Min(row + row_count, rows.existing), s.kv_offset + key,
        s.kv_offset + core::Min<int64_t>(key + key_count, core::LocalKeys(s)));
    if (by_dense == core::TileClass::kEmpty) return kNoTile;
    if (by_dense == core::TileClass::kPartial) parts |= StepTile::kDensePart;
  }
  return parts;
}

// The 64 keys from `key` on that a row sees, in quad order, by the parts that hide some.
__device__ __forceinline__ uint64_t RowWord(const BackwardParams& base, const HeadRows& rows,
                                            uint32_t parts, int row, int key,
                                            bool has_all_terms = false) {
  if (row >= rows.existing) return 0;
  uint64_t word = ~uint64_t{0};
  if ((parts & StepTile::kDensePart) != 0) {
    const Sequence& s = rows.sequence;
    const core::DenseBits& dense = base.problem.mask.dense;
    const int64_t i = s.q_offset + row;
    const int64_t j = s.kv_offset + key;
    word = i < dense.q_extent && j < dense.kv_extent
               ? dense.words[core::DenseWordIndex(dense, s.batch, rows.head, i, j >> 6)]
               : 0;
  }
  if ((parts & StepTile::kStructuredPart) != 0) {
    uint64_t visible;
    if (has_all_terms) {
      visible = core::StructuredWord(base.problem.mask, rows.sequence, rows.head, row, key);
    } else {
      const KeyInterval keys = base.intervals[rows.query_row + row];
      visible = core::IntervalWord(keys.begin - key, keys.end - key);
    }
    word &= core::ToQuadOrder(visible);
  }
  return word;
}

// The same where terms leave rows more than an interval of keys.
__device__ __forceinline__ uint32_t HidingTerms(const BackwardParams& base, const HeadRows& rows,
                                                int row, int row_count, int key, int key_count) {
  const Sequence& s = rows.sequence;
  const core::TileClasses classes =
      core::ClassifyTerms(base.problem.mask, s, rows.head, row,
                          core::Min<int64_t>(row + row_count, s.q_rows), key, key + key_count);
  if (core::CombineTerms(classes.structured, classes.dense) == core::TileClass::kEmpty) {
    return kNoTile;
  }
  return (classes.structured == core::TileClass::kPartial ? StepTile::kStructuredPart : 0u) |
         (classes.dense == core::TileClass::kPartial ? StepTile::kDensePart : 0u);
}

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
      const bool has_rows = first_ < existing_rows_;
      if constexpr (kEveryMask) {
        const core::Interval hull = core::VisibleKeyHull(
            problem_.mask, s_, head, first_, core::Min<int64_t>(first_ + kKeptRows, s_.q_rows));
        begin = static_cast<int>(hull.begin) / kStepRows;
        end = static_cast<int>(hull.end);
      } else {
        const HeadRows rows = RowsOf(head);
        begin = has_rows ? rows.FirstInterval(base_, first_).begin / kStepRows : 0;
        end = has_rows ? rows.LastInterval(base_, first_ + kKeptRows).end : 0;
      }
    }
    end = core::CeilDiv(end, kStepRows);
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWarpSize) {
      const uint32_t mine = tile + lane_ < end ? Properties(head, kv_head, tile + lane_) : kNoTile;
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
    uint32_t properties = kEveryMask ? HidingTerms(base_, RowsOf(head), row, kRows, key, kKeys)
                                     : HidingParts(base_, RowsOf(head), row, kRows, key, kKeys);
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
    return RowWord(base_, RowsOf(tile.head), tile.word, row, key, kEveryMask);
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
