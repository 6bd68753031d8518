#include "cli/measure.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "cli/buffer.h"
#include "cli/errors.h"

namespace tandem::cli {
namespace {

constexpr int kDefaultRepeats = 5;
constexpr double kSlowMs = 1000;           // a first run as long as this counts
constexpr double kDefaultBudgetMs = 5000;  // no further run after it, unless --repeat is given

double TimeMs(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - begin;
  return elapsed.count();
}

double Median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const size_t middle = times.size() / 2;
  return times.size() % 2 == 1 ? times[middle] : (times[middle - 1] + times[middle]) / 2;
}

Measurement Repeat(const std::string& kernel, int repeat, const std::function<void()>& run,
                   Progress* progress) {
  const int wanted = repeat > 0 ? repeat : kDefaultRepeats;
  std::vector<double> times;
  progress->Step(kernel + ": first run");
  double total = TimeMs(run);
  if (total >= kSlowMs) times.push_back(total);
  while (static_cast<int>(times.size()) < wanted) {
    if (repeat == 0 && !times.empty() && total > kDefaultBudgetMs) break;
    progress->Step(kernel + ": run " + std::to_string(times.size() + 1) + " of " +
                   std::to_string(wanted));
    times.push_back(TimeMs(run));
    total += times.back();
  }
  return {Median(times), static_cast<int>(times.size())};
}

}  // namespace

Measurement RunAndMeasure(const tandem_problem& problem, const tandem_outputs& outputs,
                          const tandem_gradients* gradients, const std::string& kernel,
                          tandem_device_type device, const DeviceOptions& device_options,
                          Progress* progress) {
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.device_type = device;
  options.threads = device_options.threads;
  options.kernel = kernel.c_str();
  if (device == TANDEM_DEVICE_CUDA) {
    return Repeat(
        kernel, device_options.repeat,
        [&] {
          Check(gradients == nullptr
                    ? tandem_attention(&problem, &outputs, &options)
                    : tandem_attention_backward(&problem, &outputs, gradients, &options));
        },
        progress);
  }
  tandem_plan* raw = nullptr;
  Check(tandem_plan_create(&problem, &outputs, gradients, &options, &raw));
  const std::unique_ptr<tandem_plan, decltype(&tandem_plan_destroy)> plan(raw,
                                                                          &tandem_plan_destroy);
  Buffer workspace(tandem_plan_workspace_size(raw));
  return Repeat(
      kernel, device_options.repeat,
      [&] {
        Check(tandem_plan_run(raw, &problem, &outputs, gradients, workspace.data(),
                              workspace.size(), nullptr));
      },
      progress);
}

}  // namespace tandem::cli
