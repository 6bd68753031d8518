// Attention over a key and value cache that grew by ragged appends, against the oracle on the same
// keys and values as tensors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "oracle/compare.h"
#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

constexpr uint8_t kPoison = 0xff;  // NaN in every type

// A cache with the keys and values of a case, as far as its lengths reach; all else is NaN.
class Cache {
 public:
  Cache(Case& problem, const std::vector<int64_t>& steps) : case_(problem) {
    const CaseSpec& spec = problem.spec();
    config_.dtype = spec.dtype;
    config_.batch = problem.batch();
    config_.kv_heads = spec.kv_heads;
    config_.capacity = spec.kv_rows;
    config_.qk_dim = spec.qk_dim;
    config_.v_dim = spec.v_dim;
    size_t size = 0;
    EXPECT_EQ(tandem_kv_cache_size(&config_, &size), TANDEM_STATUS_OK) << tandem_last_error();
    memory_.reset(std::aligned_alloc(256, size));
    std::memset(memory_.get(), kPoison, size);
    EXPECT_EQ(tandem_kv_cache_create(&config_, memory_.get(), size, &cache_), TANDEM_STATUS_OK)
        << tandem_last_error();
    held_.assign(static_cast<size_t>(config_.batch), 0);
    for (int64_t b = 0; b < config_.batch; ++b) wanted_.push_back(problem.sequence(b).kv_len);
    for (size_t n = 0; held_ != wanted_ && !::testing::Test::HasFatalFailure(); ++n)
      Append(steps, n);
    std::vector<int32_t> lengths(wanted_.size());
    EXPECT_EQ(tandem_kv_cache_lengths(cache_, lengths.data()), TANDEM_STATUS_OK);
    EXPECT_TRUE(std::equal(lengths.begin(), lengths.end(), wanted_.begin(), wanted_.end()));
    MakeProblem();
  }
  ~Cache() { tandem_kv_cache_destroy(cache_); }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  const tandem_problem& problem() const { return problem_; }
  tandem_kv_cache* get() { return cache_; }

 private:
  // Every sequence by a step of its own, some of them by nothing.
  void Append(const std::vector<int64_t>& steps, size_t n) {
    std::vector<int64_t> counts;
    int64_t rows = 0;
    for (size_t b = 0; b < wanted_.size(); ++b) {
      const int64_t step = (n + 3 * b) % 5 == 4 ? 0 : steps[(n + b) % steps.size()];
      counts.push_back(std::min(step, wanted_[b] - held_[b]));
      rows = std::max(rows, counts.back());
    }
    rows += 1;  // one that belongs to nobody
    Tensor k = Rows(case_.k(), counts, rows, config_.qk_dim);
    Tensor v = Rows(case_.v(), counts, rows, config_.v_dim);
    const Tensor lengths = IndexTensor(counts);
    ASSERT_EQ(tandem_kv_cache_append(cache_, case_.spec().layout, k.get(), v.get(), lengths.get()),
              TANDEM_STATUS_OK)
        << tandem_last_error();
    for (size_t b = 0; b < wanted_.size(); ++b) held_[b] += counts[b];
  }

  // The next counts[b] rows of each sequence, NaN behind them, with the strides of the case's keys.
  Tensor Rows(Tensor& from, const std::vector<int64_t>& counts, int64_t rows, int64_t dim) {
    const bool bhsd = case_.spec().layout == TANDEM_LAYOUT_BHSD;
    const Shape shape = bhsd ? Shape{config_.batch, config_.kv_heads, rows, dim}
                             : Shape{config_.batch, rows, config_.kv_heads, dim};
    Strides strides = case_.spec().k_strides;
    strides.broadcast = 0;
    Tensor to(config_.dtype, shape, strides);
    to.FillBytes(kPoison);
    to.ForEach([&](std::span<const int64_t> index) {
      const size_t b = static_cast<size_t>(index[0]);
      std::vector<int64_t> source(index.begin(), index.end());
      int64_t& row = source[bhsd ? 2 : 1];
      if (row >= counts[b]) return;
      row += held_[b];
      to.Set(index, from.Get(source));
    });
    return to;
  }

