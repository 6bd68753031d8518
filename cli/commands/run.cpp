#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/explanation.h"
#include "cli/gradients.h"
#include "cli/inputs.h"
#include "cli/measure.h"
#include "cli/output_file.h"
#include "cli/report.h"

namespace tandem::cli {
namespace {

void WriteTensor(const tandem_tensor& tensor, OutputFile* file) {
  const std::vector<int64_t> shape = ShapeOf(tensor);
  WriteNpy(FileType(tensor.dtype), shape, tensor.data, ByteSize(tensor.dtype, shape), file);
}

// A file for each gradient, made before anything is computed.
using GradientFiles =
    std::vector<std::pair<const tandem_tensor * tandem_gradients::*, std::unique_ptr<OutputFile>>>;
GradientFiles OpenFiles(const BackwardOptions& o) {
  const std::pair<const tandem_tensor * tandem_gradients::*, const std::string*> all[] = {
      {&tandem_gradients::dq, &o.dq},       {&tandem_gradients::dk, &o.dk},
      {&tandem_gradients::dv, &o.dv},       {&tandem_gradients::dbias, &o.dbias},
      {&tandem_gradients::dsink, &o.dsink}, {&tandem_gradients::dalibi, &o.dalibi}};
  GradientFiles files;
  for (const auto& [gradient, path] : all) {
    if (!path->empty()) files.emplace_back(gradient, std::make_unique<OutputFile>(*path));
  }
  return files;
}

Result RunChosen(const tandem_problem& problem, const tandem_outputs& outputs,
                 const tandem_gradients* gradients, const DeviceOptions& device,
                 Progress* progress) {
  const tandem_options library_options = LibraryOptions(device);
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(problem, &outputs, gradients, library_options);
  const KernelVerdict& chosen = ChosenKernel(verdicts, library_options);
  const Measurement measurement =
      RunAndMeasure(problem, outputs, gradients, chosen.kernel, chosen.device, device, progress);
  Result result;
  result.kernel = chosen.kernel;
  result.pass = gradients == nullptr ? Pass::kForward : Pass::kBackward;
  result.device = chosen.device;
  result.time_ms = measurement.time_ms;
  result.repeats = measurement.repeats;
  return result;
}

}  // namespace

int Run(const RunOptions& options) {
  const bool backward = !options.backward.dout.empty();
  if (!backward && (options.backward.HasOutput() || !options.backward.dlse.empty())) {
    throw BadInput("--dout is needed for gradients");
  }
  OutputFile out_file(options.out);
  std::unique_ptr<OutputFile> lse_file;
  if (!options.lse.empty()) lse_file = std::make_unique<OutputFile>(options.lse);

  const GradientFiles gradient_files = OpenFiles(options.backward);

  Progress progress;
  progress.Step("reading the inputs");
  const Inputs inputs(options.problem, Source::kData);
  const tandem_problem& problem = inputs.problem();
  DeviceOptions forward_device = options.device;
  if (backward) forward_device.kernel.clear();  // --kernel is that of the backward pass
  ExplainKernels(problem, nullptr, nullptr,
                 LibraryOptions(forward_device));  // throws where not valid
  const Outputs outputs(problem);
  std::optional<Gradients> gradients;
  if (backward) gradients.emplace(problem, options.backward, options.problem.dtype);

  Report report = {&problem, std::nullopt, {}};
  report.results.push_back(RunChosen(problem, outputs.get(), nullptr, forward_device, &progress));
  if (backward) {
    report.results.push_back(
        RunChosen(problem, outputs.get(), &gradients->get(), options.device, &progress));
  }
  progress.Step("counting visible pairs");
  report.mask = oracle::CountMask(problem, options.device.threads);
  for (Result& result : report.results) {
    result.tflops = Tflops(problem, *report.mask, result.pass, *result.time_ms);
    result.empty_rows = report.mask->empty_rows;
  }

  progress.Step("writing the outputs");
  WriteTensor(outputs.out(), &out_file);
  if (lse_file != nullptr) WriteTensor(outputs.lse(), lse_file.get());
  for (const auto& [gradient, file] : gradient_files) {
    WriteTensor(*(gradients->get().*gradient), file.get());
  }
  progress.Finish();
  if (options.json) {
    PrintJson(report);
  } else {
    PrintTable(report);
  }
  FlushStdout();
  if (lse_file != nullptr) lse_file->Commit();
  for (const auto& [gradient, file] : gradient_files) file->Commit();
  out_file.Commit();
  return 0;
}

}  // namespace tandem::cli
