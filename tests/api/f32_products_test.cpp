// TANDEM_CPU_F32 chooses how f32 tensors are multiplied. CTest runs this program once per value.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "tests/api/call.h"
#include "tests/support/backward_case.h"

namespace tandem::test {
namespace {

std::string ChosenKernel(const tandem_problem& problem, const tandem_outputs& outputs,
                         const tandem_gradients* gradients) {
  tandem_plan* plan = nullptr;
  EXPECT_EQ(tandem_plan_create(&problem, &outputs, gradients, nullptr, &plan), TANDEM_STATUS_OK)
      << tandem_last_error();
  const std::string kernel = plan == nullptr ? "" : tandem_plan_kernel(plan);
  tandem_plan_destroy(plan);
  return kernel;
}

TEST(F32Products, ChooseTheKernel) {
  const char* value = std::getenv("TANDEM_CPU_F32");
  const std::string wanted = value == nullptr ? "" : value;
  Call call(FullSpec());
  ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  BackwardCase backward(FullSpec());
  const std::string description = tandem_device_description(TANDEM_DEVICE_CPU, 0);
  for (const std::string& kernel :
       {ChosenKernel(call.problem, call.outputs, nullptr),
        ChosenKernel(backward.forward().problem(), backward.forward().outputs(),
                     &backward.gradients())}) {
    const bool splits =
        kernel.find("amx") != std::string::npos || kernel.find("tiles") != std::string::npos;
    if (wanted == "fma") {
      EXPECT_FALSE(splits) << kernel;
    }
    // The tiles are emulated from AVX2 on.
    if (wanted == "split" && description.find("avx2") != std::string::npos) {
      EXPECT_TRUE(splits) << kernel;
    }
  }
  if (wanted == "both") {
    EXPECT_NE(description.find("TANDEM_CPU_F32 is \"both\""), std::string::npos) << description;
  }
}

}  // namespace
}  // namespace tandem::test
