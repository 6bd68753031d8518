// What all mask terms have in common: where their arrays lie, and how large the prepared mask is.
#include <string>
#include <vector>

#include "core/mask_prepare.h"
#include "core/validate_mask.h"

namespace tandem::core {
namespace {

struct TermTensor {
  const char* name;
  const tandem_tensor* tensor;  // null: not given
};

// The arrays of a valid term.
std::vector<TermTensor> TensorsOf(const tandem_mask_term& head) {
  switch (head.kind) {
    case TANDEM_MASK_BAND: {
      const auto& term = reinterpret_cast<const tandem_band_term&>(head);
      return {{"left_per_head", term.left_per_head},
              {"right_per_head", term.right_per_head},
              {"prefix", term.prefix}};
    }
    case TANDEM_MASK_ROW_RANGES:
      return {{"ranges", reinterpret_cast<const tandem_row_ranges_term&>(head).ranges}};
    case TANDEM_MASK_LENGTHS: {
      const auto& term = reinterpret_cast<const tandem_lengths_term&>(head);
      return {{"q_lengths", term.q_lengths}, {"kv_lengths", term.kv_lengths}};
    }
    case TANDEM_MASK_PACKED: {
      const auto& term = reinterpret_cast<const tandem_packed_term&>(head);
      return {{"cu_seqlens_q", term.cu_seqlens_q}, {"cu_seqlens_k", term.cu_seqlens_k}};
    }
    case TANDEM_MASK_SEGMENTS: {
      const auto& term = reinterpret_cast<const tandem_segments_term&>(head);
      return {{"q_segments", term.q_segments}, {"kv_segments", term.kv_segments}};
    }
    case TANDEM_MASK_DENSE: {
      const auto& term = reinterpret_cast<const tandem_dense_term&>(head);
      return {{"mask", term.mask}, {"sequence_offsets", term.sequence_offsets}};
    }
    default: {
      const auto& term = reinterpret_cast<const tandem_block_sparse_term&>(head);
      return {{"counts", term.counts},
              {"indices", term.indices},
              {"full_counts", term.full_counts},
              {"full_indices", term.full_indices}};
    }
  }
}

}  // namespace

bool DisjointFromTerms(const tandem_problem& in, Checker* check, const char* name,
                       const tandem_tensor& output) {
  for (int t = 0; t < in.mask_term_count; ++t) {
    const tandem_mask_term* term = in.mask_terms[t];
    for (const TermTensor& part : TensorsOf(*term)) {
      if (part.tensor == nullptr) continue;
      const std::string other = "mask_terms[" + std::to_string(t) + "]." + part.name;
      if (!check->Disjoint(name, output, other.c_str(), *part.tensor)) return false;
    }
  }
  return true;
}

bool ScoreMatrixStrides(const char* name, const tandem_tensor& tensor, const Problem& p,
                        Checker* check, int64_t* batch_stride, int64_t* head_stride,
                        int64_t* row_stride, int64_t* column_stride) {
  const int rank = tensor.rank;
  *batch_stride = *head_stride = 0;
  if (!check->Broadcastable(name, tensor, rank - 2, p.global_q_len, "the rows of q") ||
      !check->Broadcastable(name, tensor, rank - 1, p.global_kv_len, "the rows of k") ||
      (rank >= 3 && !check->Broadcastable(name, tensor, 0, p.batch, "the batch")) ||
      (rank == 4 && !check->Broadcastable(name, tensor, 1, p.q_heads, "the heads of q"))) {
    return false;
  }
  if (rank >= 3) *batch_stride = BroadcastStride(tensor, 0);
  if (rank == 4) *head_stride = BroadcastStride(tensor, 1);
  *row_stride = BroadcastStride(tensor, rank - 2);
  *column_stride = BroadcastStride(tensor, rank - 1);
  return true;
}

bool PreparationFits(Checker* check, const Problem& p) {
  auto fits = [](std::initializer_list<int64_t> factors) {
    int64_t product = 64;
    for (int64_t factor : factors) {
      if (__builtin_mul_overflow(product, factor + 1, &product)) return false;
    }
    return product < (int64_t{1} << 60);
  };
  const MaskSources& sources = p.sources;
  if (sources.dense_count > 0 && !fits({sources.dense_batch_extent, sources.dense_head_extent,
                                        sources.dense_row_extent, DenseWordsPerRow(p)})) {
    return check->Fail("mask_terms: the dense masks have more than 2^60 pairs, must have fewer");
  }
  for (int t = 0; t < sources.block_sparse_count; ++t) {
    const BlockSparseSource& source = sources.block_sparse[t];
    if (!fits(
            {source.batch_extent, source.head_extent, source.q_blocks, BlockWordsPerRow(source)})) {
      return check->Fail(
          "mask_terms: a block-sparse term has more than 2^60 blocks, must have "
          "fewer");
    }
  }
  return true;
}

}  // namespace tandem::core
