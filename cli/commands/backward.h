// What run and compare answer where the backward pass is asked for.
#ifndef TANDEM_CLI_COMMANDS_BACKWARD_H_
#define TANDEM_CLI_COMMANDS_BACKWARD_H_

#include <string>

#include "cli/options.h"
#include "tandem/tandem.h"

namespace tandem::cli {

// Asks the library for the gradients that options name; dtype: --dtype. Throws CannotServe with the
// kernels' reasons, or BadInput where the arrays do not fit the problem.
[[noreturn]] void RefuseBackward(const tandem_problem& problem, const tandem_outputs& outputs,
                                 const BackwardOptions& backward, const std::string& dtype,
                                 const tandem_options& options);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_COMMANDS_BACKWARD_H_
