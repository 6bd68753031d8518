#include "core/validate_mask.h"

#include "core/mask_prepare.h"
#include "core/validate_term.h"

namespace tandem::core {
namespace {

class TermValidator : public TermCheck {
 public:
  TermValidator(const tandem_problem& in, Checker* check, Problem* p)
      : TermCheck(in, check), p_(*p) {}

  bool All() {
    bool has_lengths = false;
    for (int t = 0; t < in_.mask_term_count; ++t) {
      const tandem_mask_term* term = in_.mask_terms[t];
      Begin(t);
      switch (term == nullptr ? TANDEM_MASK_UNSET : term->kind) {
        case TANDEM_MASK_BAND:
          if (!Sized<tandem_band_term>(*term) || !Band(*As<tandem_band_term>(term))) return false;
          break;
        case TANDEM_MASK_ROW_RANGES:
          if (!Sized<tandem_row_ranges_term>(*term) ||
              !RowRanges(*As<tandem_row_ranges_term>(term)))
            return false;
          break;
        case TANDEM_MASK_LENGTHS:
          if (has_lengths) return check_.Fail("%skind is LENGTHS, must be given once", Prefix());
          has_lengths = true;
          if (!Sized<tandem_lengths_term>(*term) || !Lengths(*As<tandem_lengths_term>(term)))
            return false;
          break;
        case TANDEM_MASK_PACKED:
          if (p_.layout != Layout::kTHD) {
            return check_.Fail("%skind is PACKED, must come with TANDEM_LAYOUT_THD", Prefix());
          }
          break;
        case TANDEM_MASK_SEGMENTS:
          if (!Sized<tandem_segments_term>(*term) || !Segments(*As<tandem_segments_term>(term)))
            return false;
          break;
        case TANDEM_MASK_DENSE:
          if (!Sized<tandem_dense_term>(*term) || !Dense(*As<tandem_dense_term>(term)))
            return false;
          break;
        case TANDEM_MASK_BLOCK_SPARSE:
          if (!Sized<tandem_block_sparse_term>(*term) ||
              !BlockSparse(*As<tandem_block_sparse_term>(term)))
            return false;
          break;
        default:
          if (term == nullptr) {
            return check_.Fail("mask_terms[%d] is null, must point to a term", t);
          }
          return check_.Fail("%skind is %d, must be one of TANDEM_MASK_* (1 to 7)", Prefix(),
                             term->kind);
      }
    }
    return true;
  }

 private:
  bool HeadArrayTensor(const char* field, const tandem_tensor* t, HeadArray* array) {
    if (t == nullptr) return true;
    if (!Tensor(field, t, {TANDEM_DTYPE_I32}, {2}) ||
        !BroadcastExtent(field, *t, 0, p_.batch, "the batch") ||
        !BroadcastExtent(field, *t, 1, p_.q_heads, "the heads of q")) {
      return false;
    }
    *array = {static_cast<const int32_t*>(t->data), BroadcastStride(*t, 0), BroadcastStride(*t, 1)};
    if (!OnHost()) return true;
    for (int64_t b = 0; b < t->shape[0]; ++b) {
      for (int64_t h = 0; h < t->shape[1]; ++h) {
        const int32_t value = HeadValue(*array, 0, b, h);
        if (value < -1) {
          return check_.Fail("%s%s[%lld, %lld] is %d, must be >= 0, or -1 for unbounded", Prefix(),
                             field, static_cast<long long>(b), static_cast<long long>(h), value);
        }
      }
    }
    return true;
  }

  bool Band(const tandem_band_term& term) {
    if (p_.mask.band_count == kMaxBands) return TooMany("band", kMaxBands);
    BandTerm& band = p_.mask.bands[p_.mask.band_count++];
    if (term.alignment != TANDEM_ALIGN_TOP_LEFT && term.alignment != TANDEM_ALIGN_BOTTOM_RIGHT) {
      return check_.Fail(
          "%salignment is %d, must be TANDEM_ALIGN_TOP_LEFT (1) or "
          "TANDEM_ALIGN_BOTTOM_RIGHT (2)",
          Prefix(), term.alignment);
    }
    band.alignment = static_cast<Alignment>(term.alignment);
    if (term.left < -1 || term.right < -1) {
      return check_.Fail("%s%s is %d, must be >= 0, or -1 for unbounded", Prefix(),
                         term.left < -1 ? "left" : "right",
                         term.left < -1 ? term.left : term.right);
    }
    band.left = term.left;
    band.right = term.right;
    if (!HeadArrayTensor("left_per_head", term.left_per_head, &band.left_per_head) ||
        !HeadArrayTensor("right_per_head", term.right_per_head, &band.right_per_head)) {
      return false;
    }
    if (term.prefix != nullptr) {
      if (!Tensor("prefix", term.prefix, {TANDEM_DTYPE_I32}, {1}) ||
          !BroadcastExtent("prefix", *term.prefix, 0, p_.batch, "the batch")) {
        return false;
      }
      band.prefix = static_cast<const int32_t*>(term.prefix->data);
      band.prefix_stride = BroadcastStride(*term.prefix, 0);
    }
    return true;
  }

