// The same bits of every gradient: run after run, with any number of threads, with a caller's own
// threads, and whatever else is in the batch. Kernels that add dQ up in no order (IsOrdered) owe
// them for dK and dV, and decline where gradients.deterministic is asked for.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "tests/kernels/backward.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs;
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    const char* suffix =
        dtype == TANDEM_DTYPE_F32 ? "_f32" : (dtype == TANDEM_DTYPE_F16 ? "_f16" : "_bf16");
    CaseSpec base;
    base.dtype = dtype;
    base.batch = 3;
    base.q_heads = 4;
    base.kv_heads = 2;
    base.q_rows = 330;
    base.kv_rows = 530;
    base.qk_dim = base.v_dim = 32;
    CaseSpec spec = base;
    spec.name = std::string("many_planes") + suffix;
    spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
    specs.push_back(spec);
    spec.name = std::string("one_plane") + suffix;  // its blocks are the tasks
    spec.batch = spec.kv_heads = 1;
    spec.kv_rows = 900;
    specs.push_back(spec);
    spec = base;
    spec.name = std::string("shared_bias") + suffix;  // planes add to the same elements
    spec.bias.dtype = TANDEM_DTYPE_F32;
    spec.bias.per_batch = spec.bias.per_head = false;
    spec.sink = true;
    spec.alibi_rank = 1;
    spec.dropout_rate = 0.2f;
    spec.terms = {Dense(4), Lengths(true, true)};
    specs.push_back(spec);
    spec.name = std::string("bias_by_row") + suffix;
    spec.bias.per_key = false;
    specs.push_back(spec);
    spec = base;
    spec.name = std::string("packed") + suffix;
    spec.layout = TANDEM_LAYOUT_THD;
    spec.q_lens = {300, 1, 65};
    spec.kv_lens = {520, 130, 64};
    spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Dense(4)};
    specs.push_back(spec);
  }
  return specs;
}

std::vector<std::tuple<Kernel, CaseSpec>> Parameters() {
  std::vector<std::tuple<Kernel, CaseSpec>> all;
  for (const Kernel& kernel : BackwardKernels()) {
    for (CaseSpec spec : Specs()) {
      if (!MustAcceptBackward(kernel, spec)) continue;
      if (kernel.name.ends_with("reference") || kernel.name.starts_with("reference")) {
        if (spec.dtype != TANDEM_DTYPE_F32) continue;  // it is slow, and the same for all types
        spec.q_rows = 70;
        spec.kv_rows = 90;
        spec.q_lens.assign(spec.q_lens.size(), 40);
        spec.kv_lens.assign(spec.kv_lens.size(), 50);
      }
      all.emplace_back(kernel, spec);
    }
  }
  return all;
}

class BackwardDeterminism : public ::testing::TestWithParam<std::tuple<Kernel, CaseSpec>> {
 protected:
  const Kernel& kernel() const { return std::get<0>(GetParam()); }
  const CaseSpec& spec() const { return std::get<1>(GetParam()); }
};

// What must be equal.
std::vector<uint8_t> OrderedBytes(const Kernel& kernel, BackwardCase& c) {
  if (IsOrdered(kernel)) return c.GradientBytes();
  std::vector<uint8_t> bytes = c.dk().ElementBytes();
  const std::vector<uint8_t> dv = c.dv().ElementBytes();
  bytes.insert(bytes.end(), dv.begin(), dv.end());
  return bytes;
}

TEST_P(BackwardDeterminism, IsServedOnRequestOrDeclined) {
  BackwardCase c(spec());
  ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  c.gradients().deterministic = 1;
  const tandem_status status = RunBackward(kernel(), c);
  EXPECT_EQ(status, IsOrdered(kernel()) ? TANDEM_STATUS_OK : TANDEM_STATUS_UNSUPPORTED)
      << tandem_last_error();
}

TEST_P(BackwardDeterminism, RunsAndThreadsChangeNothing) {
  BackwardCase c(spec());
  ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  ASSERT_TRUE(RunBackwardOrDecline(kernel(), c, {.threads = 1}));
  const std::vector<uint8_t> one = OrderedBytes(kernel(), c);
  for (const int threads : {1, 2, 3, 5, 16, 2, 2, 2}) {
    ASSERT_TRUE(RunBackwardOrDecline(kernel(), c, {.threads = threads}));
    EXPECT_EQ(OrderedBytes(kernel(), c), one) << threads << " threads";
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
// One that runs one task after another: none may wait for another.
void SerialPool(void* context, int64_t count, void (*task)(void*, int64_t), void* argument) {
  ++*static_cast<std::atomic<int>*>(context);
  for (int64_t index = count - 1; index >= 0; --index) task(argument, index);
}

TEST_P(BackwardDeterminism, CallersExecutorChangesNothing) {
  if (kernel().device != TANDEM_DEVICE_CPU) return;
  BackwardCase c(spec());
  ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
  const std::vector<uint8_t> own = c.GradientBytes();
  for (const auto pool : {ReversedPool, SerialPool}) {
    std::atomic<int> calls{0};
    tandem_executor executor = TANDEM_EXECUTOR_INIT;
    executor.concurrency = 3;
    executor.context = &calls;
    executor.parallel_for = pool;
    ASSERT_TRUE(RunBackwardOrDecline(kernel(), c, {.executor = &executor}));
    EXPECT_EQ(c.GradientBytes(), own);
    EXPECT_GT(calls, 0) << "the executor was not used";
  }
}

// dQ, dK and dV of sequence 0, dQ where it must be equal.
std::vector<float> FirstSequence(const Kernel& kernel, BackwardCase& c) {
  std::vector<float> values;
  Case& f = c.forward();
  for (int64_t h = 0; h < f.spec().q_heads && IsOrdered(kernel); ++h) {
    for (int64_t i = 0; i < f.sequence(0).q_rows; ++i) {
      for (int64_t d = 0; d < f.spec().qk_dim; ++d) {
        values.push_back(static_cast<float>(c.dq().Get(f.QueryIndex(0, h, i, d))));
      }
    }
  }
  for (int64_t h = 0; h < f.spec().kv_heads; ++h) {
    for (int64_t j = 0; j < f.sequence(0).kv_rows; ++j) {
      for (int64_t d = 0; d < f.spec().qk_dim; ++d) {
        values.push_back(static_cast<float>(c.dk().Get(f.KeyIndex(0, h, j, d))));
        values.push_back(static_cast<float>(c.dv().Get(f.KeyIndex(0, h, j, d))));
      }
    }
  }
  return values;
}

TEST_P(BackwardDeterminism, BatchMatesChangeNothing) {
  std::vector<float> alone;
  for (const int64_t batch : {1, 3, 8}) {
    BackwardCase c(WithBatch(spec(), batch));
    c.dout().Fill(0.5);  // dO and dLSE are drawn for all sequences together
    c.dlse().Fill(-0.25);
    ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
    ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
    const std::vector<float> first = FirstSequence(kernel(), c);
    if (batch == 1) alone = first;
    ASSERT_EQ(first.size(), alone.size());
    EXPECT_EQ(std::memcmp(first.data(), alone.data(), first.size() * sizeof(float)), 0)
        << "batch " << batch;
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, BackwardDeterminism, ::testing::ValuesIn(Parameters()),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
