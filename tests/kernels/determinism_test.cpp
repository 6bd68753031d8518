// The same bits: run after run, with any number of threads, with a caller's own threads, whatever
// else is in the batch, and when many threads share one plan.
#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

CaseSpec Base(const char* name, tandem_dtype dtype) {
  CaseSpec spec;
  spec.name = name;
  spec.dtype = dtype;
  spec.batch = 3;
  spec.q_heads = 4;
  spec.kv_heads = 2;
  spec.q_rows = 70;
  spec.kv_rows = 200;
  spec.qk_dim = 64;
  spec.v_dim = 64;
  return spec;
}

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs;
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    const char* suffix =
        dtype == TANDEM_DTYPE_F32 ? "_f32" : (dtype == TANDEM_DTYPE_F16 ? "_f16" : "_bf16");
    specs.push_back(Base("plain", dtype));
    CaseSpec masked = Base("masked", dtype);
    masked.terms = {Dense(4), Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Lengths(true, true)};
    masked.bias.dtype = TANDEM_DTYPE_F32;
    masked.dropout_rate = 0.2f;
    masked.sink = true;
    specs.push_back(masked);
    masked.name = "terms";
    masked.bias = {};
    masked.softcap = 10.0f;
    specs.push_back(masked);
    CaseSpec decode = Base("decode", dtype);  // short queries, where keys may be split
    decode.q_rows = 1;
    decode.kv_rows = 900;
    specs.push_back(decode);
    CaseSpec packed = Base("packed", dtype);
    packed.layout = TANDEM_LAYOUT_THD;
    packed.q_lens = {70, 1, 65};
    packed.kv_lens = {200, 130, 64};
    packed.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Dense(4)};
    specs.push_back(packed);
    for (size_t n = specs.size() - 5; n < specs.size(); ++n) specs[n].name += suffix;
  }
  return specs;
}

using Parameter = std::tuple<Kernel, CaseSpec>;
class Determinism : public ::testing::TestWithParam<Parameter> {
 protected:
  const Kernel& kernel() const { return std::get<0>(GetParam()); }
  const CaseSpec& spec() const { return std::get<1>(GetParam()); }
};

TEST_P(Determinism, TwentyRunsAreEqual) {
  Case c(spec());
  if (!RunOrCountDeclined(kernel(), c)) return;
  const std::vector<uint8_t> first = c.OutputBytes();
  for (int run = 1; run < 20; ++run) {
    ASSERT_TRUE(RunOrCountDeclined(kernel(), c));
    ASSERT_EQ(c.OutputBytes(), first) << "run " << run;
  }
}

TEST_P(Determinism, ThreadCountChangesNothing) {
  Case c(spec());
  if (!RunOrCountDeclined(kernel(), c, {.threads = 1})) return;
  const std::vector<uint8_t> one = c.OutputBytes();
  for (const int threads : {2, 5, 16}) {
    ASSERT_TRUE(RunOrCountDeclined(kernel(), c, {.threads = threads}));
    EXPECT_EQ(c.OutputBytes(), one) << threads << " threads";
  }
}

// Outputs of sequence 0 alone.
std::vector<uint8_t> FirstSequence(Case& c) {
  std::vector<uint8_t> bytes;
  const auto add = [&](double value) {
    const float exact = static_cast<float>(value);  // out is f32, f16 or bf16
    const uint8_t* begin = reinterpret_cast<const uint8_t*>(&exact);
    bytes.insert(bytes.end(), begin, begin + sizeof(exact));
  };
  for (int64_t h = 0; h < c.spec().q_heads; ++h) {
    for (int64_t i = 0; i < c.sequence(0).q_rows; ++i) {
      add(c.lse()->Get(c.LseIndex(0, h, i)));
      for (int64_t d = 0; d < c.spec().v_dim; ++d) add(c.out().Get(c.QueryIndex(0, h, i, d)));
    }
  }
  return bytes;
}

TEST_P(Determinism, BatchMatesChangeNothing) {
  std::vector<uint8_t> alone;
  for (const int64_t batch : {1, 3, 8}) {
    Case c(WithBatch(spec(), batch));
    if (!RunOrCountDeclined(kernel(), c)) return;
    const std::vector<uint8_t> first = FirstSequence(c);
    if (batch == 1) alone = first;
    EXPECT_EQ(first, alone) << "batch " << batch;
  }
}