  bool RowRanges(const tandem_row_ranges_term& term) {
    if (p_.mask.row_ranges_count == kMaxRowRanges) return TooMany("row ranges", kMaxRowRanges);
    const tandem_tensor* t = term.ranges;
    if (!Tensor("ranges", t, {TANDEM_DTYPE_I32}, {5}) ||
        !BroadcastExtent("ranges", *t, 0, p_.batch, "the batch") ||
        !BroadcastExtent("ranges", *t, 1, p_.q_heads, "the heads of q") ||
        !BroadcastExtent("ranges", *t, 2, p_.global_q_len, "the rows of a sequence") ||
        !Extent("ranges", *t, 4, 2, "begin and end")) {
      return false;
    }
    p_.mask.row_ranges[p_.mask.row_ranges_count++] = {static_cast<const int32_t*>(t->data),
                                                      BroadcastStride(*t, 0),
                                                      BroadcastStride(*t, 1),
                                                      BroadcastStride(*t, 2),
                                                      t->strides[3],
                                                      t->strides[4],
                                                      t->shape[3]};
    return true;
  }

  bool LengthTensor(const char* field, const tandem_tensor* t, int64_t longest, bool query,
                    IndexVector* vector) {
    if (t == nullptr) return true;
    if (!Tensor(field, t, {TANDEM_DTYPE_I32}, {1}) || !Extent(field, *t, 0, p_.batch, "the batch"))
      return false;
    *vector = {t->data, DType::kI32, 0, t->strides[0]};
    if (!OnHost()) return true;
    for (int64_t b = 0; b < p_.batch; ++b) {
      int64_t limit = longest;
      if (p_.layout == Layout::kTHD) {
        const IndexVector& cu = query ? p_.cu_seqlens_q : p_.cu_seqlens_k;
        limit = LoadIndex(cu, b + 1) - LoadIndex(cu, b);
      }
      const int64_t value = LoadIndex(*vector, b);
      if (value < 0 || value > limit) {
        return check_.Fail("%s%s[%lld] is %lld, must be in [0, %lld]", Prefix(), field,
                           static_cast<long long>(b), static_cast<long long>(value),
                           static_cast<long long>(limit));
      }
    }
    return true;
  }

  bool Lengths(const tandem_lengths_term& term) {
    return LengthTensor("q_lengths", term.q_lengths, p_.global_q_len, true, &p_.q_lengths) &&
           LengthTensor("kv_lengths", term.kv_lengths, p_.global_kv_len, false, &p_.kv_lengths);
  }

  bool SegmentTensor(const char* field, const tandem_tensor* t, int64_t rows, int64_t total,
                     const int32_t** data, int64_t* batch_stride, int64_t* stride) {
    const bool packed = p_.layout == Layout::kTHD;
    if (!Tensor(field, t, {TANDEM_DTYPE_I32}, {packed ? 1 : 2})) return false;
    if (packed) {
      if (!Extent(field, *t, 0, total, "the rows of the packed tensor")) return false;
    } else if (!BroadcastExtent(field, *t, 0, p_.batch, "the batch") ||
               !Extent(field, *t, 1, rows, "the rows of a sequence")) {
      return false;
    }
    *data = static_cast<const int32_t*>(t->data);
    *batch_stride = packed ? 0 : BroadcastStride(*t, 0);
    *stride = t->strides[packed ? 0 : 1];
    return true;
  }

