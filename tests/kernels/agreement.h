// One kernel on one case: run, judged by the oracle, or counted as declined.
#ifndef TANDEM_TESTS_KERNELS_AGREEMENT_H_
#define TANDEM_TESTS_KERNELS_AGREEMENT_H_

#include "tests/support/case.h"
#include "tests/support/kernels.h"

namespace tandem::test {

// Runs the kernel; false when it declined (which is a failure where MustAccept says so, and else
// counted) or failed. A kernel that declines must name itself and leave the outputs untouched.
bool RunOrCountDeclined(const Kernel& kernel, Case& problem, const RunSettings& settings = {});

// Every element within its bound, NaN where and only where it belongs, empty rows exactly +0 and
// -inf, nothing written beside the outputs.
void ExpectAgreement(const Kernel& kernel, Case& problem);

// A third of the table's cases whose keys and values can be held otherwise than as tensors of their
// own, and all of those with one query row.
std::vector<CaseSpec> CasesWithKeysElsewhere();
// What a run of one of them by this kernel gave: agreement, or that it is not served, which no
// kernel of the CPU may say where MustAccept.
void ExpectAgreementOrUnsupported(const Kernel& kernel, Case& problem, tandem_status status);

// Both in one.
void CheckKernel(const Kernel& kernel, const CaseSpec& spec);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_AGREEMENT_H_
