// Races the CPU's kernels against each other and against what the machine can do at most, in one
// process and interleaved, as clocks and neighbours change within seconds: each round times every
// kernel and the ceilings once, and the best round of each counts.
//
//   tandem_race [THREADS [PART_OF_A_CASE_NAME [ROUNDS [PART_OF_A_KERNEL_NAME]]]]
//
// Kernels of the backward pass (dQ, dK and dV) stand beside those of the forward pass; PART
// "backward" of a kernel's name selects them. Columns: FLOP/s over visible pairs, 2.5 times as many
// backward, bytes of keys and values per second, and both against the ceilings: FMA, AMX with bf16,
// reading memory. Decoding rotates through copies of its keys and values, so that they come from
// memory.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <tandem/tandem.hpp>
#include <vector>

#include "bench/benchmark_case.h"

extern "C" {
double tandem_bench_fma_flops_per_second(int32_t threads, double seconds);
double tandem_bench_amx_flops_per_second(int32_t threads, double seconds);
double tandem_bench_read_bytes_per_second(int32_t threads, double seconds);
}

namespace {

using tandem::Device;
using tandem::DType;
using tandem::bench::CaseSpec;
using tandem::bench::MaskKind;

constexpr double kRotatedBytes = 512 << 20;
constexpr double kSecondsPerRound = 0.05;
constexpr double kSecondsPerCeiling = 0.02;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One kernel on one case.
class Racer {
 public:
  Racer(const CaseSpec& spec, const tandem::Problem& problem, const std::string& kernel,
        int32_t threads)
      : out_(Device::kCpu, tandem::bench::OutBytes(spec)),
        lse_(Device::kCpu, tandem::bench::LseBytes(spec)),
        outputs_(tandem::bench::OutputsIn(spec, out_.data(), lse_.data(), Device::kCpu)) {
    tandem::Options options = {.device = Device::kCpu, .threads = threads, .kernel = kernel};
    if (kernel.find("_backward.") == std::string::npos) {
      plan_.emplace(problem, outputs_, options);
    } else {
      gradients_.emplace(problem.q);
      gradients_->dq = Like(problem.q);
      gradients_->dk = Like(problem.k);
      gradients_->dv = Like(problem.v);
      plan_.emplace(problem, outputs_, *gradients_, options);
      options.kernel.clear();
      tandem::Attention(problem, outputs_, options);
    }
    workspace_.emplace(plan_->workspace_size());
  }

  void Round(const std::vector<tandem::Problem>& problems) {
    const double start = Now();
    int runs = 0;
    do {
      const tandem::Problem& problem = problems[next_++ % problems.size()];
      if (gradients_) {
        plan_->Run(problem, outputs_, *gradients_, workspace_->data(), workspace_->size());
      } else {
        plan_->Run(problem, outputs_, workspace_->data(), workspace_->size());
      }
      ++runs;
    } while (Now() - start < kSecondsPerRound);
    best_ = std::min(best_, (Now() - start) / runs);
  }

  std::string kernel() const { return plan_->kernel(); }
  double best() const { return best_; }
  // Of the forward pass's arithmetic.
  double work() const { return gradients_ ? 2.5 : 1.0; }

 private:
  // A tensor of the same shape, in memory of this racer's.
  tandem::Tensor Like(const tandem::Tensor& tensor) {
    const tandem_tensor& t = tensor.c();
    int64_t count = 1;
    for (int32_t d = 0; d < t.rank; ++d) count *= t.shape[d];
    buffers_.emplace_back(Device::kCpu, static_cast<size_t>(count) * sizeof(float));
    return {buffers_.back().data(), static_cast<DType>(t.dtype),
            tandem::Tensor::Extents(t.shape, static_cast<size_t>(t.rank))};
  }

