// The backward pass of every kernel on every case of the table and on random cases, against the f64
// oracle.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/kernels/backward.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

using Parameter = std::tuple<Kernel, CaseSpec>;
class BackwardAgreement : public ::testing::TestWithParam<Parameter> {};

TEST_P(BackwardAgreement, WithTheOracle) {
  const auto& [kernel, spec] = GetParam();
  if (!MustAcceptBackward(kernel, spec)) GTEST_SKIP() << "of another kernel";
  CheckBackward(kernel, spec);
}

INSTANTIATE_TEST_SUITE_P(Table, BackwardAgreement,
                         ::testing::Combine(::testing::ValuesIn(BackwardKernels()),
                                            ::testing::ValuesIn(CaseTable())),
                         KernelAndCaseName());

class BackwardRandom : public ::testing::TestWithParam<std::tuple<Kernel, int>> {};

// TANDEM_TEST_SEEDS: seeds per test, of which there are ten per kernel.
TEST_P(BackwardRandom, AgreesWithTheOracle) {
  const auto& [kernel, part] = GetParam();
  const char* setting = std::getenv("TANDEM_TEST_SEEDS");
  const int seeds = setting == nullptr ? 12 : std::atoi(setting);
  for (int n = 0; n < seeds; ++n) {
    const CaseSpec spec = RandomCase(static_cast<uint64_t>(n * 10 + part + 500));
    if (!MustAcceptBackward(kernel, spec)) continue;
    CheckBackward(kernel, spec);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, BackwardRandom,
                         ::testing::Combine(::testing::ValuesIn(BackwardKernels()),
                                            ::testing::Range(0, 10)),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param).name + "__" +
                                           std::to_string(std::get<1>(info.param)));
                         });

}  // namespace
}  // namespace tandem::test
