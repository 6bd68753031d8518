#include "tests/oracle/compare.h"

#include <cstdio>

#include "cli/commands/backward.h"
#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/explanation.h"
#include "cli/inputs.h"
#include "cli/measure.h"
#include "cli/report.h"

namespace tandem::cli {
namespace {

// What a person should know of a result that is out of contract.
std::string Describe(const oracle::CompareResult& c) {
  if (c.InContract()) return "";
  std::string text;
  if (c.nonfinite_mismatches > 0) {
    text +=
        std::to_string(c.nonfinite_mismatches) + " elements are NaN or infinite, or should be; ";
  }
  if (c.empty_row_mismatches > 0) {
    text += std::to_string(c.empty_row_mismatches) +
            " elements of empty rows are not exactly 0 or -inf; ";
  }
  return text + c.worst;
}

Result CompareKernel(const tandem_problem& problem, const KernelVerdict& verdict,
                     const DeviceOptions& device, const oracle::MaskCount& mask, Outputs* outputs,
                     Progress* progress) {
  Result result;
  result.kernel = verdict.kernel;
  result.device = verdict.device;
  outputs->Poison();
  try {
    const Measurement measurement =
        RunAndMeasure(problem, outputs->get(), verdict.kernel, verdict.device, device, progress);
    result.time_ms = measurement.time_ms;
    result.repeats = measurement.repeats;
  } catch (const CannotServe& error) {  // it accepted, and failed
    result.declined = error.what();
    result.in_contract = false;
    return result;
  }
  result.tflops = Tflops(problem, mask, *result.time_ms);
  progress->Step(verdict.kernel + ": comparing with the oracle");
  oracle::CompareOptions options;
  options.arithmetic =
      oracle::ArithmeticFor(problem.q->dtype, verdict.device == TANDEM_DEVICE_CUDA);
  options.threads = device.threads;
  options.progress = [&](double part) { progress->Update(part); };
  const oracle::CompareResult compared = oracle::Compare(problem, outputs->get(), options);
  result.max_error = compared.max_error;
  result.error_over_bound = compared.error_over_bound;
  result.empty_rows = mask.empty_rows;
  result.in_contract = compared.InContract();
  result.problem = Describe(compared);
  return result;
}

}  // namespace

int Compare(const CompareOptions& options) {
  const tandem_options library_options = LibraryOptions(options.device);
  Progress progress;
  progress.Step("reading the inputs");
  const Inputs inputs(options.problem, Source::kData);
  const tandem_problem& problem = inputs.problem();
  ExplainKernels(problem, nullptr, nullptr, library_options);  // throws where it is not valid
  Outputs outputs(problem);
  if (options.backward) {
    RefuseBackward(problem, outputs.get(), {}, options.problem.dtype, library_options);
  }
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(problem, &outputs.get(), nullptr, library_options);
  ChosenKernel(verdicts, library_options);  // throws where none serves
  progress.Step("counting visible pairs");
  Report report = {&problem, oracle::CountMask(problem, options.device.threads), {}};
  for (const KernelVerdict& verdict : verdicts) {
    if (verdict.reason.empty()) {
      report.results.push_back(
          CompareKernel(problem, verdict, options.device, *report.mask, &outputs, &progress));
    } else {
      Result declined;
      declined.kernel = verdict.kernel;
      declined.device = verdict.device;
      declined.declined = verdict.reason;
      report.results.push_back(declined);
    }
  }
  progress.Finish();
  if (options.json) {
    PrintJson(report);
  } else {
    PrintTable(report);
  }
  for (const Result& result : report.results) {
    if (result.in_contract.has_value() && !*result.in_contract) return kExitOutOfContract;
  }
  return 0;
}

}  // namespace tandem::cli
