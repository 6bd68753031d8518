// Running one kernel, and how long that takes.
#ifndef TANDEM_CLI_MEASURE_H_
#define TANDEM_CLI_MEASURE_H_

#include "cli/options.h"
#include "cli/progress.h"
#include "tandem/tandem.h"

namespace tandem::cli {

struct Measurement {
  double time_ms = 0;  // the median
  int repeats = 0;
};

// Runs `kernel` on `device` once, uncounted unless it is slow, and then as often as options.repeat
// says. On the CPU the time is that of tandem_plan_run with a workspace made before; on CUDA that
// of the one call, with the copies of host tensors there and back. Throws what the library
// answers (cli/errors.h).
// gradients null: the forward pass.
Measurement RunAndMeasure(const tandem_problem& problem, const tandem_outputs& outputs,
                          const tandem_gradients* gradients, const std::string& kernel,
                          tandem_device_type device, const DeviceOptions& options,
                          Progress* progress);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_MEASURE_H_
