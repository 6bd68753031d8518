// What is visible in tiles of the backward pass, and which of them a block visits.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_VISIBILITY_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_VISIBILITY_CUH_

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

// What hides pairs of a tile that has visible ones; else kNoTile. kEveryMask: not only lengths,
// bands and dense masks, which leave rows an interval of keys beside what a dense mask hides.
// Segments that are looked at on their own are not.
inline constexpr uint32_t kNoTile = ~0u;
template <bool kEveryMask>
__device__ __forceinline__ uint32_t HidingParts(const BackwardParams& base, const HeadRows& rows,
                                                int row, int row_count, int key, int key_count) {
  const Sequence& s = rows.sequence;
  if (kEveryMask && base.intervals == nullptr) {
    const core::TileClasses classes =
        core::ClassifyTerms(base.problem.mask, s, rows.head, row,
                            core::Min<int64_t>(row + row_count, s.q_rows), key, key + key_count);
    if (core::CombineTerms(classes.structured, classes.dense) == core::TileClass::kEmpty) {
      return kNoTile;
    }
    return (classes.structured == core::TileClass::kPartial ? StepTile::kStructuredPart : 0u) |
           (classes.dense == core::TileClass::kPartial ? StepTile::kDensePart : 0u);
  }
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
template <bool kEveryMask>
__device__ __forceinline__ uint64_t RowWord(const BackwardParams& base, const HeadRows& rows,
                                            uint32_t parts, int row, int key) {
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
    if (kEveryMask && base.intervals == nullptr) {
      visible = core::StructuredWord(base.problem.mask, rows.sequence, rows.head, row, key);
    } else {
      const KeyInterval keys = base.intervals[rows.query_row + row];
      visible = core::IntervalWord(keys.begin - key, keys.end - key);
    }
    word &= core::ToQuadOrder(visible);
  }
  return word;
}

// The first step of kRows keys of which some rows may see any, and the end of those keys.
template <bool kEveryMask, int kRows>
__device__ __forceinline__ void FindSteps(const BackwardParams& base, const HeadRows& rows, int row,
                                          int row_count, int& begin, int& end) {
  if (kEveryMask && base.intervals == nullptr) {
    const core::Interval hull =
        core::VisibleKeyHull(base.problem.mask, rows.sequence, rows.head, row,
                             core::Min<int64_t>(row + row_count, rows.sequence.q_rows));
    begin = static_cast<int>(hull.begin) / kRows;
    end = static_cast<int>(hull.end);
  } else {
    const bool has_rows = row < rows.existing;
    begin = has_rows ? rows.FirstInterval(base, row).begin / kRows : 0;
    end = has_rows ? rows.LastInterval(base, row + row_count).end : 0;
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_VISIBILITY_CUH_
