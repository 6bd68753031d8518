#include "tests/oracle/compare.h"

#include <cstdio>

#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/explanation.h"
#include "cli/gradients.h"
#include "cli/inputs.h"
#include "cli/measure.h"
#include "cli/report.h"
#include "tests/oracle/gradient.h"

namespace tandem::cli {
namespace {

// What a person should know of a result that is out of contract.
std::string Describe(int64_t nonfinite, int64_t not_exact, const std::string& worst) {
  std::string text;
  if (nonfinite > 0) {
    text += std::to_string(nonfinite) + " elements are NaN or infinite, or should be; ";
  }
  if (not_exact > 0) {
    text += std::to_string(not_exact) + " elements of empty rows are not exactly 0 or -inf; ";
  }
  return text + worst;
}

void JudgeForward(const tandem_problem& problem, const tandem_outputs& outputs,
                  const oracle::Arithmetic& arithmetic, int threads, Progress* progress,
                  Result* result) {
  oracle::CompareOptions options;
  options.arithmetic = arithmetic;
  options.threads = threads;
  options.progress = [&](double part) { progress->Update(part); };
  const oracle::CompareResult compared = oracle::Compare(problem, outputs, options);
  result->max_error = compared.max_error;
  result->error_over_bound = compared.error_over_bound;
  result->in_contract = compared.InContract();
  if (!compared.InContract()) {
    result->problem =
        Describe(compared.nonfinite_mismatches, compared.empty_row_mismatches, compared.worst);
  }
}

void JudgeBackward(const tandem_problem& problem, const tandem_outputs& outputs,
                   const tandem_gradients& gradients, const oracle::Arithmetic& arithmetic,
                   int threads, Result* result) {
  oracle::GradientCompareOptions options;
  options.arithmetic = arithmetic;
  options.threads = threads;
  const oracle::GradientResult compared =
      oracle::CompareGradients(problem, outputs, gradients, options).Total();
  result->max_error = compared.max_error;
  result->error_over_bound = compared.error_over_bound;
  result->in_contract = compared.InContract();
  if (!compared.InContract()) {
    result->problem =
        Describe(compared.nonfinite_mismatches, compared.zero_mismatches, compared.worst);
  }
}

// gradients null: the forward pass.
Result CompareKernel(const tandem_problem& problem, const KernelVerdict& verdict,
                     const DeviceOptions& device, const oracle::MaskCount& mask, Outputs* outputs,
                     Gradients* gradients, Progress* progress) {
  Result result;
  result.kernel = verdict.kernel;
  result.pass = gradients == nullptr ? Pass::kForward : Pass::kBackward;
  result.device = verdict.device;
  if (gradients == nullptr) {
    outputs->Poison();
  } else {
    gradients->Poison();
  }
  try {
    const Measurement measurement =
        RunAndMeasure(problem, outputs->get(), gradients == nullptr ? nullptr : &gradients->get(),
                      verdict.kernel, verdict.device, device, progress);
    result.time_ms = measurement.time_ms;
    result.repeats = measurement.repeats;
  } catch (const CannotServe& error) {  // it accepted, and failed
    result.declined = error.what();
    result.in_contract = false;
    return result;
  }
  result.tflops = Tflops(problem, mask, result.pass, *result.time_ms);
  result.empty_rows = mask.empty_rows;
  progress->Step(verdict.kernel + ": comparing with the oracle");
  const oracle::Arithmetic arithmetic =
      oracle::ArithmeticFor(problem.q->dtype, verdict.device == TANDEM_DEVICE_CUDA);
  if (gradients == nullptr) {
    JudgeForward(problem, outputs->get(), arithmetic, device.threads, progress, &result);
  } else {
    JudgeBackward(problem, outputs->get(), gradients->get(), arithmetic, device.threads, &result);
  }
  return result;
}

// Every kernel's result of one pass.
void ComparePass(const tandem_problem& problem, const DeviceOptions& device, Outputs* outputs,
                 Gradients* gradients, Progress* progress, Report* report) {
  const tandem_options library_options = LibraryOptions(device);
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(problem, &outputs->get(), gradients == nullptr ? nullptr : &gradients->get(),
                     library_options);
  ChosenKernel(verdicts, library_options);  // throws where none serves
  for (const KernelVerdict& verdict : verdicts) {
    if (verdict.reason.empty()) {
      report->results.push_back(
          CompareKernel(problem, verdict, device, *report->mask, outputs, gradients, progress));
      continue;
    }
    Result declined;
    declined.kernel = verdict.kernel;
    declined.pass = gradients == nullptr ? Pass::kForward : Pass::kBackward;
    declined.device = verdict.device;
    declined.declined = verdict.reason;
    report->results.push_back(declined);
  }
}

// O and LSE for the backward pass, by the kernel that is best for them.
void RunForward(const tandem_problem& problem, const DeviceOptions& device,
                const tandem_outputs& outputs) {
  DeviceOptions any_kernel = device;
  any_kernel.kernel.clear();
  const tandem_options options = LibraryOptions(any_kernel);
  Check(tandem_attention(&problem, &outputs, &options));
}

}  // namespace

int Compare(const CompareOptions& options) {
  Progress progress;
  progress.Step("reading the inputs");
  const Inputs inputs(options.problem, Source::kData);
  const tandem_problem& problem = inputs.problem();
  // Throws where it is not valid.
  ExplainKernels(problem, nullptr, nullptr, LibraryOptions(options.device));
  Outputs outputs(problem);
  Report report = {&problem, std::nullopt, {}};
  progress.Step("counting visible pairs");
  report.mask = oracle::CountMask(problem, options.device.threads);
  // A kernel asked for by name serves one pass: with --backward that of the gradients.
  if (!options.backward || options.device.kernel.empty()) {
    ComparePass(problem, options.device, &outputs, nullptr, &progress, &report);
  }
  if (options.backward) {
    RunForward(problem, options.device, outputs.get());
    Gradients gradients(problem, outputs.get(), options.problem.data_seed + 1);
    ComparePass(problem, options.device, &outputs, &gradients, &progress, &report);
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
