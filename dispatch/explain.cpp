// tandem_explain: the verdict of every kernel of every device on one problem.
#include <memory>

#include "core/validate.h"
#include "dispatch/error.h"
#include "dispatch/plan.h"
#include "dispatch/registry.h"

struct tandem_explanation {
  struct Entry {
    std::string kernel;
    tandem_device_type device_type;
    std::string reason;  // empty: accepts
  };
  std::vector<Entry> entries;
  int32_t chosen = -1;
};

namespace tandem::dispatch {
namespace {

// Adds the verdicts of one device type; `refusal`, if not empty, is why the device is not
// considered.
void AddVerdicts(const core::Problem& problem, const tandem_options& options,
                 tandem_device_type type, const std::string& refusal, tandem_explanation* result) {
  const BackendState& state = StateOf(type);
  if (state.backend == nullptr) {
    result->entries.push_back({"efficient_cuda", type, state.unavailable});
    return;
  }
  const bool usable = !state.devices.empty() && refusal.empty();
  core::Problem there = problem;
  there.device_type = type;
  const Selection selection =
      Select(there, state.backend->kernels, state.backend->kernel_count,
             state.devices.empty() ? 0 : state.devices[0].features, options.kernel);
  for (int n = 0; n < static_cast<int>(selection.verdicts.size()); ++n) {
    const Verdict& verdict = selection.verdicts[n];
    std::string reason = verdict.reason;
    if (!refusal.empty()) reason = refusal;
    if (state.devices.empty()) reason = state.unavailable;
    if (usable && n == selection.chosen && result->chosen < 0) {
      result->chosen = static_cast<int32_t>(result->entries.size());
    }
    result->entries.push_back({verdict.kernel->name, type, reason});
  }
}

tandem_status Explain(const tandem_problem* problem, const tandem_outputs* outputs,
                      const tandem_gradients* gradients, const tandem_options* options,
                      tandem_explanation** explanation) {
  if (explanation == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "explanation is null, must point to a tandem_explanation*");
  }
  tandem_options read;
  tandem_status status = ReadOptions(options, &read);
  if (status != TANDEM_STATUS_OK) return status;
  status = CheckKernelName(read);
  if (status != TANDEM_STATUS_OK) return status;
  core::Problem validated;
  status = core::Validate(problem, outputs, gradients, &validated, &LastError());
  if (status != TANDEM_STATUS_OK) return status;
  auto result = std::make_unique<tandem_explanation>();
  const bool on_cuda = validated.device_type == TANDEM_DEVICE_CUDA;
  const tandem_device_type wanted =
      read.device_type == TANDEM_DEVICE_UNSET ? validated.device_type : read.device_type;
  const std::string no_cpu =
      on_cuda ? "the tensors are on a CUDA device, and are not copied to the CPU"
              : (wanted == TANDEM_DEVICE_CUDA ? "device cuda was asked for" : "");
  const std::string no_cuda = wanted == TANDEM_DEVICE_CPU ? "device cpu was asked for" : "";
  const bool cpu_first = wanted == TANDEM_DEVICE_CPU;
  for (int n = 0; n < 2; ++n) {
    const bool cpu = (n == 0) == cpu_first;
    AddVerdicts(validated, read, cpu ? TANDEM_DEVICE_CPU : TANDEM_DEVICE_CUDA,
                cpu ? no_cpu : no_cuda, result.get());
  }
  *explanation = result.release();
  return TANDEM_STATUS_OK;
}

const tandem_explanation::Entry* EntryAt(const tandem_explanation* explanation, int32_t index) {
  if (explanation == nullptr || index < 0 ||
      index >= static_cast<int32_t>(explanation->entries.size())) {
    return nullptr;
  }
  return &explanation->entries[index];
}

}  // namespace
}  // namespace tandem::dispatch

using namespace tandem::dispatch;  // NOLINT: entry points below

extern "C" {

tandem_status tandem_explain(const tandem_problem* problem, const tandem_outputs* outputs,
                             const tandem_gradients* gradients, const tandem_options* options,
                             tandem_explanation** explanation) {
  return Guard([&] { return Explain(problem, outputs, gradients, options, explanation); });
}

void tandem_explanation_destroy(tandem_explanation* explanation) { delete explanation; }

int32_t tandem_explanation_count(const tandem_explanation* explanation) {
  return explanation == nullptr ? 0 : static_cast<int32_t>(explanation->entries.size());
}

int32_t tandem_explanation_chosen(const tandem_explanation* explanation) {
  return explanation == nullptr ? -1 : explanation->chosen;
}

const char* tandem_explanation_kernel(const tandem_explanation* explanation, int32_t index) {
  const tandem_explanation::Entry* entry = EntryAt(explanation, index);
  return entry == nullptr ? nullptr : entry->kernel.c_str();
}

tandem_device_type tandem_explanation_device(const tandem_explanation* explanation, int32_t index) {
  const tandem_explanation::Entry* entry = EntryAt(explanation, index);
  return entry == nullptr ? TANDEM_DEVICE_UNSET : entry->device_type;
}

const char* tandem_explanation_reason(const tandem_explanation* explanation, int32_t index) {
  const tandem_explanation::Entry* entry = EntryAt(explanation, index);
  return entry == nullptr || entry->reason.empty() ? nullptr : entry->reason.c_str();
}

}  // extern "C"
