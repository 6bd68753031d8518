// TANDEM_CPU_ISA caps the kernels that this machine may run. CTest runs this program once per
// value.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/api/call.h"
#include "tests/support/kernels.h"

namespace tandem::test {
namespace {

// What a kernel's name says that it needs, as a rank: 0 baseline, 1 avx2, 2 avx512, 3 amx.
int NeededTier(const std::string& kernel) {
  if (kernel.find("amx") != std::string::npos) return 3;
  if (kernel.find("avx512") != std::string::npos) return 2;
  return kernel.find("avx2") != std::string::npos ? 1 : 0;
}

TEST(IsaCap, ForbidsWhatIsAboveIt) {
  const char* value = std::getenv("TANDEM_CPU_ISA");
  const std::string cap = value == nullptr ? "amx" : value;
  const bool known = cap == "baseline" || cap == "avx2" || cap == "avx512" || cap == "amx";
  // A misspelt cap must not lift it.
  const int tier =
      !known || cap == "baseline" ? 0 : (cap == "avx2" ? 1 : (cap == "avx512" ? 2 : 3));
  bool has_tier[4] = {};
  for (const Kernel& kernel : RegisteredKernels()) {
    if (kernel.device != TANDEM_DEVICE_CPU) continue;
    if (NeededTier(kernel.name) > tier) {
      EXPECT_FALSE(kernel.Available()) << kernel << " is above " << cap;
      EXPECT_NE(kernel.unavailable.find("AVX"), std::string::npos) << kernel.unavailable;
    }
    if (NeededTier(kernel.name) == 0) {
      EXPECT_TRUE(kernel.Available()) << kernel.unavailable;
    }
    has_tier[NeededTier(kernel.name)] |= kernel.Available();
  }
  EXPECT_TRUE(has_tier[0]);
  EXPECT_TRUE(has_tier[1] || tier < 1 || !IsRequired("avx2"));
  EXPECT_TRUE(has_tier[2] || tier < 2 || !IsRequired("avx512"));
  EXPECT_TRUE(has_tier[3] || tier < 3 || !IsRequired("amx"));
  Call call(FullSpec());
  ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  tandem_plan* plan = nullptr;
  ASSERT_EQ(tandem_plan_create(&call.problem, &call.outputs, nullptr, nullptr, &plan),
            TANDEM_STATUS_OK);
  EXPECT_LE(NeededTier(tandem_plan_kernel(plan)), tier);
  tandem_plan_destroy(plan);
  EXPECT_NE(tandem_device_description(TANDEM_DEVICE_CPU, 0), nullptr);
}

}  // namespace
}  // namespace tandem::test
