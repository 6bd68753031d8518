// Mask terms for tests: the public descriptor of each, filled with seeded random values, beside the
// plain definition of what it allows, written from docs/semantics.md and sharing no code with core.
#ifndef TANDEM_TESTS_SUPPORT_MASK_TERMS_H_
#define TANDEM_TESTS_SUPPORT_MASK_TERMS_H_

#include <memory>
#include <string>
#include <vector>

#include "tandem/tandem.h"
#include "tests/support/random.h"
#include "tests/support/tensor.h"

namespace tandem::test {

// One pair of the score matrix, in the sequence's own (global) coordinates.
struct Pair {
  int64_t batch;
  int64_t head;
  int64_t i;
  int64_t j;
  int64_t q_len;  // of the sequence, after lengths
  int64_t kv_len;
  int64_t q_start;  // first row of the sequence in packed tensors, else 0
  int64_t kv_start;
};

// What terms are built for.
struct Extents {
  int64_t batch = 1;
  int64_t q_heads = 1;
  int64_t q_len = 0;  // global; packed: of the longest sequence
  int64_t kv_len = 0;
  bool packed = false;
  std::vector<int64_t> cu_q;  // packed: [batch + 1]
  std::vector<int64_t> cu_k;
  int64_t q_total = 0;  // packed: rows of the tensors
  int64_t kv_total = 0;
  std::vector<int64_t> q_lens;  // per sequence, after lengths
  std::vector<int64_t> kv_lens;
  Placement placement = Placement::kAligned;  // of the terms' own arrays
};

struct TermSpec {
  tandem_mask_kind kind = TANDEM_MASK_UNSET;
  // BAND
  tandem_alignment alignment = TANDEM_ALIGN_TOP_LEFT;
  int32_t left = -1;
  int32_t right = -1;
  bool widths_per_head = false;  // random left and right per head, ignoring the two above
  bool prefix = false;
  // LENGTHS
  bool q_lengths = false;
  bool kv_lengths = true;
  // Shapes: false broadcasts the dimension.
  bool per_batch = true;
  bool per_head = true;
  bool per_row = true;
  // ROW_RANGES
  int64_t ranges = 1;
  // SEGMENTS
  int32_t segments = 3;
  bool sorted = true;
  // DENSE
  int rank = 4;
  tandem_dtype dtype = TANDEM_DTYPE_BOOL;
  double density = 0.5;  // of visible pairs in a tile that is mixed
  bool tiles = true;     // a third of the 64 x 64 tiles is empty, a third full
  bool offsets = false;  // packed bits per sequence
  Strides strides;
  // BLOCK_SPARSE
  int32_t q_block = 64;
  int32_t kv_block = 64;
  bool full_lists = false;
};

TermSpec Band(tandem_alignment alignment, int32_t left, int32_t right);
TermSpec Causal(tandem_alignment alignment);
TermSpec RowRanges(int64_t ranges);
TermSpec Lengths(bool q, bool kv);
TermSpec Segments(int32_t segments, bool sorted);
TermSpec Dense(int rank, tandem_dtype dtype = TANDEM_DTYPE_BOOL);
TermSpec BlockSparse(int32_t q_block, int32_t kv_block);
// Any term but LENGTHS and PACKED, with random parameters.
TermSpec RandomTerm(Random& random);

class Term {
 public:
  virtual ~Term() = default;
  virtual bool Allows(const Pair& pair) const = 0;
  virtual const tandem_mask_term* get() const = 0;
};

std::unique_ptr<Term> MakeTerm(const TermSpec& spec, const Extents& extents, Random& random);
std::unique_ptr<Term> MakePackedTerm(const Extents& extents, tandem_dtype dtype);
// q_lens and kv_lens of the extents; either may be left out.
std::unique_ptr<Term> MakeLengthsTerm(const Extents& extents, bool q, bool kv);

std::string Describe(const TermSpec& spec);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_MASK_TERMS_H_
