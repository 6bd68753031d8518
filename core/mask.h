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

// In which bit of a prepared word a key stands.
enum class BitOrder : int32_t {
  kNatural = 0,  // bit t: key t
  // The order in which the four lanes that share a row of a tensor-core accumulator hold its
  // columns: lane c's keys 8 n + 2 c + e are the 16 bits from 16 c on, as bit 2 n + e of them.
  kQuad = 1,
};

// The conjunction of all dense terms: packed bits, 64 keys to a word, and the class of each
// canonical tile. The word of row i for keys 64 w to 64 w + 63 is at (i / 64) * tile_stride +
// (i % 64) * row_stride + w * word_stride.
struct DenseBits {
  const uint64_t* words;  // null: no dense term
  const uint8_t* classes;
  int64_t batch_stride;  // in words; 0 where broadcast
  int64_t head_stride;
  int64_t tile_stride;  // 0, as row_stride: all rows alike
  int64_t row_stride;
  int64_t word_stride;
  int64_t class_batch_stride;
  int64_t class_head_stride;
  int64_t class_row_stride;
  int64_t q_extent;  // rows and keys that exist; beyond them nothing is visible
  int64_t kv_extent;
  BitOrder bit_order;
  int32_t reserved;
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

// Whether anything but the lengths hides pairs.
TANDEM_HD bool HasTerms(const Mask& mask) {
  return mask.band_count + mask.row_ranges_count + mask.segments_count + mask.block_sparse_count !=
             0 ||
         mask.dense.words != nullptr;
}

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

// Whether a band leaves every row one interval of keys, whose ends do not fall from a row to the
// next; and whether all terms but the dense ones do.
TANDEM_HD bool IsInterval(const BandTerm& band) {
  return band.prefix == nullptr || (band.left < 0 && band.left_per_head.data == nullptr);
}
TANDEM_HD bool SeesIntervals(const Mask& mask) {
  bool sees = mask.row_ranges_count + mask.segments_count + mask.block_sparse_count == 0;
  for (int t = 0; t < mask.band_count; ++t) sees = sees && IsInterval(mask.bands[t]);
  return sees;
}

// The local keys that lengths and such bands leave an existing local row: where SeesIntervals, all
// that it sees but for the dense terms.
TANDEM_HD Interval VisibleKeys(const Mask& mask, const Sequence& s, int64_t head, int64_t local_i) {
  Interval keys = {0, LocalKeys(s)};
  for (int t = 0; t < mask.band_count; ++t) {
    const BandTerm& band = mask.bands[t];
    if (!IsInterval(band)) continue;
    const Interval allowed = BandInterval(band, s, head, s.q_offset + local_i);
    keys.begin = Max<int64_t>(keys.begin, allowed.begin - s.kv_offset);
    keys.end = Min<int64_t>(keys.end, Max<int64_t>(allowed.end, BandPrefix(band, s)) - s.kv_offset);
  }
  if (keys.end < keys.begin) keys.end = keys.begin;
  return keys;
}

TANDEM_HD int32_t QuerySegment(const SegmentsTerm& t, const Sequence& s, int64_t i) {
  return t.q[s.batch * t.q_batch_stride + (s.q_start + i) * t.q_stride];
}
TANDEM_HD int32_t KeySegment(const SegmentsTerm& t, const Sequence& s, int64_t j) {
  return t.kv[s.batch * t.kv_batch_stride + (s.kv_start + j) * t.kv_stride];
}

// Exchanges the bits whose index has bits `high` and `low` different.
TANDEM_HD uint64_t SwapIndexBits(uint64_t word, int high, int low) {
  uint64_t mask = 0;  // indices with bit `low` set and bit `high` clear
  for (int index = 0; index < 64; ++index) {
    mask |= uint64_t{((index >> low) & ~(index >> high) & 1) != 0} << index;
  }
  const int shift = (1 << high) - (1 << low);
  const uint64_t changed = ((word >> shift) ^ word) & mask;
  return word ^ changed ^ (changed << shift);
}

// A word in natural order, put into quad order, and back.
TANDEM_HD uint64_t ToQuadOrder(uint64_t word) {
  word = SwapIndexBits(word, 5, 2);
  word = SwapIndexBits(word, 4, 1);
  word = SwapIndexBits(word, 3, 2);
  return SwapIndexBits(word, 2, 1);
}
TANDEM_HD uint64_t FromQuadOrder(uint64_t word) {
  word = SwapIndexBits(word, 2, 1);
  word = SwapIndexBits(word, 3, 2);
  word = SwapIndexBits(word, 4, 1);
  return SwapIndexBits(word, 5, 2);
}

// Index of the word of global row i and keys 64 w on, for a (batch, head).
TANDEM_HD int64_t DenseWordIndex(const DenseBits& dense, int64_t batch, int64_t head, int64_t i,
                                 int64_t w) {
  return batch * dense.batch_stride + head * dense.head_stride + (i >> 6) * dense.tile_stride +
         (i & 63) * dense.row_stride + w * dense.word_stride;
}

// 64 dense bits of global row i from key j0 on, at any j0 >= 0, in natural order.
TANDEM_HD uint64_t DenseWord(const DenseBits& dense, const Sequence& s, int64_t head, int64_t i,
                             int64_t j0) {
  if (i >= dense.q_extent || j0 >= dense.kv_extent) return 0;
  const int64_t w = j0 >> 6;
  const int shift = static_cast<int>(j0 & 63);
  const auto load = [&](int64_t index) {
    const uint64_t word = dense.words[DenseWordIndex(dense, s.batch, head, i, index)];
    return dense.bit_order == BitOrder::kQuad ? FromQuadOrder(word) : word;
  };
  uint64_t word = load(w) >> shift;
  if (shift != 0 && (w + 1) * 64 < dense.kv_extent) word |= load(w + 1) << (64 - shift);
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

// The visibility of 64 keys from local key j0 on for local row i by every term but the dense ones.
TANDEM_HD uint64_t StructuredWord(const Mask& mask, const Sequence& s, int64_t head,
                                  int64_t local_i, int64_t local_j0) {
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

// The visibility of 64 keys from local key j0 on for local row i: the truth that every kernel uses
// in partial tiles. A possible -inf of the bias comes on top, where the bias is read.
TANDEM_HD uint64_t VisibleWord(const Mask& mask, const Sequence& s, int64_t head, int64_t local_i,
                               int64_t local_j0) {
  const uint64_t word = StructuredWord(mask, s, head, local_i, local_j0);
  if (mask.dense.words == nullptr || word == 0) return word;
  return word & DenseWord(mask.dense, s, head, s.q_offset + local_i, s.kv_offset + local_j0);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MASK_H_
