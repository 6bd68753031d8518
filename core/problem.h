// The validated, normalised problem that kernels receive: plain data, the same on host and device
// and across the plugin boundary. Only core/validate.cpp makes one.
#ifndef TANDEM_CORE_PROBLEM_H_
#define TANDEM_CORE_PROBLEM_H_

#include "core/element.h"
#include "core/macros.h"
#include "core/mask.h"
#include "core/philox.h"

namespace tandem::core {

// An array indexed by (batch, head, row, column), strides in elements. Packed tensors have batch
// stride 0: a sequence's rows begin at its q_start or kv_start. Broadcast dimensions have stride 0.
// data null: not given.
struct Array4 {
  void* data;
  DType dtype;
  int32_t reserved;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t column_stride;
};

// An i32 or i64 vector. data null: not given.
struct IndexVector {
  const void* data;
  DType dtype;
  int32_t reserved;
  int64_t stride;
};

TANDEM_HD int64_t LoadIndex(const IndexVector& v, int64_t index) {
  return v.dtype == DType::kI64 ? static_cast<const int64_t*>(v.data)[index * v.stride]
                                : static_cast<const int32_t*>(v.data)[index * v.stride];
}

// Rows and keys of one sequence fit the 32-bit coordinates of bands, ranges and Philox.
constexpr int64_t kLongestSequence = (int64_t{1} << 31) - 65;

// Where keys and values lie that are kept in pages: page n of a sequence is page
// pages[batch * batch_stride + n * column_stride] of k and v, whose batch stride is that of a page
// and whose row stride that of a row in it.
struct PageTable {
  const int32_t* pages;
  int64_t batch_stride;
  int64_t column_stride;
  int64_t page_size;
  int64_t page_count;  // that k and v have
};

// A dense term as given: bytes (kBool) or bits (kBit, strides in bits), broadcast dimensions with
// stride 0.
struct DenseSource {
  const uint8_t* data;
  DType dtype;
  int32_t per_sequence;  // sequence b's [q_len, kv_len] matrix begins at offsets[b]; strides unused
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t column_stride;
  const int64_t* offsets;
  int64_t offsets_stride;
  int64_t element_count;  // of the rank-1 tensor, where per_sequence
};

// A block-sparse term as given: counts [b, h, q block] and indices [b, h, q block, n].
struct BlockListSource {
  const int32_t* counts;  // null: this list is not given
  const int32_t* indices;
  int64_t counts_batch_stride, counts_head_stride, counts_row_stride;
  int64_t indices_batch_stride, indices_head_stride, indices_row_stride, indices_stride;
  int64_t capacity;  // N
};
struct BlockSparseSource {
  BlockListSource partial;
  BlockListSource full;
  int64_t q_block, kv_block;
  int64_t q_blocks, kv_blocks;        // how many there are
  int64_t batch_extent, head_extent;  // 1 where broadcast by every list
};

// What core/mask_prepare.h turns into Mask::dense and Mask::block_sparse.
struct MaskSources {
  int32_t dense_count;
  int32_t block_sparse_count;
  DenseSource dense[kMaxDense];
  BlockSparseSource block_sparse[kMaxBlockSparse];
  // Extents of the prepared dense bits: 1 where every dense term is broadcast along that dimension.
  int64_t dense_batch_extent, dense_head_extent, dense_row_extent;
};

enum class Layout : int32_t { kUnset = 0, kBHSD = 1, kBSHD = 2, kTHD = 3 };

struct Problem {
  Layout layout;
  DType dtype;  // of q, k and v
  int32_t device_type;
  int32_t device_index;

  int64_t batch;  // or the number of sequences
  int64_t q_heads;
  int64_t kv_heads;
  int64_t group;   // q_heads / kv_heads
  int64_t q_rows;  // rows of the tensors; packed: of the longest sequence
  int64_t kv_rows;
  int64_t qk_dim;
  int64_t v_dim;
  int64_t q_total;  // packed: rows of q and out, else 0
  int64_t kv_total;

  Array4 q, k, v, out;  // out and lse are results; inputs of the backward pass
  Array4 lse;           // column_stride unused; data null where it was not asked for

  float scale;
  float softcap;

  Array4 bias;  // global rows and columns

  const float* alibi_slopes;
  int64_t alibi_batch_stride, alibi_head_stride;
  Alignment alibi_alignment;
  int32_t is_backward;

  const float* sink;
  int64_t sink_stride;

  Dropout dropout;

  // Where each sequence's rows are. packed: cu_seqlens; lengths: optional, local lengths of the
  // sequence.
  IndexVector cu_seqlens_q, cu_seqlens_k;
  IndexVector q_lengths, kv_lengths;
  int64_t q_offset, kv_offset;  // shard
  int64_t global_q_len, global_kv_len;

  int32_t has_block_table;  // keys and values are in pages: KeyRowOffset, not KeyOffset
  int32_t has_kv_cache;     // k, v and kv_lengths are those of a cache in host memory
  PageTable page_table;

  int32_t* device_status;

