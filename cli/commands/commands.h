// The five commands. Each prints its answer on stdout and returns the exit code, or throws
// (cli/errors.h).
#ifndef TANDEM_CLI_COMMANDS_COMMANDS_H_
#define TANDEM_CLI_COMMANDS_COMMANDS_H_

#include <cstdint>
#include <string>

#include "cli/options.h"

namespace tandem::cli {

int Info(bool json);

struct ExplainOptions {
  ProblemOptions problem;
  DeviceOptions device;
  bool json = false;
};
int Explain(const ExplainOptions& options);

struct RunOptions {
  ProblemOptions problem;
  DeviceOptions device;
  BackwardOptions backward;
  std::string out;
  std::string lse;
  bool json = false;
};
int Run(const RunOptions& options);

struct CompareOptions {
  ProblemOptions problem;
  DeviceOptions device;
  bool backward = false;
  bool json = false;
};
int Compare(const CompareOptions& options);

struct DrawOptions {
  ProblemOptions problem;
  int64_t sequence = 0;
  int64_t head = 0;
  bool ascii = false;
  std::string svg;
  std::string png;
};
int Mask(const DrawOptions& options);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_COMMANDS_COMMANDS_H_
