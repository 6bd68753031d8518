#include "cli/explanation.h"

#include <cstring>
#include <memory>

#include "cli/errors.h"
#include "cli/options.h"

namespace tandem::cli {
namespace {

// A name that is not in the list may be that of a kernel which is not built in or not loaded here.
void CheckKernelName(const tandem_options& options) {
  if (options.kernel == nullptr) return;
  for (int32_t n = 0; n < tandem_kernel_count(); ++n) {
    if (std::strcmp(tandem_kernel_name(n), options.kernel) == 0) return;
  }
  std::string message = std::string("there is no kernel ") + options.kernel +
                        " here; `tandem info` lists those that there are";
  const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  if (reason != nullptr) message += std::string("; cuda is not there: ") + reason;
  throw CannotServe(message);
}

}  // namespace

std::vector<KernelVerdict> ExplainKernels(const tandem_problem& problem,
                                          const tandem_outputs* outputs,
                                          const tandem_gradients* gradients,
                                          const tandem_options& options) {
  CheckKernelName(options);
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
