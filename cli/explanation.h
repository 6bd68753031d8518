// tandem_explain's answer as values: each kernel's verdict on a problem.
#ifndef TANDEM_CLI_EXPLANATION_H_
#define TANDEM_CLI_EXPLANATION_H_

#include <string>
#include <vector>

#include "tandem/tandem.h"

namespace tandem::cli {

struct KernelVerdict {
  std::string kernel;
  tandem_device_type device;
  std::string reason;  // "" where the kernel accepts
  bool chosen;
};

// outputs and gradients may be null. Throws what the library answers (cli/errors.h).
std::vector<KernelVerdict> ExplainKernels(const tandem_problem& problem,
                                          const tandem_outputs* outputs,
                                          const tandem_gradients* gradients,
                                          const tandem_options& options);

// The one that would serve. Throws CannotServe, with the reason of each kernel that options ask
// for, where there is none.
const KernelVerdict& ChosenKernel(const std::vector<KernelVerdict>& verdicts,
                                  const tandem_options& options);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_EXPLANATION_H_