  // The lengths of the keys are the cache's: the lengths term says those of the queries alone.
  void MakeProblem() {
    problem_ = case_.problem();
    problem_.k = problem_.v = nullptr;
    problem_.kv_cache = cache_;
    for (int32_t n = 0; n < problem_.mask_term_count; ++n) {
      terms_.push_back(problem_.mask_terms[n]);
      if (terms_.back()->kind != TANDEM_MASK_LENGTHS) continue;
      lengths_ = *reinterpret_cast<const tandem_lengths_term*>(terms_.back());
      lengths_.kv_lengths = nullptr;
      terms_.back() = &lengths_.head;
    }
    problem_.mask_terms = terms_.data();
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  Case& case_;
  tandem_kv_cache_config config_ = TANDEM_KV_CACHE_CONFIG_INIT;
  std::unique_ptr<void, Free> memory_;
  tandem_kv_cache* cache_ = nullptr;
  std::vector<int64_t> held_, wanted_;
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  std::vector<const tandem_mask_term*> terms_;
  tandem_lengths_term lengths_ = TANDEM_LENGTHS_TERM_INIT;
};

const std::vector<int64_t> kRagged = {1, 17, 63, 64, 65};

tandem_status Attend(const std::string& kernel, const tandem_problem& problem, Case& of,
                     tandem_device_type device = TANDEM_DEVICE_CPU, int32_t threads = 0) {
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.kernel = kernel.empty() ? nullptr : kernel.c_str();
  options.device_type = device;
  options.threads = threads;
  of.PrefillOutputs(kPoison);
  return tandem_attention(&problem, &of.outputs(), &options);
}

class CachedAgreement : public ::testing::TestWithParam<std::tuple<Kernel, CaseSpec>> {};

TEST_P(CachedAgreement, WithTheOracle) {
  const auto& [kernel, spec] = GetParam();
  Case problem(spec);
  Cache cache(problem, kRagged);
  ExpectAgreementOrUnsupported(kernel, problem,
                               Attend(kernel.name, cache.problem(), problem, kernel.device));
}

INSTANTIATE_TEST_SUITE_P(Table, CachedAgreement,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(CasesWithKeysElsewhere())),
                         KernelAndCaseName());

CaseSpec GrownSpec(tandem_dtype dtype, int64_t q_rows) {
  return SequencesOfKeys("grown", dtype, q_rows, 700, 40, 24);
}

TEST(KvCache, HowItGrewChangesNoBit) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    for (const int64_t q_rows : {1, 5, 70}) {
      Case problem(GrownSpec(dtype, q_rows));
      Cache at_once(problem, {700});
      ASSERT_EQ(Attend("", at_once.problem(), problem), TANDEM_STATUS_OK) << tandem_last_error();
      const std::vector<uint8_t> expected = problem.OutputBytes();
      Cache ragged(problem, kRagged);
      ASSERT_EQ(Attend("", ragged.problem(), problem), TANDEM_STATUS_OK) << tandem_last_error();
      EXPECT_EQ(problem.OutputBytes(), expected);
      ASSERT_EQ(Attend("", ragged.problem(), problem, TANDEM_DEVICE_CPU, 1), TANDEM_STATUS_OK);
      EXPECT_EQ(problem.OutputBytes(), expected) << "one thread";
    }
  }
}

