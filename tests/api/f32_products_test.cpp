// TANDEM_CPU_F32 chooses how f32 tensors are multiplied. CTest runs this program once per value.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "tests/api/call.h"

namespace tandem::test {
namespace {

TEST(F32Products, ChooseTheKernel) {
  const char* value = std::getenv("TANDEM_CPU_F32");
  const std::string wanted = value == nullptr ? "" : value;
  Call call(FullSpec());
  ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  tandem_plan* plan = nullptr;
  ASSERT_EQ(tandem_plan_create(&call.problem, &call.outputs, nullptr, nullptr, &plan),
            TANDEM_STATUS_OK);
  const std::string kernel = tandem_plan_kernel(plan);
  tandem_plan_destroy(plan);
  const bool splits =
      kernel.find("amx") != std::string::npos || kernel.find("tiles") != std::string::npos;
  if (wanted == "fma") {
    EXPECT_FALSE(splits) << kernel;
  }
  // The tiles are emulated from AVX2 on.
  const std::string description = tandem_device_description(TANDEM_DEVICE_CPU, 0);
  if (wanted == "split" && description.find("avx2") != std::string::npos) {
    EXPECT_TRUE(splits) << kernel;
  }
  if (wanted == "both") {
    EXPECT_NE(description.find("TANDEM_CPU_F32 is \"both\""), std::string::npos) << description;
  }
}

}  // namespace
}  // namespace tandem::test
