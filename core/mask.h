// Visibility: which query row may attend to which key (docs/semantics.md section 3), as plain data
// that host and device read with the same functions.
//
// A Mask is what kernels see: terms in the form in which they are evaluated. Small terms (bands,
// ranges, lengths, segments) point at the caller's arrays; dense and block-sparse terms are
// prepared once into packed bits (core/mask_prepare.h). Rows and keys are addressed by *global*
// coordinates of their own sequence; the 64 keys from j0 on are one 64-bit word, bit t for key j0 +
// t.
#ifndef TANDEM_CORE_MASK_H_
#define TANDEM_CORE_MASK_H_

#include "core/macros.h"

namespace tandem::core {

inline constexpr int kTile = 64;  // rows and keys of a canonical tile
inline constexpr int kMaxBands = 4;
inline constexpr int kMaxRowRanges = 2;
inline constexpr int kMaxSegments = 2;
inline constexpr int kMaxBlockSparse = 2;
inline constexpr int kMaxDense = 4;

enum class TileClass : int32_t { kEmpty = 0, kFull = 1, kPartial = 2 };

enum class Alignment : int32_t { kUnset = 0, kTopLeft = 1, kBottomRight = 2 };

// An int32 array indexed by (batch, head); strides 0 where it is broadcast.
struct HeadArray {
  const int32_t* data;
  int64_t batch_stride;
  int64_t head_stride;
};

struct BandTerm {
  Alignment alignment;
  int32_t left;  // -1: unbounded
  int32_t right;
  int32_t reserved;
  HeadArray left_per_head;   // data null: the scalar
  HeadArray right_per_head;  // data null: the scalar
  const int32_t* prefix;     // null: none
  int64_t prefix_stride;
};

struct RowRangesTerm {
  const int32_t* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t range_stride;
  int64_t end_stride;  // from begin to end
  int64_t count;
};

struct SegmentsTerm {
  const int32_t* q;
  const int32_t* kv;
  int64_t q_batch_stride;  // 0 for packed tensors: rows are found by the sequence's start
  int64_t q_stride;
  int64_t kv_batch_stride;
  int64_t kv_stride;
};

// Bit kv_block of word (batch, head, q_block): listed. Prepared from the caller's lists.
struct BlockSparseTerm {
  const uint32_t* bits;
  int64_t batch_stride;  // in words
  int64_t head_stride;
  int64_t row_stride;
  int64_t q_block;
  int64_t kv_block;
};

// The conjunction of all dense terms: packed bits, 64 keys to a word, and the class of each
// canonical tile.
struct DenseBits {
  const uint64_t* words;  // null: no dense term
  const uint8_t* classes;
  int64_t batch_stride;  // in words; 0 where broadcast
  int64_t head_stride;
  int64_t row_stride;  // 0: all rows alike
  int64_t class_batch_stride;
  int64_t class_head_stride;
  int64_t class_row_stride;
  int64_t q_extent;  // rows and keys that exist; beyond them nothing is visible
  int64_t kv_extent;
};

struct Mask {
  int32_t band_count;
  int32_t row_ranges_count;
  int32_t segments_count;
  int32_t block_sparse_count;
  BandTerm bands[kMaxBands];
  RowRangesTerm row_ranges[kMaxRowRanges];
  SegmentsTerm segments[kMaxSegments];
  BlockSparseTerm block_sparse[kMaxBlockSparse];
  DenseBits dense;
};

// One sequence of a problem. Local rows [0, q_rows) and keys [0, kv_rows) are those of the tensors;
// global row = q_offset + local row. q_len and kv_len are global lengths: rows and keys at or
// beyond them are not there.
struct Sequence {
  int64_t batch;
  int64_t q_start;  // first row in packed tensors, else 0
  int64_t kv_start;
  int64_t q_rows;
  int64_t kv_rows;
  int64_t q_offset;
  int64_t kv_offset;
  int64_t q_len;
  int64_t kv_len;
};

// Local keys that exist.
TANDEM_HD int64_t LocalKeys(const Sequence& s) {
  return Clamp<int64_t>(s.kv_len - s.kv_offset, 0, s.kv_rows);
}

// Whether local row i is inside its sequence.
TANDEM_HD bool RowExists(const Sequence& s, int64_t i) { return s.q_offset + i < s.q_len; }

// Position of global row 0 on the key axis.
TANDEM_HD int64_t DiagonalOffset(Alignment alignment, const Sequence& s) {
  return alignment == Alignment::kBottomRight ? s.kv_len - s.q_len : 0;
}

// Bits [begin, end) of a word, for any begin and end.
TANDEM_HD uint64_t IntervalWord(int64_t begin, int64_t end) {
  const int64_t low = Clamp<int64_t>(begin, 0, 64);
  const int64_t high = Clamp<int64_t>(end, 0, 64);
  if (low >= high) return 0;
  const uint64_t up_to_high = high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  return low == 64 ? 0 : (up_to_high >> low) << low;
}

struct Interval {
  int64_t begin;
  int64_t end;
};

inline constexpr int64_t kUnbounded = int64_t{1} << 60;

TANDEM_HD int32_t HeadValue(const HeadArray& array, int32_t scalar, int64_t batch, int64_t head) {
  return array.data == nullptr ? scalar
                               : array.data[batch * array.batch_stride + head * array.head_stride];
}

// The band of global row i, without its prefix.
TANDEM_HD Interval BandInterval(const BandTerm& band, const Sequence& s, int64_t head, int64_t i) {
  const int64_t d = i + DiagonalOffset(band.alignment, s);
  const int32_t left = HeadValue(band.left_per_head, band.left, s.batch, head);
  const int32_t right = HeadValue(band.right_per_head, band.right, s.batch, head);
  return {left < 0 ? -kUnbounded : d - left, right < 0 ? kUnbounded : d + right + 1};
}

// Keys [0, prefix) are exempt from the band.
TANDEM_HD int64_t BandPrefix(const BandTerm& band, const Sequence& s) {
  return band.prefix == nullptr ? 0 : band.prefix[s.batch * band.prefix_stride];
}

TANDEM_HD int32_t QuerySegment(const SegmentsTerm& t, const Sequence& s, int64_t i) {
  return t.q[s.batch * t.q_batch_stride + (s.q_start + i) * t.q_stride];
}
TANDEM_HD int32_t KeySegment(const SegmentsTerm& t, const Sequence& s, int64_t j) {
  return t.kv[s.batch * t.kv_batch_stride + (s.kv_start + j) * t.kv_stride];
}

// 64 dense bits of global row i from key j0 on, at any j0 >= 0.
TANDEM_HD uint64_t DenseWord(const DenseBits& dense, const Sequence& s, int64_t head, int64_t i,
                             int64_t j0) {
  if (i >= dense.q_extent || j0 >= dense.kv_extent) return 0;
  const uint64_t* row =
      dense.words + s.batch * dense.batch_stride + head * dense.head_stride + i * dense.row_stride;
  const int64_t index = j0 >> 6;
  const int shift = static_cast<int>(j0 & 63);
  uint64_t word = row[index] >> shift;
  if (shift != 0 && (index + 1) * 64 < dense.kv_extent) word |= row[index + 1] << (64 - shift);
  return word;
}

TANDEM_HD uint64_t BlockSparseWord(const BlockSparseTerm& t, const Sequence& s, int64_t head,
                                   int64_t i, int64_t j0, int64_t kv_end) {
  const uint32_t* row =
      t.bits + s.batch * t.batch_stride + head * t.head_stride + (i / t.q_block) * t.row_stride;
  uint64_t word = 0;
  const int64_t end = Min<int64_t>(j0 + 64, kv_end);
  for (int64_t block = j0 / t.kv_block; block * t.kv_block < end; ++block) {
    if ((row[block >> 5] >> (block & 31)) & 1u) {
      word |= IntervalWord(block * t.kv_block - j0, (block + 1) * t.kv_block - j0);
    }
  }
  return word;
}

// The visibility of 64 keys from local key j0 on for local row i: the truth that every kernel uses
// in partial tiles. A possible -inf of the bias comes on top, where the bias is read.
TANDEM_HD uint64_t VisibleWord(const Mask& mask, const Sequence& s, int64_t head, int64_t local_i,
                               int64_t local_j0) {
  if (!RowExists(s, local_i)) return 0;
  const int64_t i = s.q_offset + local_i;
  const int64_t j0 = s.kv_offset + local_j0;
  uint64_t word = IntervalWord(0, LocalKeys(s) - local_j0);
  for (int t = 0; t < mask.band_count && word != 0; ++t) {
    const BandTerm& band = mask.bands[t];
    const Interval keys = BandInterval(band, s, head, i);
    uint64_t allowed = IntervalWord(keys.begin - j0, keys.end - j0);
    if (band.prefix != nullptr) allowed |= IntervalWord(-j0, BandPrefix(band, s) - j0);
    word &= allowed;
  }
  for (int t = 0; t < mask.row_ranges_count && word != 0; ++t) {
    const RowRangesTerm& term = mask.row_ranges[t];
    const int32_t* row =
        term.data + s.batch * term.batch_stride + head * term.head_stride + i * term.row_stride;
    uint64_t allowed = 0;
    for (int64_t r = 0; r < term.count; ++r) {
      allowed |= IntervalWord(row[r * term.range_stride] - j0,
                              row[r * term.range_stride + term.end_stride] - j0);
    }
    word &= allowed;
  }
  for (int t = 0; t < mask.block_sparse_count && word != 0; ++t) {
    word &= BlockSparseWord(mask.block_sparse[t], s, head, i, j0, s.kv_offset + LocalKeys(s));
  }
  if (mask.dense.words != nullptr && word != 0) word &= DenseWord(mask.dense, s, head, i, j0);
  for (int t = 0; t < mask.segments_count && word != 0; ++t) {
    const SegmentsTerm& term = mask.segments[t];
    const int32_t segment = QuerySegment(term, s, i);
    if (segment < 0) return 0;
    const int64_t count = Min<int64_t>(64, LocalKeys(s) - local_j0);
    uint64_t allowed = 0;
    for (int64_t j = 0; j < count; ++j) {
      allowed |= uint64_t{KeySegment(term, s, j0 + j) == segment} << j;
    }
    word &= allowed;
  }
  return word;
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

// The class of local rows [i_begin, i_end) x local keys [j_begin, j_end) of one head. EMPTY and
// FULL are always true; PARTIAL is also the answer where the terms together, but none alone,
// decide. Rows and keys outside the sequence are invisible (so a rectangle that reaches beyond
// kv_len is at most PARTIAL).
TANDEM_HD TileClass ClassifyTile(const Mask& mask, const Sequence& s, int64_t head, int64_t i_begin,
                                 int64_t i_end, int64_t j_begin, int64_t j_end) {
  const int64_t rows_end = Min<int64_t>(i_end, Max<int64_t>(s.q_len - s.q_offset, 0));
  const int64_t keys_end = Min<int64_t>(j_end, LocalKeys(s));
  if (rows_end <= i_begin || keys_end <= j_begin) return TileClass::kEmpty;
  TileClass result = rows_end < i_end || keys_end < j_end ? TileClass::kPartial : TileClass::kFull;
  const int64_t i0 = s.q_offset + i_begin, i1 = s.q_offset + rows_end;
  const int64_t j0 = s.kv_offset + j_begin, j1 = s.kv_offset + keys_end;
  for (int t = 0; t < mask.band_count && result != TileClass::kEmpty; ++t) {
    result = CombineTerms(result, ClassifyBand(mask.bands[t], s, head, i0, i1, j0, j1));
  }
  for (int t = 0; t < mask.block_sparse_count && result != TileClass::kEmpty; ++t) {
    result =
        CombineTerms(result, ClassifyBlockSparse(mask.block_sparse[t], s, head, i0, i1, j0, j1));
  }
  if (mask.dense.words != nullptr && result != TileClass::kEmpty) {
    result = CombineTerms(result, ClassifyDense(mask.dense, s, head, i0, i1, j0, j1));
  }
  for (int t = 0; t < mask.row_ranges_count && result != TileClass::kEmpty; ++t) {
    result = CombineTerms(result, ClassifyRowRanges(mask.row_ranges[t], s, head, i0, i1, j0, j1));
  }
  for (int t = 0; t < mask.segments_count && result != TileClass::kEmpty; ++t) {
    result = CombineTerms(result, ClassifySegments(mask.segments[t], s, i0, i1, j0, j1));
  }
  return result;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MASK_H_