TEST(KvCache, OnePlanServesItAsItGrows) {
  CaseSpec spec = GrownSpec(TANDEM_DTYPE_F32, 1);
  spec.kv_lens = {0, 0, 0, 0};
  Case problem(spec);
  Cache cache(problem, {1});
  tandem_plan* plan = nullptr;
  ASSERT_EQ(tandem_plan_create(&cache.problem(), &problem.outputs(), nullptr, nullptr, &plan),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  const size_t size = tandem_plan_workspace_size(plan);
  std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(256, (size / 256 + 1) * 256), &std::free);
  Tensor k(TANDEM_DTYPE_F32, {4, 3, 2, 40}), v(TANDEM_DTYPE_F32, {4, 3, 2, 24});
  k.Fill(0.0);
  for (int step = 1; step <= 3; ++step) {
    v.Fill(step);
    ASSERT_EQ(tandem_kv_cache_append(cache.get(), TANDEM_LAYOUT_BSHD, k.get(), v.get(), nullptr),
              TANDEM_STATUS_OK);
    ASSERT_EQ(tandem_plan_run(plan, &cache.problem(), &problem.outputs(), nullptr, workspace.get(),
                              size, nullptr),
              TANDEM_STATUS_OK)
        << tandem_last_error();
    EXPECT_FLOAT_EQ(static_cast<float>(problem.out().Get({0, 0, 0, 0})),
                    static_cast<float>(step + 1) / 2);
  }
  tandem_plan_destroy(plan);
}

