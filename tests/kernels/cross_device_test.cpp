// CPU and CUDA side by side on the same host tensors: the same rows are empty, bit for bit, and the
// values differ by no more than the two bounds together.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "oracle/bounds.h"
#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

class CrossDevice : public ::testing::TestWithParam<CaseSpec> {};

TEST_P(CrossDevice, EmptyRowsAreTheSame) {
  const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  if (reason != nullptr) {
    ASSERT_FALSE(IsRequired("cuda")) << reason;
    GTEST_SKIP() << reason;
  }
  Case cpu(GetParam()), cuda(GetParam());
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.device_type = TANDEM_DEVICE_CPU;
  ASSERT_EQ(tandem_attention(&cpu.problem(), &cpu.outputs(), &options), TANDEM_STATUS_OK)
      << tandem_last_error();
  options.device_type = TANDEM_DEVICE_CUDA;
  const tandem_status status = tandem_attention(&cuda.problem(), &cuda.outputs(), &options);
  if (status == TANDEM_STATUS_UNSUPPORTED) {
    const int64_t widest = std::max(GetParam().qk_dim, GetParam().v_dim);
    EXPECT_GT(widest, 256) << tandem_last_error();
    return;
  }
  ASSERT_EQ(status, TANDEM_STATUS_OK) << tandem_last_error();
  const bool has_lse = cpu.lse().has_value();
  for (int64_t b = 0; b < cpu.batch(); ++b) {
    for (int64_t h = 0; h < GetParam().q_heads; ++h) {
      for (int64_t i = 0; has_lse && i < cpu.sequence(b).q_rows; ++i) {
        const double lse = cpu.lse()->Get(cpu.LseIndex(b, h, i));
        const double other = cuda.lse()->Get(cuda.LseIndex(b, h, i));
        ASSERT_EQ(lse == -HUGE_VAL, other == -HUGE_VAL) << "b " << b << " h " << h << " i " << i;
        if (lse != -HUGE_VAL) continue;
        for (int64_t d = 0; d < GetParam().v_dim; ++d) {
          const double zero = cuda.out().Get(cuda.QueryIndex(b, h, i, d));
          ASSERT_TRUE(zero == 0.0 && !std::signbit(zero)) << "b " << b << " h " << h << " i " << i;
        }
      }
    }
  }
  // Each is within its bound of the oracle, so the two are within the sum of their bounds.
  Kernel as_cpu = {"the CPU's choice", TANDEM_DEVICE_CPU, ""};
  Kernel as_cuda = {"CUDA's choice", TANDEM_DEVICE_CUDA, ""};
  ExpectAgreement(as_cpu, cpu);
  ExpectAgreement(as_cuda, cuda);
}

INSTANTIATE_TEST_SUITE_P(Table, CrossDevice, ::testing::ValuesIn(CaseTable()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
