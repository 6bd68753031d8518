#include "bench/case_accuracy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/oracle/compare.h"
#include "tests/oracle/tensor.h"

namespace tandem::bench {
namespace {

constexpr int64_t kMaxPairs = int64_t{1} << 20;
constexpr int64_t kRowsPerHead = 4;

tandem_dtype TypeOf(const CaseSpec& spec) { return static_cast<tandem_dtype>(spec.dtype); }

}  // namespace

double ErrorOverBound(const HostCase& host, Answer answer, Device device) {
  const PlacedInputs inputs(host, Device::kCpu);
  const internal::CProblem problem(inputs.problem());
  const Outputs outputs =
      OutputsIn(host.spec(), answer.out.data(), answer.lse.data(), Device::kCpu);
  const tandem_outputs c_outputs = internal::COutputs(outputs);
  oracle::CompareOptions options;
  options.arithmetic = oracle::ArithmeticFor(TypeOf(host.spec()), device == Device::kCuda);
  options.max_pairs = kMaxPairs;
  const oracle::CompareResult result = oracle::Compare(*problem.get(), c_outputs, options);
  const bool is_wrong = result.nonfinite_mismatches > 0 || result.empty_row_mismatches > 0;
  return is_wrong ? std::numeric_limits<double>::infinity() : result.error_over_bound;
}

double DifferenceOverBounds(const HostCase& host, const Answer& cpu, const Answer& cuda) {
  const CaseSpec& spec = host.spec();
  const PlacedInputs inputs(host, Device::kCpu);
  const internal::CProblem c_problem(inputs.problem());
  const tandem_problem& problem = *c_problem.get();
  const tandem_dtype dtype = TypeOf(spec);
  const oracle::Arithmetic on_cpu = oracle::ArithmeticFor(dtype, false);
  const oracle::Arithmetic on_cuda = oracle::ArithmeticFor(dtype, true);
  tandem_tensor cpu_out = TANDEM_TENSOR_INIT, cuda_out = TANDEM_TENSOR_INIT;
  cpu_out.dtype = cuda_out.dtype = dtype;
  cpu_out.data = const_cast<char*>(cpu.out.data());
  cuda_out.data = const_cast<char*>(cuda.out.data());
  const bool packed = spec.mask == MaskKind::kPacked;
  double worst = 0;
  oracle::Row expected, expected_on_cuda;
  for (int64_t b = 0; b < oracle::SequenceCount(problem); ++b) {
    const oracle::SequenceRange sequence = oracle::SequenceOf(problem, b);
    const int64_t step = std::max<int64_t>(1, sequence.q_rows / kRowsPerHead);
    // Rows differ from head to head, so that all kinds of row are seen.
    for (int64_t h = 0; h < spec.heads; ++h) {
      for (int64_t i = (b + h) % step; i < sequence.q_rows; i += step) {
        oracle::ComputeRow(problem, sequence, b, h, i, on_cpu, dtype, &expected);
        oracle::ComputeRow(problem, sequence, b, h, i, on_cuda, dtype, &expected_on_cuda);
        const int64_t row = packed ? (sequence.q_start + i) * spec.heads + h
                                   : (b * spec.heads + h) * spec.q_len + i;
        for (int64_t d = 0; d < spec.dim; ++d) {
          const double difference = std::fabs(oracle::LoadReal(cpu_out, row * spec.dim + d) -
                                              oracle::LoadReal(cuda_out, row * spec.dim + d));
          const size_t n = static_cast<size_t>(d);
          if (difference > 0 || std::isnan(difference)) {
            const double bounds = expected.out_bound[n] + expected_on_cuda.out_bound[n];
            worst = std::max(worst, std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                                           : difference / bounds);
          }
        }
      }
    }
  }
  return worst;
}

}  // namespace tandem::bench