  Mask mask;
  MaskSources sources;
  int32_t mask_is_prepared;  // by a mask plan: mask.dense and mask.block_sparse are ready
  int32_t deterministic;

  // The backward pass (is_backward). Laid out as the tensor that each belongs to; data null: not
  // given, or a gradient that is not wanted.
  Array4 dout, dlse;
  Array4 dq, dk, dv;  // the dtype of q, or f32
  Array4 dbias;       // f32; strides 0 where the bias is broadcast
  float* dsink;
  int64_t dsink_stride;
  float* dalibi;
  int64_t dalibi_batch_stride, dalibi_head_stride;
};

TANDEM_HD bool IsPacked(const Problem& p) { return p.layout == Layout::kTHD; }

// Sequence b of the problem. Data on a device cannot be trusted: everything is clamped so that no
// row outside the tensors is ever named; *status gains the bits of what was clamped
// (TANDEM_DEVICE_STATUS_*).
TANDEM_HD Sequence ResolveSequence(const Problem& p, int64_t b, int32_t* status) {
  Sequence s;
  s.batch = b;
  s.q_start = 0;
  s.kv_start = 0;
  s.q_rows = p.q_rows;
  s.kv_rows = p.kv_rows;
  s.q_offset = p.q_offset;
  s.kv_offset = p.kv_offset;
  s.q_len = p.global_q_len;
  s.kv_len = p.global_kv_len;
  if (IsPacked(p)) {
    const int64_t q_begin = LoadIndex(p.cu_seqlens_q, b), q_end = LoadIndex(p.cu_seqlens_q, b + 1);
    const int64_t kv_begin = LoadIndex(p.cu_seqlens_k, b),
                  kv_end = LoadIndex(p.cu_seqlens_k, b + 1);
    s.q_start = Clamp<int64_t>(q_begin, 0, p.q_total);
    s.kv_start = Clamp<int64_t>(kv_begin, 0, p.kv_total);
    s.q_rows = Min(Clamp<int64_t>(q_end, s.q_start, p.q_total) - s.q_start, p.q_rows);
    s.kv_rows = Min(Clamp<int64_t>(kv_end, s.kv_start, p.kv_total) - s.kv_start, p.kv_rows);
    s.q_len = s.q_rows;
    s.kv_len = s.kv_rows;
    if (s.q_start != q_begin || s.q_start + s.q_rows != q_end || s.kv_start != kv_begin ||
        s.kv_start + s.kv_rows != kv_end) {
      *status |= 1;
    }
  }
  if (p.q_lengths.data != nullptr) {
    const int64_t length = LoadIndex(p.q_lengths, b);
    const int64_t clamped = Clamp<int64_t>(length, 0, s.q_len);
    if (clamped != length) *status |= 2;
    s.q_len = clamped;
  }
  if (p.kv_lengths.data != nullptr) {
    const int64_t length = LoadIndex(p.kv_lengths, b);
    const int64_t clamped = Clamp<int64_t>(length, 0, s.kv_len);
    if (clamped != length) *status |= 2;
    s.kv_len = clamped;
  }
  return s;
}

// Element offsets of local row `row` of a sequence.
TANDEM_HD int64_t QueryOffset(const Array4& a, const Sequence& s, int64_t head, int64_t row) {
  return s.batch * a.batch_stride + head * a.head_stride + (s.q_start + row) * a.row_stride;
}
TANDEM_HD int64_t KeyOffset(const Array4& a, const Sequence& s, int64_t head, int64_t row) {
  return s.batch * a.batch_stride + head * a.head_stride + (s.kv_start + row) * a.row_stride;
}

// Page n of a sequence. Data on a device is clamped, and *status says so.
TANDEM_HD int64_t LoadPage(const PageTable& table, int64_t batch, int64_t n, int32_t* status) {
  const int64_t page = table.pages[batch * table.batch_stride + n * table.column_stride];
  const int64_t clamped = Clamp<int64_t>(page, 0, table.page_count - 1);
  if (clamped != page) *status |= 16;
  return clamped;
}
// As KeyOffset, for kernels that serve pages too.
TANDEM_HD int64_t KeyRowOffset(const Problem& p, const Array4& a, const Sequence& s, int64_t head,
                               int64_t row) {
  if (!p.has_block_table) return KeyOffset(a, s, head, row);
  int32_t status = 0;
  const int64_t page = LoadPage(p.page_table, s.batch, row / p.page_table.page_size, &status);
  return page * a.batch_stride + head * a.head_stride + row % p.page_table.page_size * a.row_stride;
}
// Bias of global row i, global key j.
TANDEM_HD int64_t BiasOffset(const Array4& a, const Sequence& s, int64_t head, int64_t i,
                             int64_t j) {
  return s.batch * a.batch_stride + head * a.head_stride + i * a.row_stride + j * a.column_stride;
}

TANDEM_HD float AlibiSlope(const Problem& p, const Sequence& s, int64_t head) {
  return p.alibi_slopes[s.batch * p.alibi_batch_stride + head * p.alibi_head_stride];
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_PROBLEM_H_
