// Results of run, compare and explain, for people and for scripts.
#ifndef TANDEM_CLI_REPORT_H_
#define TANDEM_CLI_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tandem/tandem.h"
#include "tests/oracle/compare.h"

namespace tandem::cli {

enum class Pass { kForward, kBackward };

struct Result {
  std::string kernel;
  Pass pass = Pass::kForward;
  tandem_device_type device = TANDEM_DEVICE_CPU;
  std::optional<double> time_ms;  // the median
  int repeats = 0;
  std::optional<double> tflops;  // over visible pairs
  std::optional<double> max_error;
  std::optional<double> error_over_bound;
  std::optional<int64_t> empty_rows;  // rows that see no key
  std::optional<bool> in_contract;
  std::string declined;  // "" where it ran
  std::string problem;   // what is wrong, in words; people only
};

struct Report {
  const tandem_problem* problem;
  std::optional<oracle::MaskCount> mask;
  std::vector<Result> results;
};

// For each visible pair 2 (Dqk + Dv) operations forward, 2 (3 Dqk + 2 Dv) backward.
double Tflops(const tandem_problem& problem, const oracle::MaskCount& mask, Pass pass,
              double time_ms);

// One JSON object on stdout: {"problem": {...}, "results": [...]}.
void PrintJson(const Report& report);
// A line on the problem, a table of what ran, and a sentence for each kernel that declined.
void PrintTable(const Report& report);

// Throws BadInput where stdout did not take all that was printed.
void FlushStdout();

// Columns aligned; the first row is the heading.
void PrintColumns(const std::vector<std::vector<std::string>>& rows);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_REPORT_H_
