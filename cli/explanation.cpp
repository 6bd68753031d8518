#include "cli/explanation.h"

#include <memory>

#include "cli/errors.h"
#include "cli/options.h"

namespace tandem::cli {

std::vector<KernelVerdict> ExplainKernels(const tandem_problem& problem,
                                          const tandem_outputs* outputs,
                                          const tandem_gradients* gradients,
                                          const tandem_options& options) {
  tandem_explanation* raw = nullptr;
  Check(tandem_explain(&problem, outputs, gradients, &options, &raw));
  const std::unique_ptr<tandem_explanation, decltype(&tandem_explanation_destroy)> explanation(
      raw, &tandem_explanation_destroy);
  std::vector<KernelVerdict> verdicts;
  const int32_t chosen = tandem_explanation_chosen(raw);
  for (int32_t n = 0; n < tandem_explanation_count(raw); ++n) {
    const char* reason = tandem_explanation_reason(raw, n);
    verdicts.push_back({tandem_explanation_kernel(raw, n), tandem_explanation_device(raw, n),
                        reason == nullptr ? "" : reason, n == chosen});
  }
  return verdicts;
}

const KernelVerdict& ChosenKernel(const std::vector<KernelVerdict>& verdicts,
                                  const tandem_options& options) {
  std::string reasons;
  for (const KernelVerdict& verdict : verdicts) {
    if (verdict.chosen) return verdict;
    const bool other_device =
        options.device_type != TANDEM_DEVICE_AUTO && options.device_type != verdict.device;
    const bool other_kernel = options.kernel != nullptr && verdict.kernel != options.kernel;
    if (other_device || other_kernel) continue;
    if (!reasons.empty()) reasons += "; ";
    reasons += verdict.kernel + " (" + DeviceName(verdict.device) + "): " + verdict.reason;
  }
  throw CannotServe("no kernel that was asked for can serve: " + reasons);
}

}  // namespace tandem::cli