  tandem::bench::Buffer out_, lse_;
  std::vector<tandem::bench::Buffer> buffers_;
  tandem::Outputs outputs_;
  std::optional<tandem::Gradients> gradients_;
  std::optional<tandem::Plan> plan_;
  std::optional<tandem::HostBuffer> workspace_;
  size_t next_ = 0;
  double best_ = 1e30;
};

struct Ceilings {
  double fma = 0, amx = 0, read = 0;
};

void Race(const CaseSpec& spec, int32_t threads, int rounds, const std::string& kernel_part) {
  const bool decodes = spec.q_len == 1;
  const int copies = decodes ? static_cast<int>(kRotatedBytes / spec.KvBytes()) + 1 : 1;
  const tandem::bench::HostCase host(spec);
  std::vector<std::unique_ptr<tandem::bench::PlacedInputs>> inputs;
  std::vector<tandem::Problem> problems;
  for (int n = 0; n < copies; ++n) {
    inputs.push_back(std::make_unique<tandem::bench::PlacedInputs>(host, Device::kCpu));
    problems.push_back(inputs.back()->problem());
  }
  // The mask is prepared once, as it serves every layer of a model.
  std::optional<tandem::HostBuffer> mask_memory;
  std::optional<tandem::MaskPlan> mask_plan;
  if (spec.mask == MaskKind::kBoolean) {
    mask_memory.emplace(tandem::MaskPlanSize(problems[0]));
    mask_plan.emplace(problems[0], mask_memory->data(), mask_memory->size(), nullptr);
    problems[0].mask = tandem::Mask();
    problems[0].mask_plan = &*mask_plan;
  }
  std::vector<std::unique_ptr<Racer>> racers;
  for (int32_t n = 0; n < tandem_kernel_count(); ++n) {
    const std::string name = tandem_kernel_name(n);
    const bool emulates = name.find("tiles") != std::string::npos || name == "reference.cpu";
    if (emulates || name.find(kernel_part) == std::string::npos) continue;
    try {
      racers.push_back(std::make_unique<Racer>(spec, problems[0], name, threads));
    } catch (const tandem::Error&) {
      // Another type's kernel, or one for another machine.
    }
  }
  Ceilings ceilings;
  for (int round = 0; round < rounds; ++round) {
    for (const auto& racer : racers) racer->Round(problems);
    ceilings.fma =
        std::max(ceilings.fma, tandem_bench_fma_flops_per_second(threads, kSecondsPerCeiling));
    ceilings.amx =
        std::max(ceilings.amx, tandem_bench_amx_flops_per_second(threads, kSecondsPerCeiling));
    if (decodes) {
      ceilings.read =
          std::max(ceilings.read, tandem_bench_read_bytes_per_second(threads, kSecondsPerCeiling));
    }
  }
  std::printf("%s, %d threads; ceilings: FMA %.0f GF/s, AMX %.0f GF/s, reading %.1f GB/s\n",
              spec.Name(Device::kCpu).c_str(), threads, ceilings.fma * 1e-9, ceilings.amx * 1e-9,
              ceilings.read * 1e-9);
  for (const auto& racer : racers) {
    const double flops = racer->work() * spec.Flops() / racer->best();
    const double bytes = spec.KvBytes() / racer->best();
    std::printf("  %-30s %9.3f ms %8.1f GF/s (%.2f of FMA", racer->kernel().c_str(),
                racer->best() * 1e3, flops * 1e-9, flops / ceilings.fma);
    if (ceilings.amx > 0) std::printf(", %.2f of AMX", flops / ceilings.amx);
    std::printf(")");
    if (decodes) std::printf(" %6.2f GB/s (%.2f)", bytes * 1e-9, bytes / ceilings.read);
    std::printf("\n");
  }
  std::fflush(stdout);
}

std::vector<CaseSpec> Cases() {
  std::vector<CaseSpec> cases;
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int64_t dim : {int64_t{64}, int64_t{128}}) {
      for (const MaskKind mask : {MaskKind::kNone, MaskKind::kCausal, MaskKind::kBoolean,
                                  MaskKind::kWindow, MaskKind::kPacked, MaskKind::kBias}) {
        cases.push_back({dtype, 1, 16, 16, 2048, 2048, dim, mask});
      }
    }
    cases.push_back({dtype, 1, 32, 8, 1, 8192, 128, MaskKind::kNone});
    cases.push_back({dtype, 1, 32, 8, 16, 8192, 128, MaskKind::kNone});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const int32_t threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string part = argc > 2 ? argv[2] : "";
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 15;
  const std::string kernel_part = argc > 4 ? argv[4] : "flash_cpu";
  try {
    for (const CaseSpec& spec : Cases()) {
      if (spec.Name(Device::kCpu).find(part) != std::string::npos) {
        Race(spec, threads, rounds, kernel_part);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tandem_race: %s\n", error.what());
    return 1;
  }
  return 0;
}
