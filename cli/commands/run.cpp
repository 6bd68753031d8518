#include <memory>

#include "cli/commands/backward.h"
#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/explanation.h"
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

}  // namespace

int Run(const RunOptions& options) {
  const tandem_options library_options = LibraryOptions(options.device);
  if (options.backward.dout.empty() &&
      (options.backward.HasOutput() || !options.backward.dlse.empty())) {
    throw BadInput("--dout is needed for gradients");
  }
  OutputFile out_file(options.out);
  std::unique_ptr<OutputFile> lse_file;
  if (!options.lse.empty()) lse_file = std::make_unique<OutputFile>(options.lse);

  Progress progress;
  progress.Step("reading the inputs");
  const Inputs inputs(options.problem, Source::kData);
  const tandem_problem& problem = inputs.problem();
  ExplainKernels(problem, nullptr, nullptr, library_options);  // throws where it is not valid
  const Outputs outputs(problem);
  if (!options.backward.dout.empty()) {
    RefuseBackward(problem, outputs.get(), options.backward, options.problem.dtype,
                   library_options);
  }
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(problem, &outputs.get(), nullptr, library_options);
  const KernelVerdict& chosen = ChosenKernel(verdicts, library_options);
  const Measurement measurement = RunAndMeasure(problem, outputs.get(), chosen.kernel,
                                                chosen.device, options.device, &progress);
  progress.Step("counting visible pairs");
  Report report = {&problem, oracle::CountMask(problem, options.device.threads), {}};

  progress.Step("writing the outputs");
  WriteTensor(outputs.out(), &out_file);
  if (lse_file != nullptr) WriteTensor(outputs.lse(), lse_file.get());

  Result result;
  result.kernel = chosen.kernel;
  result.device = chosen.device;
  result.time_ms = measurement.time_ms;
  result.repeats = measurement.repeats;
  result.tflops = Tflops(problem, *report.mask, measurement.time_ms);
  result.empty_rows = report.mask->empty_rows;
  report.results.push_back(result);
  progress.Finish();
  if (options.json) {
    PrintJson(report);
  } else {
    PrintTable(report);
  }
  FlushStdout();
  if (lse_file != nullptr) lse_file->Commit();
  out_file.Commit();
  return 0;
}

}  // namespace tandem::cli
