#include <cstdio>

#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/explanation.h"
#include "cli/inputs.h"
#include "cli/report.h"

namespace tandem::cli {

int Explain(const ExplainOptions& options) {
  const tandem_options library_options = LibraryOptions(options.device);
  const Inputs inputs(options.problem, Source::kShapes);
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(inputs.problem(), nullptr, nullptr, library_options);
  bool has_chosen = false;
  for (const KernelVerdict& verdict : verdicts) has_chosen = has_chosen || verdict.chosen;
  if (options.json) {
    Report report = {&inputs.problem(), std::nullopt, {}};
    for (const KernelVerdict& verdict : verdicts) {
      Result result;
      result.kernel = verdict.kernel;
      result.device = verdict.device;
      result.declined = verdict.reason;
      report.results.push_back(result);
    }
    PrintJson(report);
  } else {
    std::vector<std::vector<std::string>> rows = {{"kernel", "device", "verdict"}};
    for (const KernelVerdict& verdict : verdicts) {
      rows.push_back({verdict.kernel, DeviceName(verdict.device),
                      verdict.chosen           ? "chosen"
                      : verdict.reason.empty() ? "accepts"
                                               : "declines: " + verdict.reason});
    }
    PrintColumns(rows);
  }
  if (!has_chosen) ChosenKernel(verdicts, library_options);  // throws, with the reasons
  return 0;
}

}  // namespace tandem::cli
