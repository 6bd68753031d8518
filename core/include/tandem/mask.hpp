// Mask terms of the C++ interface; include tandem/tandem.hpp, which includes this. Each function
// makes one term; `&` combines them. The arrays that a term is given as Tensor are borrowed.
#ifndef TANDEM_MASK_HPP_
#define TANDEM_MASK_HPP_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "tandem/tensor.hpp"

namespace tandem {

// A conjunction of terms: a pair is visible iff every term allows it. Copies are cheap. `a & b` has
// the terms of both; an empty Mask allows everything.
class Mask {
 public:
  Mask() = default;

  // A term: `fill(term, keep)` sets the fields of the C struct; keep(indices) gives a pointer to a
  // tensor that lives as long as the term.
  template <typename Term, typename Fill>
  static Mask Of(const Term& initial, const Fill& fill) {
    struct Owned {
      Term term;
      std::array<std::optional<Indices>, 4> arrays;
    };
    auto owned = std::make_shared<Owned>(Owned{initial, {}});
    size_t used = 0;
    fill(owned->term, [&](const std::optional<Indices>& array) -> const tandem_tensor* {
      if (!array) return nullptr;
      return &owned->arrays[used++].emplace(*array).tensor().c();
    });
    Mask mask;
    mask.terms_.emplace_back(owned, &owned->term.head);
    return mask;
  }

  friend Mask operator&(Mask a, const Mask& b) {
    a.terms_.insert(a.terms_.end(), b.terms_.begin(), b.terms_.end());
    return a;
  }
  Mask& operator&=(const Mask& b) { return *this = *this & b; }

  std::vector<const tandem_mask_term*> c() const {
    std::vector<const tandem_mask_term*> heads;
    for (const auto& term : terms_) heads.push_back(term.get());
    return heads;
  }

 private:
  std::vector<std::shared_ptr<const tandem_mask_term>> terms_;
};

// Keys j in [d - left, d + right]; -1 is unbounded. d = i (top-left), or i + kv_len - q_len
// (bottom-right). left_per_head, right_per_head: i32 [B or 1, Hq or 1], in place of left and right.
// prefix: i32 [B or 1], keys j < prefix[b] are exempt from this band.
inline Mask Band(Alignment alignment, int32_t left, int32_t right,
                 const std::optional<Indices>& prefix = {},
                 const std::optional<Indices>& left_per_head = {},
                 const std::optional<Indices>& right_per_head = {}) {
  return Mask::Of<tandem_band_term>(TANDEM_BAND_TERM_INIT, [&](auto& term, auto keep) {
    term.alignment = static_cast<tandem_alignment>(alignment);
    term.left = left;
    term.right = right;
    term.prefix = keep(prefix);
    term.left_per_head = keep(left_per_head);
    term.right_per_head = keep(right_per_head);
  });
}
inline Mask Causal(Alignment alignment, const std::optional<Indices>& prefix = {}) {
  return Band(alignment, -1, 0, prefix);
}
inline Mask Window(int32_t left, int32_t right, Alignment alignment,
                   const std::optional<Indices>& prefix = {}) {
  return Band(alignment, left, right, prefix);
}

// ranges: i32 [B or 1, Hq or 1, Sq or 1, R, 2]; key j is allowed iff it lies in one of the R
// half-open intervals of its row.
inline Mask RowRanges(const Tensor& ranges) {
  return Mask::Of<tandem_row_ranges_term>(
      TANDEM_ROW_RANGES_TERM_INIT, [&](auto& term, auto keep) { term.ranges = keep(ranges); });
}

// i32 [B] each: rows i >= q_lengths[b] are empty, keys j >= kv_lengths[b] invisible.
inline Mask Lengths(const std::optional<Indices>& q_lengths,
                    const std::optional<Indices>& kv_lengths) {
  return Mask::Of<tandem_lengths_term>(TANDEM_LENGTHS_TERM_INIT, [&](auto& term, auto keep) {
    term.q_lengths = keep(q_lengths);
    term.kv_lengths = keep(kv_lengths);
  });
}
inline Mask QueryLengths(const Indices& q_lengths) { return Lengths(q_lengths, std::nullopt); }
inline Mask KvLengths(const Indices& kv_lengths) { return Lengths(std::nullopt, kv_lengths); }

// Layout::kTHD only. i32 or i64 [B + 1]: sequence b owns rows [cu[b], cu[b + 1]). The maxima are
// required where the arrays are on a GPU, else 0.
inline Mask Packed(const Indices& cu_seqlens_q, const Indices& cu_seqlens_k, int64_t max_q_len = 0,
                   int64_t max_kv_len = 0) {
  return Mask::Of<tandem_packed_term>(TANDEM_PACKED_TERM_INIT, [&](auto& term, auto keep) {
    term.cu_seqlens_q = keep(cu_seqlens_q);
    term.cu_seqlens_k = keep(cu_seqlens_k);
    term.max_q_len = max_q_len;
    term.max_kv_len = max_kv_len;
  });
}

// i32 [B or 1, Sq] and [B or 1, Sk] (packed: [Tq], [Tk]): visible iff equal and >= 0.
inline Mask Segments(const Indices& q_segments, const Indices& kv_segments) {
  return Mask::Of<tandem_segments_term>(TANDEM_SEGMENTS_TERM_INIT, [&](auto& term, auto keep) {
    term.q_segments = keep(q_segments);
    term.kv_segments = keep(kv_segments);
  });
}

// kBool or kBit, broadcastable to [B, Hq, Sq, Sk] from rank 2, 3 ([B, Sq, Sk]) or 4: visible iff
// true. With sequence_offsets (i64 [B], packed only) mask is rank 1 and sequence b's [q_len,
// kv_len] matrix starts at element sequence_offsets[b].
inline Mask Dense(const Tensor& mask, const std::optional<Indices>& sequence_offsets = {}) {
  return Mask::Of<tandem_dense_term>(TANDEM_DENSE_TERM_INIT, [&](auto& term, auto keep) {
    term.mask = keep(mask);
    term.sequence_offsets = keep(sequence_offsets);
  });
}

// counts: i32 [B or 1, Hq or 1, ceil(Sq / q_block)]; indices: [..., N]: visible iff key block
// j / kv_block is listed for query block i / q_block. The full lists are more blocks, promised to
// be hidden by no other term.
inline Mask BlockSparse(int32_t q_block, int32_t kv_block, const Tensor& counts,
                        const Tensor& indices, const std::optional<Indices>& full_counts = {},
                        const std::optional<Indices>& full_indices = {}) {
  return Mask::Of<tandem_block_sparse_term>(TANDEM_BLOCK_SPARSE_TERM_INIT,
                                            [&](auto& term, auto keep) {
                                              term.q_block = q_block;
                                              term.kv_block = kv_block;
                                              term.counts = keep(counts);
                                              term.indices = keep(indices);
                                              term.full_counts = keep(full_counts);
                                              term.full_indices = keep(full_indices);
                                            });
}

}  // namespace tandem

#endif  // TANDEM_MASK_HPP_
