// Which query row may attend to which key: docs/semantics.md section 3, pair by pair, straight from
// the public problem. Shares nothing with the library.
//
// Problems must be valid, with all arrays in host memory and the mask given as terms (not as a mask
// plan). Rows i and keys j are local to the sequence: row i of sequence b is row i of its tensors
// (packed: row cu_seqlens_q[b] + i).
#ifndef TANDEM_TESTS_ORACLE_VISIBILITY_H_
#define TANDEM_TESTS_ORACLE_VISIBILITY_H_

#include <cstdint>
#include <vector>

#include "tandem/tandem.h"

namespace tandem::oracle {

struct Dimensions {
  bool packed;
  int64_t batch;  // or the number of sequences
  int64_t q_heads;
  int64_t kv_heads;
  int64_t q_rows;  // of the tensors; packed: of all sequences together
  int64_t kv_rows;
  int64_t qk_dim;
  int64_t v_dim;
};
Dimensions DimensionsOf(const tandem_problem& problem);

struct SequenceRange {
  int64_t q_start;  // first row in packed tensors, else 0
  int64_t kv_start;
  int64_t q_rows;  // rows of the tensors that belong to it
  int64_t kv_rows;
  int64_t q_offset;  // global coordinate of local row 0
  int64_t kv_offset;
  int64_t q_len;  // global rows at or beyond it are not there
  int64_t kv_len;
};
int64_t SequenceCount(const tandem_problem& problem);
SequenceRange SequenceOf(const tandem_problem& problem, int64_t b);

// The packed sequence that row `row` of q belongs to; -1: none.
int64_t SequenceOfPackedRow(const tandem_problem& problem, int64_t row);

// Whether every mask term lets row i of sequence b, head h see key j. A bias of -inf comes on top.
bool Visible(const tandem_problem& problem, int64_t b, int64_t h, int64_t i, int64_t j);

// Whether visibility (bias included) can differ between the heads of one sequence.
bool VisibilityDependsOnHead(const tandem_problem& problem);

// The terms as one row sees them; Allows(j) is Visible(b, h, i, j).
class RowVisibility {
 public:
  RowVisibility(const tandem_problem& problem, const SequenceRange& sequence, int64_t b, int64_t h,
                int64_t i);
  bool Allows(int64_t j) const;
  // Keys outside [begin, end) are invisible; `exact`: and all keys inside are visible.
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  bool exact() const { return exact_; }

 private:
  bool BandAllows(const tandem_band_term& term, int64_t key) const;
  bool RangesAllow(const tandem_row_ranges_term& term, int64_t key) const;
  bool SegmentsAllow(const tandem_segments_term& term, int64_t key) const;
  bool DenseAllows(const tandem_dense_term& term, int64_t key) const;
  bool BlocksAllow(const tandem_block_sparse_term& term, int64_t key) const;
  bool Listed(const tandem_tensor* counts, const tandem_tensor* indices, int64_t q_block,
              int64_t kv_block) const;
  void NarrowByBand(const tandem_band_term& term);

  const tandem_problem& problem_;
  const SequenceRange& sequence_;
  int64_t b_;
  int64_t h_;
  int64_t row_;  // global
  bool row_exists_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
  bool exact_ = true;
};

// The bias of one row of one sequence and head, by global key.
struct BiasRow {
  const tandem_tensor* tensor = nullptr;
  int64_t offset = 0;
  int64_t stride = 0;
  double At(int64_t global_key) const;
};
BiasRow BiasRowOf(const tandem_problem& problem, const SequenceRange& sequence, int64_t b,
                  int64_t h, int64_t i);

// Keys that the row sees; those with a bias of -inf are not seen.
int64_t CountVisibleKeys(const tandem_problem& problem, const SequenceRange& sequence, int64_t b,
                         int64_t h, int64_t i);

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_VISIBILITY_H_
