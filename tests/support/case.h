// One attention problem as a test sees it: a spec that reads in one line of a table, and the
// tensors, terms and descriptors made of it, with the plain definition of which pairs are visible.
#ifndef TANDEM_TESTS_SUPPORT_CASE_H_
#define TANDEM_TESTS_SUPPORT_CASE_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tandem/tandem.h"
#include "tests/support/mask_terms.h"
#include "tests/support/tensor.h"

namespace tandem::test {

struct BiasSpec {
  tandem_dtype dtype = TANDEM_DTYPE_UNSET;  // UNSET: no bias
  int rank = 4;
  bool per_batch = true;
  bool per_head = true;
  bool per_row = true;
  bool per_key = true;
  double hidden = 0.0;       // probability of -inf
  double hidden_rows = 0.0;  // probability that a whole row is -inf
  double lowest_rows = 0.0;  // probability that a whole row is the lowest finite value
  Strides strides;
};

struct CaseSpec {
  std::string name;
  tandem_dtype dtype = TANDEM_DTYPE_F32;
  tandem_layout layout = TANDEM_LAYOUT_BHSD;
  int64_t batch = 1;
  int64_t q_heads = 1;
  int64_t kv_heads = 1;
  int64_t q_rows = 1;
  int64_t kv_rows = 1;
  int64_t qk_dim = 64;
  int64_t v_dim = 64;
  std::optional<float> scale;
  float softcap = 0.0f;
  std::vector<TermSpec> terms;
  // Packed: the rows of each sequence (one entry per sequence). Else the lengths of a LENGTHS term;
  // empty: random ones, among them 0.
  std::vector<int64_t> q_lens;
  std::vector<int64_t> kv_lens;
  int64_t packed_lead = 0;  // rows before the first sequence and after the last, on both sides
  int64_t packed_tail = 0;
  tandem_dtype cu_dtype = TANDEM_DTYPE_I32;
  BiasSpec bias;
  int alibi_rank = 0;  // 0: none; 1: [Hq]; 2: [B, Hq]
  tandem_alignment alibi_alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
  bool sink = false;
  float dropout_rate = 0.0f;
  bool lse = true;
  bool out_f32 = false;
  int64_t q_offset = 0;  // a shard, where the global lengths are not 0
  int64_t kv_offset = 0;
  int64_t global_q_len = 0;
  int64_t global_kv_len = 0;
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  Placement placement = Placement::kAligned;
  double magnitude = 1.0;  // of q, k and v
  uint64_t seed = 1;
};

// Rows of one sequence in the tensors, and its global lengths.
struct SequenceRows {
  int64_t q_start = 0;
  int64_t kv_start = 0;
  int64_t q_rows = 0;
  int64_t kv_rows = 0;
  int64_t q_len = 0;
  int64_t kv_len = 0;
};

class Case {
 public:
  explicit Case(const CaseSpec& spec);
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  const CaseSpec& spec() const { return spec_; }
  const tandem_problem& problem() const { return problem_; }
  tandem_problem& problem() { return problem_; }
  const tandem_outputs& outputs() const { return outputs_; }
  tandem_outputs& outputs() { return outputs_; }

  Tensor& q() { return *q_; }
  Tensor& k() { return *k_; }
  Tensor& v() { return *v_; }
  Tensor& out() { return *out_; }
  std::optional<Tensor>& lse() { return lse_; }
  std::optional<Tensor>& bias() { return bias_; }
  std::optional<Tensor>& sink() { return sink_; }
  std::optional<Tensor>& alibi() { return alibi_; }

  int64_t batch() const { return spec_.batch; }
  const SequenceRows& sequence(int64_t b) const { return sequences_[b]; }
  bool RowExists(int64_t b, int64_t i) const;
  // Local row i and key j of sequence b. Both definitions: the terms alone, and with a bias of
  // -inf.
  bool TermsAllow(int64_t b, int64_t head, int64_t i, int64_t j) const;
  bool Visible(int64_t b, int64_t head, int64_t i, int64_t j) const;
  float BiasAt(int64_t b, int64_t head, int64_t i, int64_t j) const;

  // Indices into q, out (query rows) and k, v (key rows), and into lse.
  Index QueryIndex(int64_t b, int64_t head, int64_t row, int64_t column) const;
  Index KeyIndex(int64_t b, int64_t head, int64_t row, int64_t column) const;
  Index LseIndex(int64_t b, int64_t head, int64_t row) const;
  Index BiasIndex(int64_t b, int64_t head, int64_t i, int64_t j) const;

  // Writes the byte over out and lse, gaps included.
  void PrefillOutputs(uint8_t byte = 0xff);
  // out and lse elements, for bitwise comparison.
  std::vector<uint8_t> OutputBytes() const;

 private:
  // Every part has random numbers of its own: batch 0 is the same whatever the batch.
  uint64_t Seed(uint64_t part) const;
  void MakeSequences();
  void MakeTensors();
  void MakeTerms();
  void MakeBias();
  Pair PairOf(int64_t b, int64_t head, int64_t i, int64_t j) const;
  Index RowIndex(int64_t b, int64_t head, int64_t start, int64_t row, int64_t column) const;

  CaseSpec spec_;
  bool packed_;
  Extents extents_;
  std::vector<SequenceRows> sequences_;
  std::optional<Tensor> q_, k_, v_, out_, lse_, bias_, alibi_, sink_;
  std::vector<std::unique_ptr<Term>> terms_;
  std::vector<const tandem_mask_term*> term_pointers_;
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
};

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_CASE_H_
