#include "tests/kernels/backward.h"

#include <gtest/gtest.h>

#include "oracle/gradient.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

constexpr uint8_t kPrefill = 0xff;  // NaN in every type

}  // namespace

bool RunBackwardOrDecline(const Kernel& kernel, BackwardCase& problem,
                          const RunSettings& settings) {
  problem.PrefillGradients(kPrefill);
  const tandem_status status = RunBackward(kernel, problem, settings);
  if (status == TANDEM_STATUS_OK) return true;
  const std::string message = tandem_last_error();
  EXPECT_EQ(status, TANDEM_STATUS_UNSUPPORTED) << kernel << ": " << message;
  EXPECT_FALSE(MustAcceptBackward(kernel, problem.spec()))
      << kernel << " may not decline this, but says: " << message;
  EXPECT_NE(message.find(kernel.name), std::string::npos) << message;
  EXPECT_TRUE(problem.GradientsHold(kPrefill)) << kernel << " declined, but wrote";
  return false;
}

void ExpectGradients(const Kernel& kernel, BackwardCase& problem) {
  oracle::GradientCompareOptions options;
  options.arithmetic = ArithmeticOf(kernel, problem.spec());
  const oracle::GradientResults results = oracle::CompareGradients(
      problem.forward().problem(), problem.forward().outputs(), problem.gradients(), options);
  const oracle::GradientResult total = results.Total();
  EXPECT_TRUE(results.InContract())
      << kernel << " on " << Summary(problem.spec()) << "\n  error / bound "
      << total.error_over_bound << ", " << total.nonfinite_mismatches
      << " NaN or infinity mismatches, " << total.zero_mismatches << " zero mismatches\n  "
      << total.worst;
  EXPECT_TRUE(problem.GapsHold(kPrefill)) << kernel << " wrote beside a gradient";
}

void CheckBackward(const Kernel& kernel, const CaseSpec& spec) {
  BackwardCase problem(spec);
  ASSERT_EQ(problem.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  if (RunBackwardOrDecline(kernel, problem)) ExpectGradients(kernel, problem);
}

std::vector<Kernel> BackwardKernels() {
  std::vector<Kernel> kernels;
  for (const Kernel& kernel : AvailableKernels()) {
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      CaseSpec spec;
      spec.dtype = dtype;
      if (!MustAcceptBackward(kernel, spec)) continue;
      kernels.push_back(kernel);
      break;
    }
  }
  return kernels;
}

}  // namespace tandem::test
