// Tests that need a GPU: skipped where there is none, and a failure where one is required.
#ifndef TANDEM_TESTS_CUDA_ON_GPU_H_
#define TANDEM_TESTS_CUDA_ON_GPU_H_

#include <gtest/gtest.h>

#include <vector>

#include "tandem/tandem.h"
#include "tests/support/kernels.h"

namespace tandem::test {

class OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (tandem_device_count(TANDEM_DEVICE_CUDA) > 0) return;
    const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
    ASSERT_FALSE(IsRequired("cuda")) << reason;
    GTEST_SKIP() << reason;
  }
};

// The same for one kernel, which this GPU may be too old for.
class EachCudaKernel : public testing::TestWithParam<Kernel> {
 protected:
  void SetUp() override {
    if (GetParam().Available()) return;
    ASSERT_FALSE(IsRequired(GetParam())) << GetParam().unavailable;
    GTEST_SKIP() << GetParam().unavailable;
  }
};

inline std::vector<Kernel> CudaKernels() {
  std::vector<Kernel> kernels = RegisteredKernels();
  std::erase_if(kernels, [](const Kernel& kernel) { return kernel.device != TANDEM_DEVICE_CUDA; });
  return kernels;
}

}  // namespace tandem::test

#endif  // TANDEM_TESTS_CUDA_ON_GPU_H_