  bool Segments(const tandem_segments_term& term) {
    if (p_.mask.segments_count == kMaxSegments) return TooMany("segments", kMaxSegments);
    SegmentsTerm& out = p_.mask.segments[p_.mask.segments_count++];
    return SegmentTensor("q_segments", term.q_segments, p_.global_q_len, p_.q_total, &out.q,
                         &out.q_batch_stride, &out.q_stride) &&
           SegmentTensor("kv_segments", term.kv_segments, p_.global_kv_len, p_.kv_total, &out.kv,
                         &out.kv_batch_stride, &out.kv_stride);
  }

  bool Dense(const tandem_dense_term& term) {
    MaskSources& sources = p_.sources;
    if (sources.dense_count == kMaxDense) return TooMany("dense", kMaxDense);
    if (sources.dense_count == 0) {
      sources.dense_batch_extent = sources.dense_head_extent = sources.dense_row_extent = 1;
    }
    DenseSource& source = sources.dense[sources.dense_count++];
    const tandem_tensor* t = term.mask;
    const std::initializer_list<tandem_dtype> dtypes = {TANDEM_DTYPE_BOOL, TANDEM_DTYPE_BIT};
    if (term.sequence_offsets != nullptr) {
      if (!Tensor("mask", t, dtypes, {1})) return false;
      if (t->shape[0] > 1 && t->strides[0] != 1) {
        return check_.Fail("%smask: strides[0] is %lld, must be 1 with sequence_offsets", Prefix(),
                           static_cast<long long>(t->strides[0]));
      }
      return PerSequence(*t, *term.sequence_offsets, &source);
    }
    if (!Tensor("mask", t, dtypes, {2, 3, 4})) return false;
    source.data = static_cast<const uint8_t*>(t->data);
    source.dtype = static_cast<DType>(t->dtype);
    if (!ScoreMatrixStrides((prefix_ + "mask").c_str(), *t, p_, &check_, &source.batch_stride,
                            &source.head_stride, &source.row_stride, &source.column_stride)) {
      return false;
    }
    if (source.batch_stride != 0) sources.dense_batch_extent = p_.batch;
    if (source.head_stride != 0) sources.dense_head_extent = p_.q_heads;
    if (source.row_stride != 0) sources.dense_row_extent = p_.global_q_len;
    return true;
  }

  bool PerSequence(const tandem_tensor& mask, const tandem_tensor& offsets, DenseSource* source) {
    if (!Tensor("sequence_offsets", &offsets, {TANDEM_DTYPE_I64}, {1}) ||
        !Extent("sequence_offsets", offsets, 0, p_.batch, "the number of sequences")) {
      return false;
    }
    source->data = static_cast<const uint8_t*>(mask.data);
    source->dtype = static_cast<DType>(mask.dtype);
    source->per_sequence = 1;
    source->offsets = static_cast<const int64_t*>(offsets.data);
    source->offsets_stride = offsets.strides[0];
    source->element_count = mask.shape[0];
    p_.sources.dense_batch_extent = p_.batch;
    p_.sources.dense_row_extent = p_.global_q_len;
    // A lengths term may follow and shorten sequences: the range is checked by the preparation.
    return true;
  }

  bool BlockList(const char* counts_field, const char* indices_field, const tandem_tensor* counts,
                 const tandem_tensor* indices, BlockSparseSource* source, BlockListSource* list) {
    if (!Tensor(counts_field, counts, {TANDEM_DTYPE_I32}, {3}) ||
        !Tensor(indices_field, indices, {TANDEM_DTYPE_I32}, {4})) {
      return false;
    }
    const tandem_tensor* both[] = {counts, indices};
    const char* names[] = {counts_field, indices_field};
    for (int n = 0; n < 2; ++n) {
      if (!BroadcastExtent(names[n], *both[n], 0, p_.batch, "the batch") ||
          !BroadcastExtent(names[n], *both[n], 1, p_.q_heads, "the heads of q") ||
          !Extent(names[n], *both[n], 2, source->q_blocks, "ceil(Sq / q_block)")) {
        return false;
      }
    }
    *list = {static_cast<const int32_t*>(counts->data),
             static_cast<const int32_t*>(indices->data),
             BroadcastStride(*counts, 0),
             BroadcastStride(*counts, 1),
             counts->strides[2],
             BroadcastStride(*indices, 0),
             BroadcastStride(*indices, 1),
             indices->strides[2],
             indices->strides[3],
             indices->shape[3]};
    if (list->counts_batch_stride != 0 || list->indices_batch_stride != 0)
      source->batch_extent = p_.batch;
    if (list->counts_head_stride != 0 || list->indices_head_stride != 0)
      source->head_extent = p_.q_heads;
    return !OnHost() || BlockListInRange(counts_field, indices_field, *list, *source);
  }

