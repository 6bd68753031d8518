// Forward attention on every device that is there, by Google Benchmark: the same cases with the
// same inputs on each, named forward/<device>/<dtype>/b/h/hk/q/k/d/<mask> (Google Benchmark adds
// /manual_time). A case is planned first; what is timed neither validates nor allocates. Columns:
//   FLOP/s           4 * heads * dim * visible pairs; all pairs under a random dense mask
//   KV_bytes/s       keys and values read once
//   workspace_bytes  with the mask plan, where there is one
//   error/bound      against the f64 oracle over sampled rows; at most 1 is the contract
//   cpu-cuda/bounds  on CUDA: the largest difference from the CPU's answer over the sum of bounds
//
//   tandem_benchmark --benchmark_filter='cpu/f32/.*d64' --benchmark_out=result.json
#include <benchmark/benchmark.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <tandem/tandem.hpp>

#include "bench/benchmark_case.h"
#include "bench/case_accuracy.h"

namespace {

using tandem::Device;
using tandem::bench::CaseSpec;
using tandem::bench::HostCase;
using tandem::bench::PlacedCase;

// Launches between two events, so that their latency does not count.
constexpr double kSecondsPerReading = 1e-3;
constexpr int kMostRunsPerReading = 64;

struct Accuracy {
  double error_over_bound = 0;
  double difference = -1;  // of CPU and CUDA; -1: not measured
};

Accuracy MeasureAccuracy(const HostCase& host, const PlacedCase& placed, Device device) {
  Accuracy accuracy;
  const tandem::bench::Answer answer = placed.Result();
  accuracy.error_over_bound = tandem::bench::ErrorOverBound(host, answer, device);
  if (device == Device::kCuda) {
    PlacedCase on_cpu(host, Device::kCpu);
    on_cpu.Run();
    accuracy.difference = tandem::bench::DifferenceOverBounds(host, on_cpu.Result(), answer);
  }
  return accuracy;
}

void Forward(benchmark::State& state, Device device, const CaseSpec& spec) {
  // Google Benchmark calls this again while it looks for the number of iterations.
  static std::string name;
  static std::unique_ptr<HostCase> host;
  static Accuracy accuracy;
  try {
    const bool is_new = name != spec.Name(device);
    if (is_new) host = std::make_unique<HostCase>(spec);
    PlacedCase placed(*host, device);
    placed.Run();
    if (is_new) accuracy = MeasureAccuracy(*host, placed, device);
    name = spec.Name(device);
    const auto run = [&] { placed.Run(); };
    const double once = tandem::bench::SecondsOn(device, 1, run);
    const int runs =
        device == Device::kCpu
            ? 1
            : std::clamp(static_cast<int>(kSecondsPerReading / once), 1, kMostRunsPerReading);
    double seconds = 0;  // of a launch, by the last reading
    for (int64_t launch = 0; state.KeepRunning(); ++launch) {
      if (launch % runs == 0) seconds = tandem::bench::SecondsOn(device, runs, run) / runs;
      state.SetIterationTime(seconds);
    }
    const auto rate = benchmark::Counter::kIsIterationInvariantRate;
    state.counters["FLOP/s"] = benchmark::Counter(spec.Flops(), rate);
    state.counters["KV_bytes/s"] = benchmark::Counter(spec.KvBytes(), rate);
    state.counters["workspace_bytes"] = static_cast<double>(placed.workspace_bytes());
    state.counters["error/bound"] = accuracy.error_over_bound;
    if (accuracy.difference >= 0) {
      state.counters["cpu-cuda/bounds"] = accuracy.difference;
    }
    state.SetLabel(placed.kernel());
  } catch (const std::exception& error) {
    state.SkipWithError(error.what());
  }
}

void RegisterCases(Device device) {
  for (const CaseSpec& spec : tandem::bench::CaseTable()) {
    benchmark::RegisterBenchmark(spec.Name(device).c_str(), Forward, device, spec)
        ->Unit(benchmark::kMillisecond)
        ->UseManualTime();
  }
}

}  // namespace

int main(int argc, char** argv) {
  RegisterCases(Device::kCpu);
  if (const auto reason = tandem::DeviceUnavailableReason(Device::kCuda)) {
    benchmark::AddCustomContext("cuda", *reason);
  } else {
    benchmark::AddCustomContext("cuda", tandem::Devices(Device::kCuda).front());
#if defined(TANDEM_BENCHMARK_CUDA)
    RegisterCases(Device::kCuda);
#endif
  }
  benchmark::AddCustomContext("cpu", tandem::Devices(Device::kCpu).front());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
