// A valid call that a test then spoils: every descriptor is a copy that may be changed freely.
#ifndef TANDEM_TESTS_API_CALL_H_
#define TANDEM_TESTS_API_CALL_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "tandem/tandem.h"
#include "tests/support/case.h"

namespace tandem::test {

class Call {
 public:
  explicit Call(const CaseSpec& spec)
      : case_(spec), problem(case_.problem()), outputs(case_.outputs()) {
    for (int32_t n = 0; n < problem.mask_term_count; ++n) {
      const tandem_mask_term* term = problem.mask_terms[n];
      term_copies_.emplace_back(term->struct_size / sizeof(uint64_t));
      std::memcpy(term_copies_.back().data(), term, term->struct_size);
      terms.push_back(reinterpret_cast<const tandem_mask_term*>(term_copies_.back().data()));
    }
    problem.mask_terms = terms.data();
  }

  // The first term of a kind, to be changed.
  template <typename T>
  T& Term(tandem_mask_kind kind) {
    for (const tandem_mask_term* term : terms) {
      if (term->kind == kind) return *const_cast<T*>(reinterpret_cast<const T*>(term));
    }
    ADD_FAILURE() << "no term of kind " << kind;
    std::abort();
  }

  // A copy of the tensor that a field points at, put in its place.
  tandem_tensor& Own(const tandem_tensor** slot) {
    tensors_.push_back(**slot);
    *slot = &tensors_.back();
    return tensors_.back();
  }

  tandem_status Attention() { return tandem_attention(&problem, &outputs, &options); }

  // Both ways in refuse with the status, a message that holds every one of `parts`, and outputs
  // untouched.
  void ExpectRefused(tandem_status status, const std::vector<std::string>& parts) {
    case_.PrefillOutputs(0xa5);
    const std::vector<uint8_t> out = case_.out().Bytes();
    const std::vector<uint8_t> lse = case_.lse()->Bytes();
    EXPECT_EQ(Attention(), status) << tandem_last_error();
    ExpectMessage(parts);
    EXPECT_EQ(case_.out().Bytes(), out) << "out was written";
    EXPECT_EQ(case_.lse()->Bytes(), lse) << "lse was written";
    tandem_plan* plan = nullptr;
    tandem_options plan_options = options;
    if (plan_options.device_type != TANDEM_DEVICE_CUDA) {  // plans do not copy between devices
      EXPECT_EQ(tandem_plan_create(&problem, &outputs, nullptr, &plan_options, &plan), status)
          << tandem_last_error();
      ExpectMessage(parts);
      EXPECT_EQ(plan, nullptr);
    }
    tandem_plan_destroy(plan);
  }

  static void ExpectMessage(const std::vector<std::string>& parts) {
    const std::string message = tandem_last_error();
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "\"" << part << "\" is not in \"" << message << "\"";
    }
  }

 private:
  Case case_;
  std::deque<std::vector<uint64_t>> term_copies_;
  std::deque<tandem_tensor> tensors_;

 public:
  tandem_problem problem;
  tandem_outputs outputs;
  tandem_options options = TANDEM_OPTIONS_INIT;
  std::vector<const tandem_mask_term*> terms;
  Case& valid() { return case_; }
};

// Every optional argument and every kind of term is given.
inline CaseSpec FullSpec() {
  CaseSpec spec;
  spec.batch = 2;
  spec.q_heads = 4;
  spec.kv_heads = 2;
  spec.q_rows = 10;
  spec.kv_rows = 12;
  spec.qk_dim = 8;
  spec.v_dim = 6;
  TermSpec band = Band(TANDEM_ALIGN_BOTTOM_RIGHT, 3, 0);
  band.widths_per_head = band.prefix = true;
  TermSpec blocks = BlockSparse(4, 5);
  blocks.full_lists = true;
  spec.terms = {band, RowRanges(2), Lengths(true, true), Segments(2, true), Dense(4), blocks};
  spec.bias.dtype = TANDEM_DTYPE_F16;
  spec.alibi_rank = 2;
  spec.sink = true;
  return spec;
}

inline CaseSpec PackedSpec() {
  CaseSpec spec;
  spec.layout = TANDEM_LAYOUT_THD;
  spec.q_heads = 2;
  spec.qk_dim = spec.v_dim = 8;
  spec.q_lens = {4, 6};
  spec.kv_lens = {5, 7};
  spec.packed_tail = 2;
  TermSpec dense = Dense(2);
  dense.offsets = true;
  spec.terms = {dense};
  return spec;
}

}  // namespace tandem::test

#endif  // TANDEM_TESTS_API_CALL_H_
