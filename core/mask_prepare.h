// Preparation of the mask terms that are data: dense terms become packed bits and tile classes,
// block lists become bit rows. Host and device run the same functions over the same layout; the
// backends only supply the loop.
//
// A prepared buffer lies in the caller's memory: LayOutPreparation gives its size, BindPreparation
// points Mask at it.
#ifndef TANDEM_CORE_MASK_PREPARE_H_
#define TANDEM_CORE_MASK_PREPARE_H_

#include "core/problem.h"
#include "tandem/tandem.h"

namespace tandem::core {

inline constexpr int64_t kBufferAlignment = 256;

struct PreparationLayout {
  int64_t dense_words_offset;
  int64_t dense_word_count;
  int64_t dense_classes_offset;
  int64_t dense_class_count;
  int64_t block_bits_offset[kMaxBlockSparse];
  int64_t block_word_count[kMaxBlockSparse];
  int64_t size;  // bytes, a multiple of kBufferAlignment; 0: nothing to prepare
};

TANDEM_HD int64_t DenseWordsPerRow(const Problem& p) {
  return CeilDiv<int64_t>(p.global_kv_len, 64);
}
TANDEM_HD int64_t DenseTileRows(const Problem& p) {
  return CeilDiv<int64_t>(p.sources.dense_row_extent, kTile);
}
// Words of one (batch, head). On CUDA a canonical tile's words lie together, on the CPU a row's.
TANDEM_HD bool DenseIsTiled(const Problem& p) {
  return p.device_type == TANDEM_DEVICE_CUDA && p.sources.dense_row_extent > 1;
}
TANDEM_HD int64_t DensePlaneWords(const Problem& p) {
  const int64_t rows = DenseIsTiled(p) ? DenseTileRows(p) * kTile : p.sources.dense_row_extent;
  return rows * DenseWordsPerRow(p);
}
TANDEM_HD int64_t BlockWordsPerRow(const BlockSparseSource& source) {
  return CeilDiv<int64_t>(source.kv_blocks, 32);
}

TANDEM_HD PreparationLayout LayOutPreparation(const Problem& p) {
  PreparationLayout layout = {};
  if (p.mask_is_prepared) return layout;
  int64_t offset = 0;
  if (p.sources.dense_count > 0) {
    const int64_t planes = p.sources.dense_batch_extent * p.sources.dense_head_extent;
    layout.dense_word_count = planes * DensePlaneWords(p);
    layout.dense_class_count = planes * DenseTileRows(p) * DenseWordsPerRow(p);
    layout.dense_words_offset = offset;
    offset = RoundUp(offset + 8 * layout.dense_word_count, kBufferAlignment);
    layout.dense_classes_offset = offset;
    offset = RoundUp(offset + layout.dense_class_count, kBufferAlignment);
  }
  for (int t = 0; t < p.sources.block_sparse_count; ++t) {
    const BlockSparseSource& source = p.sources.block_sparse[t];
    layout.block_word_count[t] =
        source.batch_extent * source.head_extent * source.q_blocks * BlockWordsPerRow(source);
    layout.block_bits_offset[t] = offset;
    offset = RoundUp(offset + 4 * layout.block_word_count[t], kBufferAlignment);
  }
  layout.size = offset;
  return layout;
}

TANDEM_HD void BindPreparation(const PreparationLayout& layout, void* buffer, Problem* p) {
  if (p->mask_is_prepared) return;
  char* base = static_cast<char*>(buffer);
  if (p->sources.dense_count > 0) {
    DenseBits& dense = p->mask.dense;
    const int64_t row = DenseWordsPerRow(*p);
    const int64_t plane = DensePlaneWords(*p);
    const int64_t class_plane = DenseTileRows(*p) * row;
    dense.words = reinterpret_cast<const uint64_t*>(base + layout.dense_words_offset);
    dense.classes = reinterpret_cast<const uint8_t*>(base + layout.dense_classes_offset);
    dense.tile_stride = p->sources.dense_row_extent == 1 ? 0 : kTile * row;
    dense.row_stride = p->sources.dense_row_extent == 1 ? 0 : (DenseIsTiled(*p) ? 1 : row);
    dense.word_stride = DenseIsTiled(*p) ? kTile : 1;
    dense.bit_order = p->device_type == TANDEM_DEVICE_CUDA ? BitOrder::kQuad : BitOrder::kNatural;
    dense.head_stride = p->sources.dense_head_extent == 1 ? 0 : plane;
    dense.batch_stride =
        p->sources.dense_batch_extent == 1 ? 0 : plane * p->sources.dense_head_extent;
    dense.class_row_stride = p->sources.dense_row_extent == 1 ? 0 : row;
    dense.class_head_stride = p->sources.dense_head_extent == 1 ? 0 : class_plane;
    dense.class_batch_stride =
        p->sources.dense_batch_extent == 1 ? 0 : class_plane * p->sources.dense_head_extent;
    dense.q_extent = p->global_q_len;
    dense.kv_extent = p->global_kv_len;
  }
  p->mask.block_sparse_count = p->sources.block_sparse_count;
  for (int t = 0; t < p->sources.block_sparse_count; ++t) {
    const BlockSparseSource& source = p->sources.block_sparse[t];
    BlockSparseTerm& term = p->mask.block_sparse[t];
    term.bits = reinterpret_cast<const uint32_t*>(base + layout.block_bits_offset[t]);
    term.row_stride = BlockWordsPerRow(source);
    term.head_stride = source.head_extent == 1 ? 0 : source.q_blocks * term.row_stride;
    term.batch_stride =
        source.batch_extent == 1 ? 0 : source.head_extent * source.q_blocks * term.row_stride;
    term.q_block = source.q_block;
    term.kv_block = source.kv_block;
  }
}

TANDEM_HD bool DenseSourceAllows(const DenseSource& source, int64_t index) {
  return source.dtype == DType::kBit ? (source.data[index >> 3] >> (index & 7)) & 1
                                     : source.data[index] != 0;
}

struct alignas(16) Bytes16 {
  uint64_t low;
  uint64_t high;
};

// Bit t: byte t is not 0.
TANDEM_HD uint64_t NonzeroBytes(uint64_t bytes) {
  constexpr uint64_t kLow7 = 0x7f7f7f7f7f7f7f7fu;
  const uint64_t top = (((bytes & kLow7) + kLow7) | bytes) & ~kLow7;
  return ((top >> 7) * 0x0102040810204080u) >> 56;
}

// 64 keys from j0 on of one dense term, global row i. Keys at or beyond kv_end read nothing and are
// not allowed.
TANDEM_HD uint64_t DenseSourceWord(const DenseSource& source, const Sequence& s, int64_t head,
                                   int64_t i, int64_t j0, int64_t kv_end, int32_t* status) {
  const int64_t count = Min<int64_t>(64, kv_end - j0);
  int64_t index = s.batch * source.batch_stride + head * source.head_stride +
                  i * source.row_stride + j0 * source.column_stride;
  int64_t stride = source.column_stride;
  if (source.per_sequence) {
    const int64_t begin = source.offsets[s.batch * source.offsets_stride];
    if (i >= s.q_len || j0 >= s.kv_len) return 0;
    if (begin < 0 || begin > source.element_count - s.q_len * s.kv_len) {
      *status |= 8;
      return 0;
    }
    index = begin + i * s.kv_len + j0;
    stride = 1;
  }
  const int64_t end = source.per_sequence ? Min<int64_t>(count, s.kv_len - j0) : count;
  uint64_t word = 0;
  if (end == 64 && stride == 1 && source.dtype == DType::kBool &&
      reinterpret_cast<uintptr_t>(source.data + index) % 16 == 0) {
    for (int part = 0; part < 4; ++part) {
      const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(source.data + index + 16 * part);
      word |= (NonzeroBytes(bytes.low) | NonzeroBytes(bytes.high) << 8) << (16 * part);
    }
    return word;
  }
  for (int64_t j = 0; j < end; ++j) {
    word |= uint64_t{DenseSourceAllows(source, index + j * stride)} << j;
  }
  return word;
}

// Stores a word of the prepared bits, given in natural order.
TANDEM_HD void StoreDenseWord(const Problem& p, const PreparationLayout& layout, void* buffer,
                              int64_t batch, int64_t head, int64_t i, int64_t word_index,
                              uint64_t word) {
  uint64_t* words =
      reinterpret_cast<uint64_t*>(static_cast<char*>(buffer) + layout.dense_words_offset);
  const DenseBits& dense = p.mask.dense;
  words[DenseWordIndex(dense, batch, head, i, word_index)] =
      dense.bit_order == BitOrder::kQuad ? ToQuadOrder(word) : word;
}

// Makes the packed words and the class of one canonical tile of plane (batch, head) of the prepared
// dense bits: PrepareDenseRow for each row, then FinishDenseTile with whether any and all of its
// pairs are allowed.
TANDEM_HD uint64_t PrepareDenseRow(const Problem& p, const PreparationLayout& layout, void* buffer,
                                   int64_t batch, int64_t head, int64_t i, int64_t word_index,
                                   int32_t* status) {
  Sequence s;
  if (p.sources.dense_batch_extent == 1 && p.batch != 1) {
    s = {};  // no term depends on the batch
    s.q_len = p.global_q_len;
    s.kv_len = p.global_kv_len;
  } else {
    s = ResolveSequence(p, batch, status);
  }
  uint64_t word = ~uint64_t{0};
  for (int t = 0; t < p.sources.dense_count; ++t) {
    word &=
        DenseSourceWord(p.sources.dense[t], s, head, i, word_index * 64, p.global_kv_len, status);
  }
  StoreDenseWord(p, layout, buffer, batch, head, i, word_index, word);
  return word;
}

// All the bits that a word can have at this index.
TANDEM_HD uint64_t DenseWordCapacity(const Problem& p, int64_t word_index) {
  return IntervalWord(0, p.global_kv_len - word_index * 64);
}

TANDEM_HD void FinishDenseTile(const Problem& p, const PreparationLayout& layout, void* buffer,
                               int64_t batch, int64_t head, int64_t tile_row, int64_t word_index,
                               bool any, bool all) {
  const TileClass tile = !any ? TileClass::kEmpty : (all ? TileClass::kFull : TileClass::kPartial);
  uint8_t* classes =
      reinterpret_cast<uint8_t*>(static_cast<char*>(buffer) + layout.dense_classes_offset);
  classes[((batch * p.sources.dense_head_extent + head) * DenseTileRows(p) + tile_row) *
              DenseWordsPerRow(p) +
          word_index] = static_cast<uint8_t>(tile);
}

TANDEM_HD void ListBlocks(const BlockListSource& list, const BlockSparseSource& source,
                          int64_t batch, int64_t head, int64_t q_block, uint32_t* row,
                          int32_t* status) {
  if (list.counts == nullptr) return;
  const int64_t given =
      list.counts[batch * list.counts_batch_stride + head * list.counts_head_stride +
                  q_block * list.counts_row_stride];
  const int64_t count = Clamp<int64_t>(given, 0, list.capacity);
  if (count != given) *status |= 4;
  const int32_t* indices = list.indices + batch * list.indices_batch_stride +
                           head * list.indices_head_stride + q_block * list.indices_row_stride;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t block = indices[n * list.indices_stride];
    if (block < 0 || block >= source.kv_blocks) {
      *status |= 4;
      continue;
    }
    row[block >> 5] |= uint32_t{1} << (block & 31);
  }
}

// Makes the bit row of one (batch, head, query block) of block-sparse term t.
TANDEM_HD void PrepareBlockRow(const Problem& p, const PreparationLayout& layout, void* buffer,
                               int t, int64_t batch, int64_t head, int64_t q_block,
                               int32_t* status) {
  const BlockSparseSource& source = p.sources.block_sparse[t];
  const int64_t words = BlockWordsPerRow(source);
  uint32_t* row =
      reinterpret_cast<uint32_t*>(static_cast<char*>(buffer) + layout.block_bits_offset[t]) +
      ((batch * source.head_extent + head) * source.q_blocks + q_block) * words;
  for (int64_t w = 0; w < words; ++w) row[w] = 0;
  ListBlocks(source.partial, source, batch, head, q_block, row, status);
  ListBlocks(source.full, source, batch, head, q_block, row, status);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MASK_PREPARE_H_
