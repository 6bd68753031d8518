#include "tests/oracle/visibility.h"

#include <algorithm>

#include "tests/oracle/tensor.h"

namespace tandem::oracle {
namespace {

template <typename Term>
const Term* FindTerm(const tandem_problem& problem, tandem_mask_kind kind) {
  for (int32_t t = 0; t < problem.mask_term_count; ++t) {
    if (problem.mask_terms[t]->kind == kind) {
      return reinterpret_cast<const Term*>(problem.mask_terms[t]);
    }
  }
  return nullptr;
}

template <typename Term>
const Term& As(const tandem_mask_term* term) {
  return *reinterpret_cast<const Term*>(term);
}

// Element (b, h) of an i32 array [B or 1, Hq or 1].
int64_t HeadElement(const tandem_tensor& t, int64_t b, int64_t h) {
  return LoadInteger(t, b * BroadcastStride(t, 0) + h * BroadcastStride(t, 1));
}

int64_t BandLeft(const tandem_band_term& term, int64_t b, int64_t h) {
  return term.left_per_head != nullptr ? HeadElement(*term.left_per_head, b, h) : term.left;
}
int64_t BandRight(const tandem_band_term& term, int64_t b, int64_t h) {
  return term.right_per_head != nullptr ? HeadElement(*term.right_per_head, b, h) : term.right;
}

int64_t Diagonal(const SequenceRange& s, tandem_alignment alignment, int64_t row) {
  return alignment == TANDEM_ALIGN_BOTTOM_RIGHT ? row + (s.kv_len - s.q_len) : row;
}

// Offset and key stride of row (b, h, i) of an array broadcastable from rank 2, 3 or 4.
void BroadcastRow(const tandem_tensor& t, int64_t b, int64_t h, int64_t i, int64_t* offset,
                  int64_t* key_stride) {
  const int rows = t.rank - 2;
  *offset = i * BroadcastStride(t, rows);
  *key_stride = BroadcastStride(t, rows + 1);
  if (t.rank >= 3) *offset += b * BroadcastStride(t, 0);
  if (t.rank == 4) *offset += h * BroadcastStride(t, 1);
}

}  // namespace

Dimensions DimensionsOf(const tandem_problem& problem) {
  const tandem_tensor& q = *problem.q;
  const tandem_tensor& k = *problem.k;
  const tandem_tensor& v = *problem.v;
  Dimensions d = {};
  if (problem.layout == TANDEM_LAYOUT_THD) {
    d.packed = true;
    const auto* packed = FindTerm<tandem_packed_term>(problem, TANDEM_MASK_PACKED);
    d.batch = packed->cu_seqlens_q->shape[0] - 1;
    d.q_rows = q.shape[0];
    d.kv_rows = k.shape[0];
    d.q_heads = q.shape[1];
    d.kv_heads = k.shape[1];
    d.qk_dim = q.shape[2];
    d.v_dim = v.shape[2];
    return d;
  }
  const bool heads_first = problem.layout == TANDEM_LAYOUT_BHSD;
  const int head_axis = heads_first ? 1 : 2;
  const int row_axis = heads_first ? 2 : 1;
  d.batch = q.shape[0];
  d.q_heads = q.shape[head_axis];
  d.kv_heads = k.shape[head_axis];
  d.q_rows = q.shape[row_axis];
  d.kv_rows = k.shape[row_axis];
  d.qk_dim = q.shape[3];
  d.v_dim = v.shape[3];
  return d;
}

int64_t SequenceCount(const tandem_problem& problem) { return DimensionsOf(problem).batch; }

SequenceRange SequenceOf(const tandem_problem& problem, int64_t b) {
  const Dimensions d = DimensionsOf(problem);
  SequenceRange s = {};
  s.q_rows = d.q_rows;
  s.kv_rows = d.kv_rows;
  s.q_offset = problem.q_offset;
  s.kv_offset = problem.kv_offset;
  s.q_len = problem.global_q_len != 0 ? problem.global_q_len : d.q_rows;
  s.kv_len = problem.global_kv_len != 0 ? problem.global_kv_len : d.kv_rows;
  if (d.packed) {
    const auto* packed = FindTerm<tandem_packed_term>(problem, TANDEM_MASK_PACKED);
    const tandem_tensor& cu_q = *packed->cu_seqlens_q;
    const tandem_tensor& cu_k = *packed->cu_seqlens_k;
    s.q_start = LoadInteger(cu_q, b * cu_q.strides[0]);
    s.kv_start = LoadInteger(cu_k, b * cu_k.strides[0]);
    s.q_rows = LoadInteger(cu_q, (b + 1) * cu_q.strides[0]) - s.q_start;
    s.kv_rows = LoadInteger(cu_k, (b + 1) * cu_k.strides[0]) - s.kv_start;
    s.q_len = s.q_rows;
    s.kv_len = s.kv_rows;
  }
  for (int32_t t = 0; t < problem.mask_term_count; ++t) {
    if (problem.mask_terms[t]->kind != TANDEM_MASK_LENGTHS) continue;
    const auto& lengths = As<tandem_lengths_term>(problem.mask_terms[t]);
    if (lengths.q_lengths != nullptr) {
      s.q_len =
          std::min(s.q_len, LoadInteger(*lengths.q_lengths, b * lengths.q_lengths->strides[0]));
    }
    if (lengths.kv_lengths != nullptr) {
      s.kv_len =
          std::min(s.kv_len, LoadInteger(*lengths.kv_lengths, b * lengths.kv_lengths->strides[0]));
    }
  }
  return s;
}

int64_t SequenceOfPackedRow(const tandem_problem& problem, int64_t row) {
  const int64_t count = SequenceCount(problem);
  for (int64_t b = 0; b < count; ++b) {
    const SequenceRange s = SequenceOf(problem, b);
    if (row >= s.q_start && row < s.q_start + s.q_rows) return b;
  }
  return -1;
}

bool Visible(const tandem_problem& problem, int64_t b, int64_t h, int64_t i, int64_t j) {
  const SequenceRange s = SequenceOf(problem, b);
  return RowVisibility(problem, s, b, h, i).Allows(j);
}

bool VisibilityDependsOnHead(const tandem_problem& problem) {
  const auto by_head = [](const tandem_tensor* t, int axis) {
    return t != nullptr && t->shape[axis] != 1;
  };
  for (int32_t t = 0; t < problem.mask_term_count; ++t) {
    const tandem_mask_term* term = problem.mask_terms[t];
    if (term->kind == TANDEM_MASK_BAND) {
      const auto& band = As<tandem_band_term>(term);
      if (by_head(band.left_per_head, 1) || by_head(band.right_per_head, 1)) return true;
    } else if (term->kind == TANDEM_MASK_ROW_RANGES) {
      if (by_head(As<tandem_row_ranges_term>(term).ranges, 1)) return true;
    } else if (term->kind == TANDEM_MASK_DENSE) {
      const auto& dense = As<tandem_dense_term>(term);
      if (dense.mask->rank == 4 && by_head(dense.mask, 1)) return true;
    } else if (term->kind == TANDEM_MASK_BLOCK_SPARSE) {
      const auto& blocks = As<tandem_block_sparse_term>(term);
      if (by_head(blocks.counts, 1) || by_head(blocks.indices, 1) ||
          by_head(blocks.full_counts, 1) || by_head(blocks.full_indices, 1)) {
        return true;
      }
    }
  }
  return problem.bias != nullptr && problem.bias->rank == 4 && by_head(problem.bias, 1);
}

RowVisibility::RowVisibility(const tandem_problem& problem, const SequenceRange& sequence,
                             int64_t b, int64_t h, int64_t i)
    : problem_(problem),
      sequence_(sequence),
      b_(b),
      h_(h),
      row_(sequence.q_offset + i),
      row_exists_(i < sequence.q_rows && sequence.q_offset + i < sequence.q_len) {
  if (!row_exists_) return;
  end_ = std::clamp<int64_t>(sequence.kv_len - sequence.kv_offset, 0, sequence.kv_rows);
  for (int32_t t = 0; t < problem.mask_term_count; ++t) {
    const tandem_mask_term* term = problem.mask_terms[t];
    if (term->kind == TANDEM_MASK_BAND) {
      NarrowByBand(As<tandem_band_term>(term));
    } else if (term->kind != TANDEM_MASK_LENGTHS && term->kind != TANDEM_MASK_PACKED) {
      exact_ = false;
    }
  }
  end_ = std::max(begin_, end_);
}

// Only an aid to speed: Allows() decides by itself.
void RowVisibility::NarrowByBand(const tandem_band_term& term) {
  if (term.prefix != nullptr) {
    exact_ = false;
    return;
  }
  const int64_t d = Diagonal(sequence_, term.alignment, row_) - sequence_.kv_offset;
  const int64_t left = BandLeft(term, b_, h_);
  const int64_t right = BandRight(term, b_, h_);
  if (left >= 0) begin_ = std::max(begin_, d - left);
  if (right >= 0) end_ = std::min(end_, d + right + 1);
}

bool RowVisibility::Allows(int64_t j) const {
  if (!row_exists_ || j < 0 || j >= sequence_.kv_rows) return false;
  const int64_t key = sequence_.kv_offset + j;
  if (key >= sequence_.kv_len) return false;
  for (int32_t t = 0; t < problem_.mask_term_count; ++t) {
    const tandem_mask_term* term = problem_.mask_terms[t];
    bool allowed = true;
    switch (term->kind) {
      case TANDEM_MASK_BAND:
        allowed = BandAllows(As<tandem_band_term>(term), key);
        break;
      case TANDEM_MASK_ROW_RANGES:
        allowed = RangesAllow(As<tandem_row_ranges_term>(term), key);
        break;
      case TANDEM_MASK_SEGMENTS:
        allowed = SegmentsAllow(As<tandem_segments_term>(term), key);
        break;
      case TANDEM_MASK_DENSE:
        allowed = DenseAllows(As<tandem_dense_term>(term), key);
        break;
      case TANDEM_MASK_BLOCK_SPARSE:
        allowed = BlocksAllow(As<tandem_block_sparse_term>(term), key);
        break;
      default:  // lengths and packed sequences are in sequence_
        break;
    }
    if (!allowed) return false;
  }
  return true;
}

bool RowVisibility::BandAllows(const tandem_band_term& term, int64_t key) const {
  if (term.prefix != nullptr &&
      key < LoadInteger(*term.prefix, b_ * BroadcastStride(*term.prefix, 0))) {
    return true;
  }
  const int64_t d = Diagonal(sequence_, term.alignment, row_);
  const int64_t left = BandLeft(term, b_, h_);
  const int64_t right = BandRight(term, b_, h_);
  return (left < 0 || key >= d - left) && (right < 0 || key <= d + right);
}

bool RowVisibility::RangesAllow(const tandem_row_ranges_term& term, int64_t key) const {
  const tandem_tensor& t = *term.ranges;
  const int64_t row =
      b_ * BroadcastStride(t, 0) + h_ * BroadcastStride(t, 1) + row_ * BroadcastStride(t, 2);
  for (int64_t r = 0; r < t.shape[3]; ++r) {
    const int64_t range = row + r * t.strides[3];
    if (LoadInteger(t, range) <= key && key < LoadInteger(t, range + t.strides[4])) return true;
  }
  return false;
}

bool RowVisibility::SegmentsAllow(const tandem_segments_term& term, int64_t key) const {
  const auto segment = [this](const tandem_tensor& t, int64_t start, int64_t index) {
    if (t.rank == 1) return LoadInteger(t, (start + index) * t.strides[0]);
    return LoadInteger(t, b_ * BroadcastStride(t, 0) + index * t.strides[1]);
  };
  const int64_t own = segment(*term.q_segments, sequence_.q_start, row_);
  return own >= 0 && own == segment(*term.kv_segments, sequence_.kv_start, key);
}

bool RowVisibility::DenseAllows(const tandem_dense_term& term, int64_t key) const {
  const tandem_tensor& t = *term.mask;
  if (term.sequence_offsets != nullptr) {
    const tandem_tensor& offsets = *term.sequence_offsets;
    const int64_t first = LoadInteger(offsets, b_ * offsets.strides[0]);
    return LoadTruth(t, (first + row_ * sequence_.kv_len + key) * t.strides[0]);
  }
  int64_t offset, key_stride;
  BroadcastRow(t, b_, h_, row_, &offset, &key_stride);
  return LoadTruth(t, offset + key * key_stride);
}

bool RowVisibility::Listed(const tandem_tensor* counts, const tandem_tensor* indices,
                           int64_t q_block, int64_t kv_block) const {
  if (counts == nullptr) return false;
  const int64_t count =
      LoadInteger(*counts, b_ * BroadcastStride(*counts, 0) + h_ * BroadcastStride(*counts, 1) +
                               q_block * counts->strides[2]);
  const int64_t row = b_ * BroadcastStride(*indices, 0) + h_ * BroadcastStride(*indices, 1) +
                      q_block * indices->strides[2];
  for (int64_t n = 0; n < count; ++n) {
    if (LoadInteger(*indices, row + n * indices->strides[3]) == kv_block) return true;
  }
  return false;
}

bool RowVisibility::BlocksAllow(const tandem_block_sparse_term& term, int64_t key) const {
  const int64_t q_block = row_ / term.q_block;
  const int64_t kv_block = key / term.kv_block;
  return Listed(term.counts, term.indices, q_block, kv_block) ||
         Listed(term.full_counts, term.full_indices, q_block, kv_block);
}

double BiasRow::At(int64_t global_key) const {
  return LoadReal(*tensor, offset + global_key * stride);
}

BiasRow BiasRowOf(const tandem_problem& problem, const SequenceRange& sequence, int64_t b,
                  int64_t h, int64_t i) {
  BiasRow row;
  if (problem.bias == nullptr) return row;
  row.tensor = problem.bias;
  BroadcastRow(*problem.bias, b, h, sequence.q_offset + i, &row.offset, &row.stride);
  return row;
}

int64_t CountVisibleKeys(const tandem_problem& problem, const SequenceRange& sequence, int64_t b,
                         int64_t h, int64_t i) {
  const RowVisibility row(problem, sequence, b, h, i);
  const BiasRow bias = BiasRowOf(problem, sequence, b, h, i);
  if (row.exact() && bias.tensor == nullptr) return row.end() - row.begin();
  int64_t count = 0;
  for (int64_t j = row.begin(); j < row.end(); ++j) {
    if (!row.Allows(j)) continue;
    if (bias.tensor != nullptr && bias.At(sequence.kv_offset + j) == -INFINITY) continue;
    ++count;
  }
  return count;
}

}  // namespace tandem::oracle