TEST(KvCache, TruncatingTakesBackWhatWasAppended) {
  Case problem(GrownSpec(TANDEM_DTYPE_BF16, 2));
  Cache cache(problem, kRagged);
  ASSERT_EQ(Attend("", cache.problem(), problem), TANDEM_STATUS_OK);
  const std::vector<uint8_t> expected = problem.OutputBytes();
  Tensor k(TANDEM_DTYPE_BF16, {4, 2, 9, 40}), v(TANDEM_DTYPE_BF16, {4, 2, 9, 24});
  k.FillBytes(kPoison);
  v.FillBytes(kPoison);
  const Tensor nine = IndexTensor({0, 9, 9, 9}), before = IndexTensor({700, 0, 65, 321});
  ASSERT_EQ(tandem_kv_cache_append(cache.get(), TANDEM_LAYOUT_BHSD, k.get(), v.get(), nine.get()),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  ASSERT_EQ(tandem_kv_cache_truncate(cache.get(), before.get()), TANDEM_STATUS_OK)
      << tandem_last_error();
  ASSERT_EQ(Attend("", cache.problem(), problem), TANDEM_STATUS_OK);
  EXPECT_EQ(problem.OutputBytes(), expected) << "NaN in unused rows shows";
  ASSERT_EQ(tandem_kv_cache_truncate(cache.get(), nullptr), TANDEM_STATUS_OK);
  int32_t lengths[4] = {1, 1, 1, 1};
  ASSERT_EQ(tandem_kv_cache_lengths(cache.get(), lengths), TANDEM_STATUS_OK);
  EXPECT_EQ(std::count(lengths, lengths + 4, 0), 4);
  ASSERT_EQ(Attend("", cache.problem(), problem), TANDEM_STATUS_OK);
  EXPECT_EQ(problem.out().Get({0, 0, 0, 0}), 0.0) << "nothing is visible";
}

void ExpectRefused(tandem_status status, const std::vector<std::string>& parts,
                   tandem_status expected = TANDEM_STATUS_INVALID_ARGUMENT) {
  EXPECT_EQ(status, expected);
  const std::string message = tandem_last_error();
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

TEST(KvCache, RefusesBadConfigurations) {
  tandem_kv_cache_config good = TANDEM_KV_CACHE_CONFIG_INIT;
  good.dtype = TANDEM_DTYPE_F16;
  good.batch = good.kv_heads = good.capacity = good.qk_dim = good.v_dim = 3;
  size_t size = 0;
  ASSERT_EQ(tandem_kv_cache_size(&good, &size), TANDEM_STATUS_OK);
  const auto expect = [&](auto spoil, const std::vector<std::string>& parts) {
    tandem_kv_cache_config config = good;
    spoil(&config);
    ExpectRefused(tandem_kv_cache_size(&config, &size), parts);
  };
  expect([](auto* c) { c->struct_size = 8; }, {"config", "TANDEM_KV_CACHE_CONFIG_INIT"});
  expect([](auto* c) { c->dtype = TANDEM_DTYPE_F64; }, {"dtype is 4"});
  expect([](auto* c) { c->batch = 0; }, {"batch is 0"});
  expect([](auto* c) { c->kv_heads = -1; }, {"kv_heads is -1"});
  expect([](auto* c) { c->capacity = INT64_MAX; }, {"capacity is 9223372036854775807"});
  expect([](auto* c) { c->qk_dim = 0; }, {"qk_dim is 0"});
  expect([](auto* c) { c->v_dim = 65537; }, {"v_dim is 65537", "65536"});
  expect([](auto* c) { c->batch = c->capacity = 2147483583; }, {"capacity", "2^60"});
  ExpectRefused(tandem_kv_cache_size(nullptr, &size), {"config is null"});
  ExpectRefused(tandem_kv_cache_size(&good, nullptr), {"size is null"});
  alignas(256) static char memory[1 << 14];
  tandem_kv_cache* cache = nullptr;
  ExpectRefused(tandem_kv_cache_create(&good, memory, size, nullptr), {"cache is null"});
  ExpectRefused(tandem_kv_cache_create(&good, memory + 64, size, &cache), {"memory is", "256"});
  ExpectRefused(tandem_kv_cache_create(&good, nullptr, size, &cache), {"memory is", "256"});
  ExpectRefused(tandem_kv_cache_create(&good, memory, size - 1, &cache), {"size is"},
                TANDEM_STATUS_WORKSPACE_TOO_SMALL);
  EXPECT_EQ(cache, nullptr);
  tandem_kv_cache_destroy(nullptr);
}

TEST(KvCache, RefusesBadAppendsAndStaysAsItWas) {
  Case problem(GrownSpec(TANDEM_DTYPE_F32, 1));
  Cache cache(problem, kRagged);
  const Tensor k(TANDEM_DTYPE_F32, {4, 2, 3, 40}), v(TANDEM_DTYPE_F32, {4, 2, 3, 24});
  const auto append = [&](const tandem_tensor* keys, const tandem_tensor* values,
                          const tandem_tensor* lengths) {
    return tandem_kv_cache_append(cache.get(), TANDEM_LAYOUT_BHSD, keys, values, lengths);
  };
  const Tensor half(TANDEM_DTYPE_F16, {4, 2, 3, 40}), batch(TANDEM_DTYPE_F32, {3, 2, 3, 40}),
      heads(TANDEM_DTYPE_F32, {4, 3, 3, 40}), rows(TANDEM_DTYPE_F32, {4, 2, 2, 24});
  ExpectRefused(append(nullptr, v.get(), nullptr), {"k"});
  ExpectRefused(append(half.get(), v.get(), nullptr), {"k", "dtype"});
  ExpectRefused(append(batch.get(), v.get(), nullptr), {"k", "the batch of the cache"});
  ExpectRefused(append(heads.get(), v.get(), nullptr), {"k", "the heads of the cache"});
  ExpectRefused(append(k.get(), k.get(), nullptr), {"v", "the head dimension of the cache"});
  ExpectRefused(append(k.get(), rows.get(), nullptr), {"v", "the rows of k"});
  tandem_tensor on_device = *k.get();
  on_device.device_type = TANDEM_DEVICE_CUDA;
  ExpectRefused(append(&on_device, v.get(), nullptr), {"k", "host memory"});
  ExpectRefused(append(k.get(), v.get(), nullptr), {"sequence 0", "at most 0", "700"});
  const Tensor four = IndexTensor({0, 4, 0, 0}), minus = IndexTensor({0, 0, -1, 0}),
               three = IndexTensor({0, 1, 2});
  ExpectRefused(append(k.get(), v.get(), four.get()), {"lengths[1] is 4", "[0, 3]"});
  ExpectRefused(append(k.get(), v.get(), minus.get()), {"lengths[2] is -1"});
  ExpectRefused(append(k.get(), v.get(), three.get()), {"lengths", "the batch of the cache"});
  ExpectRefused(tandem_kv_cache_append(nullptr, TANDEM_LAYOUT_BHSD, k.get(), v.get(), nullptr),
                {"cache is null"});
  ExpectRefused(tandem_kv_cache_append(cache.get(), TANDEM_LAYOUT_THD, k.get(), v.get(), nullptr),
                {"layout is 3"});
  const Tensor more = IndexTensor({700, 1, 65, 321});
  ExpectRefused(tandem_kv_cache_truncate(cache.get(), more.get()), {"lengths[1] is 1", "[0, 0]"});
  ExpectRefused(tandem_kv_cache_truncate(nullptr, nullptr), {"cache is null"});
  int32_t lengths[4] = {};
  ExpectRefused(tandem_kv_cache_lengths(cache.get(), nullptr), {"lengths is null"});
  ASSERT_EQ(tandem_kv_cache_lengths(cache.get(), lengths), TANDEM_STATUS_OK);
  EXPECT_EQ(std::vector<int32_t>(lengths, lengths + 4), (std::vector<int32_t>{700, 0, 65, 321}));
}

TEST(KvCache, ProblemsSayWhatDoesNotGoWithIt) {
  Case problem(GrownSpec(TANDEM_DTYPE_F32, 1));
  Cache cache(problem, kRagged);
  const auto expect = [&](auto spoil, const std::vector<std::string>& parts) {
    tandem_problem spoilt = cache.problem();
    spoil(&spoilt);
    ExpectRefused(Attend("", spoilt, problem), parts);
  };
  expect([&](auto* p) { p->k = problem.problem().k; }, {"k is given"});
  expect([&](auto* p) { p->v = problem.problem().v; }, {"v is given"});
  expect([&](auto* p) { p->block_table = problem.problem().k; }, {"block_table is given"});
  expect([&](auto* p) { p->kv_offset = 1; }, {"kv_offset is given"});
  expect([&](auto* p) { p->global_kv_len = 900; }, {"global_kv_len is given"});
  const Tensor half(TANDEM_DTYPE_F16, {4, 1, 6, 40}), batch(TANDEM_DTYPE_F32, {3, 1, 6, 40}),
      heads(TANDEM_DTYPE_F32, {4, 1, 5, 40}), dim(TANDEM_DTYPE_F32, {4, 1, 6, 41});
  expect([&](auto* p) { p->q = half.get(); }, {"kv_cache: its dtype is 1"});
  expect([&](auto* p) { p->q = batch.get(); }, {"kv_cache: its batch is 4"});
  expect([&](auto* p) { p->q = heads.get(); }, {"kv_cache: it has 2 heads"});
  expect([&](auto* p) { p->q = dim.get(); }, {"kv_cache: its head dimension is 40"});
  const Tensor longer = IndexTensor({700, 1, 65, 321});
  tandem_lengths_term term = TANDEM_LENGTHS_TERM_INIT;
  term.kv_lengths = longer.get();
  const tandem_mask_term* terms[] = {&term.head};
  expect(
      [&](auto* p) {
        p->mask_terms = terms;
        p->mask_term_count = 1;
      },
      {"kv_lengths[1] is 1", "at most the 0 keys"});
  size_t size = 0;
  ExpectRefused(tandem_mask_plan_size(&cache.problem(), nullptr, &size), {"kv_cache is given"});
  tandem_gradients gradients = TANDEM_GRADIENTS_INIT;
  gradients.dout = problem.outputs().out;
  ExpectRefused(
      tandem_attention_backward(&cache.problem(), &problem.outputs(), &gradients, nullptr),
      {"kv_cache is given", "gradients"});
}

TEST(KvCache, LengthsMayBeShorterThanWhatItHolds) {
  const CaseSpec spec = GrownSpec(TANDEM_DTYPE_F32, 1);
  Case problem(spec);
  CaseSpec all = spec;
  all.kv_lens = {700, 700, 700, 700};
  Case longer(all);
  Cache cache(longer, {700});
  tandem_problem shortened = cache.problem();
  shortened.q = problem.problem().q;
  shortened.mask_terms = problem.problem().mask_terms;
  ASSERT_EQ(Attend("reference.cpu", shortened, problem), TANDEM_STATUS_OK) << tandem_last_error();
  for (const Kernel& kernel : ForwardKernels()) {
    if (kernel.name == "reference.cpu") ExpectAgreement(kernel, problem);
  }
}

}  // namespace
}  // namespace tandem::test
