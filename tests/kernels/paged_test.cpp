// Keys and values in pages, against the oracle on the same keys and values as tensors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

constexpr uint8_t kPoison = 0xff;  // NaN in every type, -1 as a page

// Of the divisors of a number of keys the one whose turn it is.
int64_t PageSize(int64_t keys, uint64_t turn) {
  std::vector<int64_t> divisors;
  for (int64_t n = 1; n <= keys; ++n) {
    if (keys % n == 0) divisors.push_back(n);
  }
  return divisors[turn % divisors.size()];
}

// The keys and values of a case in pages in random order, with a page between any two that belongs
// to nobody. What no sequence reaches is NaN, and so are entries of the table behind its end.
class Pages {
 public:
  Pages(Case& problem, int64_t page_size)
      : case_(problem),
        page_size_(page_size),
        per_sequence_(problem.spec().kv_rows / page_size),
        table_(TANDEM_DTYPE_I32, {problem.batch(), per_sequence_}),
        k_(Pool(problem.k(), problem.spec().k_strides)),
        v_(Pool(problem.v(), problem.spec().v_strides)) {
    std::vector<int64_t> order(static_cast<size_t>(problem.batch() * per_sequence_));
    std::iota(order.begin(), order.end(), 0);
    Random random(problem.spec().seed);
    for (size_t n = order.size(); n > 1; --n) {
      std::swap(order[n - 1], order[static_cast<size_t>(random.Below(static_cast<int64_t>(n)))]);
    }
    table_.FillBytes(kPoison);
    for (int64_t b = 0; b < problem.batch(); ++b) {
      const int64_t keys = Keys(b);
      for (int64_t n = 0; n * page_size < keys; ++n) {
        const int64_t page = 2 * order[static_cast<size_t>(b * per_sequence_ + n)] + 1;
        table_.Set({b, n}, static_cast<double>(page));
        for (int64_t row = 0; row < std::min(page_size, keys - n * page_size); ++row) {
          Copy(problem.k(), b, n * page_size + row, page, row, &k_);
          Copy(problem.v(), b, n * page_size + row, page, row, &v_);
        }
      }
    }
    problem_ = problem.problem();
    problem_.k = k_.get();
    problem_.v = v_.get();
    problem_.block_table = table_.get();
    problem_.page_size = page_size;
  }

  tandem_problem& problem() { return problem_; }
  Tensor& table() { return table_; }

 private:
  // Keys that a kernel may look at: those of the lengths, in this shard.
  int64_t Keys(int64_t b) const {
    return std::clamp<int64_t>(case_.sequence(b).kv_len - case_.spec().kv_offset, 0,
                               case_.spec().kv_rows);
  }

  Tensor Pool(const Tensor& like, const Strides& strides) const {
    Tensor pool(like.dtype(),
                {2 * case_.batch() * per_sequence_ + 1, page_size_, case_.spec().kv_heads,
                 like.shape().back()},
                strides, case_.spec().placement);
    pool.FillBytes(kPoison);
    return pool;
  }

  void Copy(Tensor& from, int64_t b, int64_t key, int64_t page, int64_t row, Tensor* to) const {
    for (int64_t head = 0; head < to->shape()[2]; ++head) {
      for (int64_t c = 0; c < to->shape()[3]; ++c) {
        to->Set({page, row, head, c}, from.Get(case_.KeyIndex(b, head, key, c)));
      }
    }
  }

  Case& case_;
  int64_t page_size_, per_sequence_;
  Tensor table_, k_, v_;
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
};

class PagedAgreement : public ::testing::TestWithParam<std::tuple<Kernel, CaseSpec>> {};

TEST_P(PagedAgreement, WithTheOracle) {
  const auto& [kernel, spec] = GetParam();
  Case problem(spec);
  Pages pages(problem, PageSize(spec.kv_rows, spec.seed + spec.name.size()));
  ExpectAgreementOrUnsupported(kernel, problem,
                               RunKernel(kernel, pages.problem(), problem.outputs()));
}

INSTANTIATE_TEST_SUITE_P(Table, PagedAgreement,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(CasesWithKeysElsewhere())),
                         KernelAndCaseName());

CaseSpec PagedSpec(tandem_dtype dtype, int64_t q_rows) {
  return SequencesOfKeys("paged", dtype, q_rows, 768, 64, 32);
}

// Where rows lie changes no bit, whatever the size of pages.
TEST(Paged, ResultsAreThoseOfTensors) {
  for (const Kernel& kernel : ForwardKernels()) {
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      for (const int64_t q_rows : {1, 70}) {
        SCOPED_TRACE(kernel.name);
        Case problem(PagedSpec(dtype, q_rows));
        if (RunKernel(kernel, problem) != TANDEM_STATUS_OK) continue;
        const std::vector<uint8_t> expected = problem.OutputBytes();
        for (const int64_t page_size : {1, 16, 64, 256, 768}) {
          Pages pages(problem, page_size);
          problem.PrefillOutputs(kPoison);
          if (RunKernel(kernel, pages.problem(), problem.outputs()) != TANDEM_STATUS_OK) continue;
          EXPECT_EQ(problem.OutputBytes(), expected) << "pages of " << page_size;
        }
      }
    }
  }
}

