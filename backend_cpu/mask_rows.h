// What a block of rows sees of the mask. The rows are (query row, head of the group) pairs of one
// sequence and one key head, heads innermost: pair x is row x / group and head x % group of the
// group, so that heads that share keys share a block.
#ifndef TANDEM_BACKEND_CPU_MASK_ROWS_H_
#define TANDEM_BACKEND_CPU_MASK_ROWS_H_

#include "core/mask_tiles.h"
#include "core/problem.h"

namespace tandem::cpu {

struct RowPairs {
  int64_t kv_head;
  int64_t first;  // pair
  int64_t count;
  int64_t i_begin, i_end;  // local rows
  int64_t mask_heads;      // heads of the group to ask the mask for: all, or 1 that speaks for all
};

TANDEM_HD RowPairs MakeRowPairs(const core::Problem& p, int64_t kv_head, int64_t first,
                                int64_t count) {
  return {kv_head,
          first,
          count,
          first / p.group,
          (first + count - 1) / p.group + 1,
          core::MaskVariesByHead(p.mask) ? p.group : 1};
}

TANDEM_HD int64_t PairRow(const core::Problem& p, const RowPairs& rows, int64_t r) {
  return (rows.first + r) / p.group;
}
TANDEM_HD int64_t PairHead(const core::Problem& p, const RowPairs& rows, int64_t r) {
  return rows.kv_head * p.group + (rows.first + r) % p.group;
}

// Class of the tiles of 64 keys [tile, tile_end) for all of the rows.
TANDEM_HD core::TileClass ClassifyForRows(const core::Problem& p, const core::Sequence& s,
                                          const RowPairs& rows, int64_t tile, int64_t tile_end) {
  const int64_t first = tile * core::kTile;
  const int64_t end = core::Min<int64_t>(tile_end * core::kTile, core::LocalKeys(s));
  core::TileClass result = core::TileClass::kPartial;
  for (int64_t g = 0; g < rows.mask_heads; ++g) {
    const core::TileClass one = core::ClassifyTile(p.mask, s, rows.kv_head * p.group + g,
                                                   rows.i_begin, rows.i_end, first, end);
    result = g == 0 ? one : core::CombineParts(result, one);
    if (result == core::TileClass::kPartial) break;
  }
  // The rest of the sequence's last tile is invisible.
  return result == core::TileClass::kFull && end < tile_end * core::kTile
             ? core::TileClass::kPartial
             : result;
}
TANDEM_HD core::TileClass ClassifyForRows(const core::Problem& p, const core::Sequence& s,
                                          const RowPairs& rows, int64_t tile) {
  return ClassifyForRows(p, s, rows, tile, tile + 1);
}

// Keys outside which none of the rows sees anything.
TANDEM_HD core::Interval HullForRows(const core::Problem& p, const core::Sequence& s,
                                     const RowPairs& rows) {
  core::Interval hull = {core::LocalKeys(s), 0};
  for (int64_t g = 0; g < rows.mask_heads; ++g) {
    const core::Interval one =
        core::VisibleKeyHull(p.mask, s, rows.kv_head * p.group + g, rows.i_begin, rows.i_end);
    if (one.begin >= one.end) continue;
    hull.begin = core::Min(hull.begin, one.begin);
    hull.end = core::Max(hull.end, one.end);
  }
  return hull;
}

// Whether the word of 64 aligned keys is one prepared word and the lengths.
TANDEM_HD bool IsAlignedDense(const core::Mask& mask, const core::Sequence& s) {
  return mask.dense.words != nullptr && mask.dense.bit_order == core::BitOrder::kNatural &&
         s.kv_offset % core::kTile == 0 && mask.band_count == 0 && mask.row_ranges_count == 0 &&
         mask.segments_count == 0 && mask.block_sparse_count == 0;
}

// words[r] = what row r sees of the tile, as core::VisibleWord. Returns the union of them.
TANDEM_HD uint64_t FillWords(const core::Problem& p, const core::Sequence& s, const RowPairs& rows,
                             int64_t tile, uint64_t* words) {
  const core::DenseBits& dense = p.mask.dense;
  const bool is_aligned_dense = IsAlignedDense(p.mask, s);
  const int64_t first = tile * core::kTile;
  const uint64_t existing = core::IntervalWord(0, core::LocalKeys(s) - first);
  const int64_t word = (s.kv_offset + first) / core::kTile;
  const int64_t row_end = core::Min(s.q_len, dense.q_extent);
  uint64_t any = 0;
  int64_t i = rows.first / p.group;
  int64_t g = rows.first % p.group;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t head = rows.kv_head * p.group + g;
    if (rows.mask_heads == 1 && r > 0 && g > 0) {
      words[r] = words[r - 1];
    } else if (is_aligned_dense) {
      const int64_t global = s.q_offset + i;
      words[r] = 0;
      if (global < row_end && s.kv_offset + first < dense.kv_extent) {
        words[r] = existing & dense.words[core::DenseWordIndex(dense, s.batch, head, global, word)];
      }
    } else {
      words[r] = core::VisibleWord(p.mask, s, head, i, first);
    }
    any |= words[r];
    if (++g == p.group) {
      g = 0;
      ++i;
    }
  }
  return any;
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_MASK_ROWS_H_
