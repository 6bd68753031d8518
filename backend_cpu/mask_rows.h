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

// Where each of up to 32 rows finds its prepared words, for those that see one sequence's keys
// through aligned dense words alone (IsAlignedDense).
struct DenseRows {
  static constexpr int64_t kRows = 32;
  const uint64_t* row[kRows];  // word 0 of the tensors' keys
  uint64_t existing[kRows];    // 0 for rows that see nothing, else all ones
};
TANDEM_HD DenseRows FindDenseRows(const core::Problem& p, const core::Sequence& s,
                                  const RowPairs& rows) {
  const core::DenseBits& dense = p.mask.dense;
  const int64_t row_end = core::Min(s.q_len, dense.q_extent);
  DenseRows result;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t global = s.q_offset + PairRow(p, rows, r);
    const bool exists = global < row_end;
    result.existing[r] = exists ? ~uint64_t{0} : 0;
    result.row[r] = dense.words + DenseWordIndex(dense, s.batch, PairHead(p, rows, r),
                                                 exists ? global : 0, s.kv_offset / core::kTile);
  }
  return result;
}

// As FillWords.
TANDEM_HD uint64_t FillDenseWords(const core::Problem& p, const core::Sequence& s,
                                  const DenseRows& dense_rows, int64_t row_count, int64_t tile,
                                  uint64_t* words) {
  const core::DenseBits& dense = p.mask.dense;
  const int64_t first = tile * core::kTile;
  if (s.kv_offset + first >= dense.kv_extent) {
    for (int64_t r = 0; r < row_count; ++r) words[r] = 0;
    return 0;
  }
  const uint64_t existing = core::IntervalWord(0, core::LocalKeys(s) - first);
  const int64_t at = tile * dense.word_stride;
  uint64_t any = 0;
  for (int64_t r = 0; r < row_count; ++r) {
    words[r] = existing & dense_rows.existing[r] & dense_rows.row[r][at];
    any |= words[r];
  }
  return any;
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
