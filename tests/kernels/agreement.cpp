#include "tests/kernels/agreement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <map>

#include "oracle/compare.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

constexpr uint8_t kPrefill = 0xff;  // NaN in every output type

struct Count {
  int accepted = 0;
  int declined = 0;
};

std::map<std::string, Count>& Counts() {
  static auto* counts = new std::map<std::string, Count>;
  return *counts;
}

// Shows at the end how many cases each kernel took and declined.
class CountReport : public ::testing::Environment {
 public:
  void TearDown() override {
    for (const auto& [name, count] : Counts()) {
      std::cout << "[  COUNT   ] " << name << ": " << count.accepted << " runs, " << count.declined
                << " declined\n";
    }
  }
};
const ::testing::Environment* const kReport = ::testing::AddGlobalTestEnvironment(new CountReport);

bool Untouched(Case& problem) {
  const auto holds = [](const std::vector<uint8_t>& bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == kPrefill; });
  };
  return holds(problem.out().Bytes()) && (!problem.lse() || holds(problem.lse()->Bytes()));
}

}  // namespace

bool RunOrCountDeclined(const Kernel& kernel, Case& problem, const RunSettings& settings) {
  problem.PrefillOutputs(kPrefill);
  const tandem_status status = RunKernel(kernel, problem, settings);
  if (status == TANDEM_STATUS_OK) {
    ++Counts()[kernel.name].accepted;
    return true;
  }
  const std::string message = tandem_last_error();
  EXPECT_EQ(status, TANDEM_STATUS_UNSUPPORTED) << kernel << ": " << message;
  EXPECT_FALSE(MustAccept(kernel, problem.spec()))
      << kernel << " may not decline this, but says: " << message;
  EXPECT_NE(message.find(kernel.name), std::string::npos) << message;
  EXPECT_TRUE(Untouched(problem)) << kernel << " declined, but wrote";
  ++Counts()[kernel.name].declined;
  return false;
}

void ExpectAgreement(const Kernel& kernel, Case& problem) {
  oracle::CompareOptions options;
  options.arithmetic = ArithmeticOf(kernel, problem.spec());
  const oracle::CompareResult result =
      oracle::Compare(problem.problem(), problem.outputs(), options);
  EXPECT_TRUE(result.InContract())
      << kernel << " on " << Summary(problem.spec()) << "\n  error / bound "
      << result.error_over_bound << " (out " << result.out_error_over_bound << ", lse "
      << result.lse_error_over_bound << "), " << result.nonfinite_mismatches
      << " NaN or infinity mismatches, " << result.empty_row_mismatches
      << " empty row mismatches\n  " << result.worst;
  EXPECT_TRUE(problem.out().GapsHold(kPrefill)) << kernel << " wrote beside out";
  if (problem.lse()) {
    EXPECT_TRUE(problem.lse()->GapsHold(kPrefill)) << kernel << " wrote beside lse";
  }
}

std::vector<CaseSpec> CasesWithKeysElsewhere() {
  std::vector<CaseSpec> cases;
  int place = 0;
  for (CaseSpec spec : CaseTable()) {
    if (spec.layout == TANDEM_LAYOUT_THD || spec.global_kv_len != 0 || spec.kv_rows == 0 ||
        spec.batch == 0 || spec.k_strides.broadcast != 0 || spec.v_strides.broadcast != 0) {
      continue;
    }
    if (++place % 3 == 0) cases.push_back(spec);
    if (spec.q_rows > 1 && spec.q_lens.empty() && spec.global_q_len == 0) {
      spec.name += "_decode";
      spec.q_rows = 1;
      cases.push_back(spec);
    }
  }
  return cases;
}

void ExpectAgreementOrUnsupported(const Kernel& kernel, Case& problem, tandem_status status) {
  if (status == TANDEM_STATUS_OK) {
    ExpectAgreement(kernel, problem);
    return;
  }
  EXPECT_EQ(status, TANDEM_STATUS_UNSUPPORTED) << tandem_last_error();
  EXPECT_FALSE(kernel.device == TANDEM_DEVICE_CPU && MustAccept(kernel, problem.spec()))
      << tandem_last_error();
}

void CheckKernel(const Kernel& kernel, const CaseSpec& spec) {
  Case problem(spec);
  if (RunOrCountDeclined(kernel, problem)) ExpectAgreement(kernel, problem);
}

}  // namespace tandem::test