TEST(Paged, SequencesMayShareAPage) {
  Case problem(PagedSpec(TANDEM_DTYPE_F32, 1));
  Pages pages(problem, 64);
  for (int64_t n = 0; n < 12; ++n) pages.table().Set({3, n}, pages.table().Get({0, n}));
  tandem_lengths_term lengths = TANDEM_LENGTHS_TERM_INIT;
  const Tensor all = IndexTensor({768, 0, 65, 768});
  lengths.kv_lengths = all.get();
  const tandem_mask_term* terms[] = {&lengths.head};
  pages.problem().mask_terms = terms;
  pages.problem().mask_term_count = 1;
  for (int64_t h = 0; h < 6; ++h) {
    for (int64_t c = 0; c < 64; ++c) {
      problem.q().Set(problem.QueryIndex(3, h, 0, c),
                      problem.q().Get(problem.QueryIndex(0, h, 0, c)));
    }
  }
  ASSERT_EQ(tandem_attention(&pages.problem(), &problem.outputs(), nullptr), TANDEM_STATUS_OK)
      << tandem_last_error();
  for (int64_t c = 0; c < 32; ++c) {
    EXPECT_EQ(problem.out().Get({3, 0, 5, c}), problem.out().Get({0, 0, 5, c}));
  }
}

TEST(Paged, APlanServesAnyTableOfItsShape) {
  Case problem(PagedSpec(TANDEM_DTYPE_F32, 1));
  Pages pages(problem, 64);
  tandem_plan* plan = nullptr;
  ASSERT_EQ(tandem_plan_create(&pages.problem(), &problem.outputs(), nullptr, nullptr, &plan),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  Tensor elsewhere(TANDEM_DTYPE_I32, pages.table().shape());
  elsewhere.ForEach(
      [&](std::span<const int64_t> index) { elsewhere.Set(index, pages.table().Get(index)); });
  pages.problem().block_table = elsewhere.get();
  const size_t size = tandem_plan_workspace_size(plan);
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(256, (size + 256) & ~size_t{255}), &std::free);
  EXPECT_EQ(tandem_plan_run(plan, &pages.problem(), &problem.outputs(), nullptr, workspace.get(),
                            size, nullptr),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  tandem_plan_destroy(plan);
}

TEST(Paged, SaysWhatIsWrong) {
  Case problem(PagedSpec(TANDEM_DTYPE_F32, 1));
  Pages pages(problem, 64);
  const std::vector<uint8_t> before = problem.OutputBytes();
  const auto expect = [&](auto spoil, const std::vector<std::string>& parts) {
    tandem_problem spoilt = pages.problem();
    spoil(&spoilt);
    EXPECT_EQ(tandem_attention(&spoilt, &problem.outputs(), nullptr),
              TANDEM_STATUS_INVALID_ARGUMENT);
    const std::string message = tandem_last_error();
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
    EXPECT_EQ(problem.OutputBytes(), before) << message;
  };
  expect([](auto* p) { p->page_size = 0; }, {"page_size is 0", "64"});
  expect([](auto* p) { p->page_size = 32; }, {"page_size is 32", "64"});
  const Tensor real(TANDEM_DTYPE_F32, {4, 12}), batch(TANDEM_DTYPE_I32, {3, 12}),
      vector(TANDEM_DTYPE_I32, {12});
  expect([&](auto* p) { p->block_table = real.get(); }, {"block_table", "dtype"});
  expect([&](auto* p) { p->block_table = batch.get(); }, {"block_table", "the batch of q"});
  expect([&](auto* p) { p->block_table = vector.get(); }, {"block_table", "rank"});
  const Tensor heads(TANDEM_DTYPE_F32, {97, 64, 4, 64}), dim(TANDEM_DTYPE_F32, {97, 64, 2, 63}),
      fewer(TANDEM_DTYPE_F32, {96, 64, 2, 32}), none(TANDEM_DTYPE_F32, {0, 64, 2, 64}),
      no_values(TANDEM_DTYPE_F32, {0, 64, 2, 32});
  expect([&](auto* p) { p->k = heads.get(); }, {"k", "4 heads", "6 heads of q"});
  expect([&](auto* p) { p->k = dim.get(); }, {"k", "the head dimension of q"});
  expect([&](auto* p) { p->v = fewer.get(); }, {"v", "the pages of k"});
  expect(
      [&](auto* p) {
        p->k = none.get();
        p->v = no_values.get();
      },
      {"k", "no pages"});
  for (const double page : {-1.0, 97.0, 2147483647.0}) {
    const double good = pages.table().Get({2, 1});
    pages.table().Set({2, 1}, page);
    expect([](auto*) {}, {"block_table[2][1] is " + std::to_string(static_cast<int>(page)), "97"});
    pages.table().Set({2, 1}, good);
  }
  tandem_gradients gradients = TANDEM_GRADIENTS_INIT;
  gradients.dout = problem.outputs().out;
  EXPECT_EQ(tandem_attention_backward(&pages.problem(), &problem.outputs(), &gradients, nullptr),
            TANDEM_STATUS_UNSUPPORTED)
      << tandem_last_error();
}

}  // namespace
}  // namespace tandem::test
