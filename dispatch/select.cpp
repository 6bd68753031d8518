#include "dispatch/select.h"

#include <cstring>

namespace tandem::dispatch {

std::string MissingFeatures(const core::KernelRecord& kernel, uint64_t features) {
  if ((kernel.required_features & ~features) == 0) return "";
  return std::string("this machine does not offer what it needs, or it is capped: ") +
         kernel.requirement;
}

Selection Select(const core::Problem& problem, const core::KernelRecord* kernels, int kernel_count,
                 uint64_t features, const char* wanted) {
  Selection selection;
  for (int n = 0; n < kernel_count; ++n) {
    const core::KernelRecord& kernel = kernels[n];
    Verdict verdict = {&kernel, MissingFeatures(kernel, features)};
    core::Text reason = {};
    if (verdict.reason.empty() && kernel.decline(problem, &reason)) verdict.reason = reason.data;
    const bool is_wanted = wanted == nullptr || std::strcmp(wanted, kernel.name) == 0;
    if (verdict.reason.empty() && !is_wanted) {
      verdict.reason = std::string("it is not the kernel asked for, ") + wanted;
    }
    if (verdict.reason.empty() && selection.chosen < 0) selection.chosen = n;
    selection.verdicts.push_back(verdict);
  }
  return selection;
}

std::string JoinReasons(const Selection& selection) {
  std::string text;
  for (const Verdict& verdict : selection.verdicts) {
    if (verdict.reason.empty()) continue;
    if (!text.empty()) text += "; ";
    text += std::string(verdict.kernel->name) + ": " + verdict.reason;
  }
  return text;
}

}  // namespace tandem::dispatch
