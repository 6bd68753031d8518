// One kernel on the backward pass of one case: run, judged by the oracle, or counted as declined.
#ifndef TANDEM_TESTS_KERNELS_BACKWARD_H_
#define TANDEM_TESTS_KERNELS_BACKWARD_H_

#include "tests/support/backward_case.h"
#include "tests/support/kernels.h"

namespace tandem::test {

// As RunOrCountDeclined of the forward pass; O and LSE are those that the case holds.
bool RunBackwardOrDecline(const Kernel& kernel, BackwardCase& problem,
                          const RunSettings& settings = {});

// Every element of every gradient within its bound, NaN where and only where it belongs, exactly +0
// where no pair contributes, nothing written beside the gradients.
void ExpectGradients(const Kernel& kernel, BackwardCase& problem);

// The forward pass, and both of the above.
void CheckBackward(const Kernel& kernel, const CaseSpec& spec);

// The kernels that this machine can run and that serve some backward pass.
std::vector<Kernel> BackwardKernels();

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_BACKWARD_H_