// A pool of the caller: three threads that take the tasks from the end.
void ReversedPool(void* context, int64_t count, void (*task)(void*, int64_t), void* argument) {
  ++*static_cast<std::atomic<int>*>(context);
  std::atomic<int64_t> rest{count};
  const auto work = [&] {
    for (int64_t index = --rest; index >= 0; index = --rest) task(argument, index);
  };
  std::thread threads[2] = {std::thread(work), std::thread(work)};
  work();
  for (std::thread& thread : threads) thread.join();
}

TEST_P(Determinism, CallersExecutorChangesNothing) {
  if (kernel().device != TANDEM_DEVICE_CPU) return;
  Case c(spec());
  if (!RunOrCountDeclined(kernel(), c)) return;
  const std::vector<uint8_t> own = c.OutputBytes();
  std::atomic<int> calls{0};
  tandem_executor executor = TANDEM_EXECUTOR_INIT;
  executor.concurrency = 3;
  executor.context = &calls;
  executor.parallel_for = ReversedPool;
  ASSERT_TRUE(RunOrCountDeclined(kernel(), c, {.executor = &executor}));
  EXPECT_EQ(c.OutputBytes(), own);
  EXPECT_GT(calls, 0) << "the executor was not used";
}

TEST_P(Determinism, CallersParallelRegionChangesNothing) {
  Case c(spec());
  if (!RunOrCountDeclined(kernel(), c)) return;
  const std::vector<uint8_t> serial = c.OutputBytes();
  constexpr int kThreads = 3;
  std::unique_ptr<Case> copies[kThreads];
  for (auto& copy : copies) copy = std::make_unique<Case>(spec());
  tandem_status statuses[kThreads];
#pragma omp parallel for num_threads(kThreads)
  for (int n = 0; n < kThreads; ++n) statuses[n] = RunKernel(kernel(), *copies[n]);
  for (int n = 0; n < kThreads; ++n) {
    EXPECT_EQ(statuses[n], TANDEM_STATUS_OK);
    EXPECT_EQ(copies[n]->OutputBytes(), serial) << "thread " << n;
  }
}

struct AlignedFree {
  void operator()(void* memory) const { std::free(memory); }
};

TEST_P(Determinism, EightThreadsShareOnePlan) {
  if (kernel().device != TANDEM_DEVICE_CPU) return;  // plans do not stage host tensors
  Case c(spec());
  if (!RunOrCountDeclined(kernel(), c)) return;
  const std::vector<uint8_t> one_call = c.OutputBytes();
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.kernel = kernel().name.c_str();
  options.threads = 2;
  tandem_plan* plan = nullptr;
  ASSERT_EQ(tandem_plan_create(&c.problem(), &c.outputs(), nullptr, &options, &plan),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  EXPECT_EQ(tandem_plan_kernel(plan), kernel().name);
  constexpr int kThreads = 8;
  std::unique_ptr<Case> copies[kThreads];
  for (auto& copy : copies) copy = std::make_unique<Case>(spec());
  const size_t size = tandem_plan_workspace_size(plan);
  std::vector<std::thread> threads;
  tandem_status statuses[kThreads];
  for (int n = 0; n < kThreads; ++n) {
    threads.emplace_back([&, n] {
      std::unique_ptr<void, AlignedFree> workspace(std::aligned_alloc(256, (size + 256) & ~255ull));
      std::memset(workspace.get(), 0x7f, size);  // nothing may depend on what was there
      statuses[n] = tandem_plan_run(plan, &copies[n]->problem(), &copies[n]->outputs(), nullptr,
                                    workspace.get(), size, nullptr);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int n = 0; n < kThreads; ++n) {
    EXPECT_EQ(statuses[n], TANDEM_STATUS_OK);
    EXPECT_EQ(copies[n]->OutputBytes(), one_call) << "thread " << n;
  }
  tandem_plan_destroy(plan);
}

INSTANTIATE_TEST_SUITE_P(Kernels, Determinism,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(Specs())),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