  bool BlockListInRange(const char* counts_field, const char* indices_field,
                        const BlockListSource& list, const BlockSparseSource& source) {
    for (int64_t b = 0; b < source.batch_extent; ++b) {
      for (int64_t h = 0; h < source.head_extent; ++h) {
        for (int64_t row = 0; row < source.q_blocks; ++row) {
          const int32_t count =
              list.counts[b * list.counts_batch_stride + h * list.counts_head_stride +
                          row * list.counts_row_stride];
          if (count < 0 || count > list.capacity) {
            return check_.Fail("%s%s[%lld, %lld, %lld] is %d, must be in [0, %lld]", Prefix(),
                               counts_field, static_cast<long long>(b), static_cast<long long>(h),
                               static_cast<long long>(row), count,
                               static_cast<long long>(list.capacity));
          }
          const int32_t* indices = list.indices + b * list.indices_batch_stride +
                                   h * list.indices_head_stride + row * list.indices_row_stride;
          for (int64_t n = 0; n < count; ++n) {
            const int32_t index = indices[n * list.indices_stride];
            if (index < 0 || index >= source.kv_blocks) {
              return check_.Fail("%s%s[%lld, %lld, %lld, %lld] is %d, must be in [0, %lld)",
                                 Prefix(), indices_field, static_cast<long long>(b),
                                 static_cast<long long>(h), static_cast<long long>(row),
                                 static_cast<long long>(n), index,
                                 static_cast<long long>(source.kv_blocks));
            }
          }
        }
      }
    }
    return true;
  }

  bool BlockSparse(const tandem_block_sparse_term& term) {
    if (p_.sources.block_sparse_count == kMaxBlockSparse)
      return TooMany("block-sparse", kMaxBlockSparse);
    BlockSparseSource& source = p_.sources.block_sparse[p_.sources.block_sparse_count++];
    if (term.q_block < 1 || term.kv_block < 1) {
      return check_.Fail("%s%s is %d, must be >= 1", Prefix(),
                         term.q_block < 1 ? "q_block" : "kv_block",
                         term.q_block < 1 ? term.q_block : term.kv_block);
    }
    source.q_block = term.q_block;
    source.kv_block = term.kv_block;
    source.q_blocks = CeilDiv<int64_t>(p_.global_q_len, term.q_block);
    source.kv_blocks = CeilDiv<int64_t>(p_.global_kv_len, term.kv_block);
    source.batch_extent = source.head_extent = 1;
    if (!BlockList("counts", "indices", term.counts, term.indices, &source, &source.partial))
      return false;
    if (term.full_counts == nullptr && term.full_indices == nullptr) return true;
    return BlockList("full_counts", "full_indices", term.full_counts, term.full_indices, &source,
                     &source.full);
  }

  bool TooMany(const char* what, int most) {
    return check_.Fail("%skind: more than %d %s terms, must be at most %d", Prefix(), most, what,
                       most);
  }

  Problem& p_;
};

// On the host every sequence's matrix of a dense term with offsets lies inside the mask.
bool SequenceOffsetsInRange(Checker* check, const Problem& p) {
  for (int t = 0; t < p.sources.dense_count; ++t) {
    const DenseSource& source = p.sources.dense[t];
    if (!source.per_sequence) continue;
    for (int64_t b = 0; b < p.batch; ++b) {
      int32_t status = 0;
      const Sequence s = ResolveSequence(p, b, &status);
      const int64_t offset = source.offsets[b * source.offsets_stride];
      int64_t size = 0;
      if (__builtin_mul_overflow(s.q_len, s.kv_len, &size) || offset < 0 ||
          offset > source.element_count - size) {
        return check->Fail(
            "sequence_offsets[%lld] is %lld, must be in [0, %lld] (the mask's "
            "elements less q_len * kv_len of the sequence)",
            static_cast<long long>(b), static_cast<long long>(offset),
            static_cast<long long>(source.element_count - size));
      }
    }
  }
  return true;
}

}  // namespace

bool MaskTerms(const tandem_problem& in, Checker* check, Problem* p) {
  if (!TermValidator(in, check, p).All()) return false;
  return in.q->device_type != TANDEM_DEVICE_CPU || SequenceOffsetsInRange(check, *p);
}

}  // namespace tandem::core
