// Every registered kernel on every case of the table and on random cases, against the f64 oracle.
#include "tests/kernels/agreement.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

using Parameter = std::tuple<Kernel, CaseSpec>;

class Agreement : public ::testing::TestWithParam<Parameter> {};

TEST_P(Agreement, WithTheOracle) {
  const auto& [kernel, spec] = GetParam();
  CheckKernel(kernel, spec);
}

// A quarter of the table is enough for the sanitizers of devices, which are slow.
std::vector<CaseSpec> Quarter(bool wanted) {
  std::vector<CaseSpec> cases;
  const std::vector<CaseSpec> table = CaseTable();
  for (size_t n = 0; n < table.size(); ++n) {
    const bool in_quarter = n % 4 == 1 && table[n].kv_rows < 1000 && table[n].q_rows < 1000;
    if (in_quarter == wanted) cases.push_back(table[n]);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Small, Agreement,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(Quarter(true))),
                         KernelAndCaseName());
INSTANTIATE_TEST_SUITE_P(Table, Agreement,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(Quarter(false))),
                         KernelAndCaseName());

class RandomAgreement : public ::testing::TestWithParam<std::tuple<Kernel, int>> {};

// TANDEM_TEST_SEEDS: seeds per test, of which there are ten per kernel.
TEST_P(RandomAgreement, WithTheOracle) {
  const auto& [kernel, part] = GetParam();
  const char* setting = std::getenv("TANDEM_TEST_SEEDS");
  const int seeds = setting == nullptr ? 12 : std::atoi(setting);
  for (int n = 0; n < seeds; ++n) {
    CheckKernel(kernel, RandomCase(static_cast<uint64_t>(n * 10 + part)));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomAgreement,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::Range(0, 10)),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param).name + "__" +
                                           std::to_string(std::get<1>(info.param)));
                         });

class Presence : public ::testing::TestWithParam<Kernel> {};

TEST_P(Presence, KernelRunsHere) {
  if (GetParam().Available()) return;
  ASSERT_FALSE(IsRequired(GetParam())) << GetParam().unavailable;
  GTEST_SKIP() << GetParam().unavailable;
}

INSTANTIATE_TEST_SUITE_P(Small, Presence, ::testing::ValuesIn(RegisteredKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

TEST(PresenceSmall, RequiredHardwareIsThere) {
  const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  if (reason == nullptr) return;
  ASSERT_FALSE(IsRequired("cuda")) << reason;
  GTEST_SKIP() << reason;
}

TEST(PresenceSmall, ReferenceIsTheLastCpuKernel) {
  std::string last;
  for (const Kernel& kernel : RegisteredKernels()) {
    if (kernel.device == TANDEM_DEVICE_CPU) last = kernel.name;
  }
  EXPECT_EQ(last, "reference.cpu");
}

// Scores whose distance from 0 has a rounding error beyond what an exponential takes.
class HugeScores : public ::testing::TestWithParam<Kernel> {};

TEST_P(HugeScores, AgreeWithTheOracle) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    for (const float scale : {1.3e9f, 3e18f}) {
      CaseSpec spec = SizedCase("huge", TANDEM_LAYOUT_BHSD, 70, 200, 64, 64,
                                {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)}, 5);
      spec.dtype = dtype;
      spec.scale = scale;
      CheckKernel(GetParam(), spec);
      spec.q_rows = 1;
      CheckKernel(GetParam(), spec);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, HugeScores, ::testing::ValuesIn(ForwardKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
