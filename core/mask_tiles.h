// Classes of tiles of the score matrix (docs/semantics.md section 4): EMPTY tiles are neither
// loaded nor computed, FULL ones need no mask work, PARTIAL ones use the words of core/mask.h.
// Structured terms are classified by arithmetic on intervals, dense ones by the canonical tiles
// prepared for them.
#ifndef TANDEM_CORE_MASK_TILES_H_
#define TANDEM_CORE_MASK_TILES_H_

#include "core/mask.h"

namespace tandem::core {

// Whether heads that share keys can see different ones of them.
TANDEM_HD bool MaskVariesByHead(const Mask& mask) {
  bool varies = mask.dense.words != nullptr && mask.dense.head_stride != 0;
  for (int t = 0; t < mask.band_count; ++t) {
    const BandTerm& band = mask.bands[t];
    varies = varies || (band.left_per_head.data != nullptr && band.left_per_head.head_stride != 0);
    varies =
        varies || (band.right_per_head.data != nullptr && band.right_per_head.head_stride != 0);
  }
  for (int t = 0; t < mask.row_ranges_count; ++t) {
    varies = varies || mask.row_ranges[t].head_stride != 0;
  }
  for (int t = 0; t < mask.block_sparse_count; ++t) {
    varies = varies || mask.block_sparse[t].head_stride != 0;
  }
  return varies;
}

// Keys [begin, end), local, outside which no row of local rows [i_begin, i_end) sees anything; from
// lengths and bands.
TANDEM_HD Interval VisibleKeyHull(const Mask& mask, const Sequence& s, int64_t head,
                                  int64_t i_begin, int64_t i_end) {
  Interval hull = {0, LocalKeys(s)};
  const int64_t last = Min<int64_t>(s.q_offset + i_end, s.q_len) - 1;
  if (last < s.q_offset + i_begin) return {0, 0};
  for (int t = 0; t < mask.band_count; ++t) {
    const BandTerm& band = mask.bands[t];
    const Interval first_row = BandInterval(band, s, head, s.q_offset + i_begin);
    const Interval last_row = BandInterval(band, s, head, last);
    const bool has_prefix = BandPrefix(band, s) > 0;
    const int64_t end = Max<int64_t>(last_row.end, BandPrefix(band, s));
    hull.begin = Max<int64_t>(hull.begin, has_prefix ? 0 : first_row.begin - s.kv_offset);
    hull.end = Min<int64_t>(hull.end, end - s.kv_offset);
  }
  if (hull.end < hull.begin) hull.end = hull.begin;
  return hull;
}

TANDEM_HD TileClass CombineTerms(TileClass a, TileClass b) {
  if (a == TileClass::kEmpty || b == TileClass::kEmpty) return TileClass::kEmpty;
  return a == TileClass::kFull && b == TileClass::kFull ? TileClass::kFull : TileClass::kPartial;
}
// The class of a region from the classes of two parts of it.
TANDEM_HD TileClass CombineParts(TileClass a, TileClass b) {
  return a == b ? a : TileClass::kPartial;
}

// Rows [i_begin, i_end) and keys [j_begin, j_end) in global coordinates, all inside the sequence.
TANDEM_HD TileClass ClassifyBand(const BandTerm& band, const Sequence& s, int64_t head,
                                 int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) {
  const Interval first = BandInterval(band, s, head, i_begin);
  const Interval last = BandInterval(band, s, head, i_end - 1);
  const int64_t prefix = BandPrefix(band, s);
  // Every row's allowed keys contain [last.begin, first.end) and, below it, the prefix.
  const int64_t common_begin = prefix >= last.begin ? 0 : last.begin;
  const int64_t common_end = prefix >= last.begin ? Max<int64_t>(prefix, first.end) : first.end;
  if ((common_begin <= j_begin && j_end <= common_end) || j_end <= prefix) return TileClass::kFull;
  const bool beside_band = last.end <= j_begin || first.begin >= j_end;
  return beside_band && prefix <= j_begin ? TileClass::kEmpty : TileClass::kPartial;
}

TANDEM_HD TileClass ClassifyRowRanges(const RowRangesTerm& term, const Sequence& s, int64_t head,
                                      int64_t i_begin, int64_t i_end, int64_t j_begin,
                                      int64_t j_end) {
  bool any = false;
  bool all = true;
  if (term.row_stride == 0) i_end = i_begin + 1;
  for (int64_t i = i_begin; i < i_end && (!any || all); ++i) {
    const int32_t* row =
        term.data + s.batch * term.batch_stride + head * term.head_stride + i * term.row_stride;
    bool row_full = false;
    for (int64_t r = 0; r < term.count; ++r) {
      const int64_t begin = row[r * term.range_stride];
      const int64_t end = row[r * term.range_stride + term.end_stride];
      any = any || (begin < end && begin < j_end && end > j_begin);
      row_full = row_full || (begin <= j_begin && j_end <= end);
    }
    all = all && row_full;
  }
  return !any ? TileClass::kEmpty : (all ? TileClass::kFull : TileClass::kPartial);
}

TANDEM_HD TileClass ClassifySegments(const SegmentsTerm& term, const Sequence& s, int64_t i_begin,
                                     int64_t i_end, int64_t j_begin, int64_t j_end) {
  int32_t q_min = INT32_MAX, q_max = INT32_MIN, kv_min = INT32_MAX, kv_max = INT32_MIN;
  for (int64_t i = i_begin; i < i_end; ++i) {
    const int32_t segment = QuerySegment(term, s, i);
    q_min = Min(q_min, segment);
    q_max = Max(q_max, segment);
  }
  for (int64_t j = j_begin; j < j_end; ++j) {
    const int32_t segment = KeySegment(term, s, j);
    kv_min = Min(kv_min, segment);
    kv_max = Max(kv_max, segment);
  }
  if (q_max < 0 || kv_max < 0 || q_max < kv_min || kv_max < q_min) return TileClass::kEmpty;
  const bool one = q_min == q_max && kv_min == kv_max && q_min == kv_min;
  return one ? TileClass::kFull : TileClass::kPartial;
}

TANDEM_HD TileClass ClassifyBlockSparse(const BlockSparseTerm& term, const Sequence& s,
                                        int64_t head, int64_t i_begin, int64_t i_end,
                                        int64_t j_begin, int64_t j_end) {
  bool any = false;
  bool all = true;
  for (int64_t qb = i_begin / term.q_block; qb * term.q_block < i_end; ++qb) {
    const uint32_t* row =
        term.bits + s.batch * term.batch_stride + head * term.head_stride + qb * term.row_stride;
    for (int64_t kb = j_begin / term.kv_block; kb * term.kv_block < j_end; ++kb) {
      const bool listed = (row[kb >> 5] >> (kb & 31)) & 1u;
      any = any || listed;
      all = all && listed;
    }
  }
  return !any ? TileClass::kEmpty : (all ? TileClass::kFull : TileClass::kPartial);
}

TANDEM_HD TileClass ClassifyDense(const DenseBits& dense, const Sequence& s, int64_t head,
                                  int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) {
  const uint8_t* classes =
      dense.classes + s.batch * dense.class_batch_stride + head * dense.class_head_stride;
  // The extents are the longest sequence's; what lies outside is not visible.
  if (i_begin >= dense.q_extent || j_begin >= dense.kv_extent) return TileClass::kEmpty;
  const bool cut = i_end > dense.q_extent || j_end > dense.kv_extent;
  i_end = Min(i_end, dense.q_extent);
  j_end = Min(j_end, dense.kv_extent);
  if (dense.class_row_stride == 0) i_end = i_begin + 1;
  TileClass result = TileClass::kPartial;
  bool started = false;
  for (int64_t ti = i_begin / kTile; ti * kTile < i_end; ++ti) {
    for (int64_t tj = j_begin / kTile; tj * kTile < j_end; ++tj) {
      const TileClass tile = static_cast<TileClass>(classes[ti * dense.class_row_stride + tj]);
      result = started ? CombineParts(result, tile) : tile;
      started = true;
      if (result == TileClass::kPartial) return result;
    }
  }
  return cut && result == TileClass::kFull ? TileClass::kPartial : result;
}

// Rows and keys of a rectangle that exist, in global coordinates.
struct TileExtent {
  int64_t i0, i1, j0, j1;
  TileClass by_length;  // what the lengths alone say
};

TANDEM_HD TileExtent ExistingExtent(const Sequence& s, int64_t i_begin, int64_t i_end,
                                    int64_t j_begin, int64_t j_end) {
  const int64_t rows_end = Min<int64_t>(i_end, Max<int64_t>(s.q_len - s.q_offset, 0));
  const int64_t keys_end = Min<int64_t>(j_end, LocalKeys(s));
  TileClass by_length = TileClass::kFull;
  if (rows_end < i_end || keys_end < j_end) by_length = TileClass::kPartial;
  if (rows_end <= i_begin || keys_end <= j_begin) by_length = TileClass::kEmpty;
  return {s.q_offset + i_begin, s.q_offset + rows_end, s.kv_offset + j_begin,
          s.kv_offset + keys_end, by_length};
}

// The class of local rows [i_begin, i_end) x local keys [j_begin, j_end) of one head, by every term
// but the dense ones and by those: where one of them is EMPTY, the other may be anything.
struct TileClasses {
  TileClass structured;
  TileClass dense;
};

TANDEM_HD TileClasses ClassifyTerms(const Mask& mask, const Sequence& s, int64_t head,
                                    int64_t i_begin, int64_t i_end, int64_t j_begin,
                                    int64_t j_end) {
  const TileExtent e = ExistingExtent(s, i_begin, i_end, j_begin, j_end);
  TileClasses result = {e.by_length, TileClass::kFull};
  TileClass& structured = result.structured;
  for (int t = 0; t < mask.band_count && structured != TileClass::kEmpty; ++t) {
    structured =
        CombineTerms(structured, ClassifyBand(mask.bands[t], s, head, e.i0, e.i1, e.j0, e.j1));
  }
  for (int t = 0; t < mask.block_sparse_count && structured != TileClass::kEmpty; ++t) {
    structured = CombineTerms(
        structured, ClassifyBlockSparse(mask.block_sparse[t], s, head, e.i0, e.i1, e.j0, e.j1));
  }
  if (mask.dense.words != nullptr && structured != TileClass::kEmpty) {
    result.dense = ClassifyDense(mask.dense, s, head, e.i0, e.i1, e.j0, e.j1);
    if (result.dense == TileClass::kEmpty) return result;
  }
  for (int t = 0; t < mask.row_ranges_count && structured != TileClass::kEmpty; ++t) {
    structured = CombineTerms(
        structured, ClassifyRowRanges(mask.row_ranges[t], s, head, e.i0, e.i1, e.j0, e.j1));
  }
  for (int t = 0; t < mask.segments_count && structured != TileClass::kEmpty; ++t) {
    structured =
        CombineTerms(structured, ClassifySegments(mask.segments[t], s, e.i0, e.i1, e.j0, e.j1));
  }
  return result;
}

// The class by all terms. EMPTY and FULL are always true; PARTIAL is also the answer where the
// terms together, but none alone, decide. Rows and keys outside the sequence are invisible (so a
// rectangle that reaches beyond kv_len is at most PARTIAL).
TANDEM_HD TileClass ClassifyTile(const Mask& mask, const Sequence& s, int64_t head, int64_t i_begin,
                                 int64_t i_end, int64_t j_begin, int64_t j_end) {
  const TileClasses classes = ClassifyTerms(mask, s, head, i_begin, i_end, j_begin, j_end);
  return CombineTerms(classes.structured, classes.dense);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MASK_TILES_H_
