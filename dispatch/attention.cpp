// tandem_attention and its backward pass: validate, choose the device, plan, allocate, run, wait.
#include <cstdlib>
#include <memory>

#include "core/mask_prepare.h"
#include "dispatch/error.h"
#include "dispatch/plan.h"
#include "dispatch/registry.h"
#include "dispatch/staging.h"

namespace tandem::dispatch {
namespace {

tandem_status RunOnHost(const core::Problem& validated, const tandem_options& options) {
  tandem_plan plan;
  tandem_status status = MakePlan(validated, options, &plan);
  if (status != TANDEM_STATUS_OK) return status;
  const size_t size =
      static_cast<size_t>(core::RoundUp<int64_t>(plan.workspace_size, core::kBufferAlignment));
  std::unique_ptr<void, decltype(&std::free)> workspace(
      size == 0 ? nullptr : std::aligned_alloc(core::kBufferAlignment, size), &std::free);
  if (size > 0 && workspace == nullptr) {
    return Fail(TANDEM_STATUS_OUT_OF_MEMORY, "host memory is exhausted (%zu bytes of workspace)",
                size);
  }
  core::Problem problem = validated;
  return RunPlan(plan, &problem, workspace.get(), nullptr);
}

// The tensors are on the CUDA device already; the legacy default stream orders the call after the
// caller's work.
tandem_status RunOnDevice(const core::Problem& validated, const tandem_options& options) {
  tandem_plan plan;
  tandem_status status = MakePlan(validated, options, &plan);
  if (status != TANDEM_STATUS_OK) return status;
  const core::Context context = {plan.device_index, 0, nullptr, nullptr, &LastError()};
  Staging memory(*plan.backend, context, plan.device_index);
  void* workspace = nullptr;
  if (plan.workspace_size > 0) status = memory.Allocate(plan.workspace_size, &workspace);
  if (status != TANDEM_STATUS_OK) return status;
  core::Problem problem = validated;
  status = RunPlan(plan, &problem, workspace, nullptr);
  return status == TANDEM_STATUS_OK ? plan.backend->synchronize(context) : status;
}

tandem_status RunStaged(const tandem_problem& problem, const tandem_outputs& outputs,
                        const tandem_gradients* gradients, const core::Problem& validated,
                        const tandem_options& options) {
  tandem_status status = CheckKernelName(options);
  if (status != TANDEM_STATUS_OK) return status;
  const core::Backend* backend = UsableBackend(TANDEM_DEVICE_CUDA, options.device_index, &status);
  if (backend == nullptr) return status;
  const core::Context context = {options.device_index, 0, nullptr, nullptr, &LastError()};
  Staging staging(*backend, context, options.device_index);
  status = staging.Upload(problem, outputs, gradients, validated);
  if (status != TANDEM_STATUS_OK) return status;
  core::Problem on_device;
  status = ValidateProblem(&staging.problem(), &staging.outputs(), staging.gradients(), &on_device);
  if (status == TANDEM_STATUS_OK) status = RunOnDevice(on_device, options);
  return status == TANDEM_STATUS_OK ? staging.Download() : status;
}

// Whether CUDA is there and a kernel accepts.
bool CudaServes(const core::Problem& validated, const tandem_options& options) {
  const BackendState& cuda = StateOf(TANDEM_DEVICE_CUDA);
  if (options.device_index >= static_cast<int32_t>(cuda.devices.size())) return false;
  core::Problem there = validated;
  there.device_type = TANDEM_DEVICE_CUDA;
  there.device_index = options.device_index;
  return SelectOn(*cuda.backend, there, options, options.device_index).chosen >= 0;
}

// gradients null: forward.
tandem_status Attention(const tandem_problem* problem, const tandem_outputs* outputs,
                        const tandem_gradients* gradients, const tandem_options* options) {
  tandem_options read;
  tandem_status status = ReadOptions(options, &read);
  if (status != TANDEM_STATUS_OK) return status;
  core::Problem validated;
  status = ValidateProblem(problem, outputs, gradients, &validated);
  if (status != TANDEM_STATUS_OK) return status;
  if (validated.device_type == TANDEM_DEVICE_CUDA) {
    if (read.device_type == TANDEM_DEVICE_CPU) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                  "options: device_type is CPU, must be CUDA or AUTO for tensors on a CUDA device");
    }
    return RunOnDevice(validated, read);
  }
  const bool staged = read.device_type == TANDEM_DEVICE_CUDA ||
                      (read.device_type == TANDEM_DEVICE_AUTO && CudaServes(validated, read));
  if (staged && problem->mask_plan != nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "mask_plan is in host memory, must be null where the call copies to CUDA");
  }
  if (staged && problem->kv_cache != nullptr) {
    return Fail(TANDEM_STATUS_UNSUPPORTED,
                "kv_cache is in host memory, and no kernel on CUDA reads it; the CPU's do");
  }
  return staged ? RunStaged(*problem, *outputs, gradients, validated, read)
                : RunOnHost(validated, read);
}

}  // namespace
}  // namespace tandem::dispatch

extern "C" tandem_status tandem_attention(const tandem_problem* problem,
                                          const tandem_outputs* outputs,
                                          const tandem_options* options) {
  return tandem::dispatch::Guard(
      [&] { return tandem::dispatch::Attention(problem, outputs, nullptr, options); });
}

extern "C" tandem_status tandem_attention_backward(const tandem_problem* problem,
                                                   const tandem_outputs* outputs,
                                                   const tandem_gradients* gradients,
                                                   const tandem_options* options) {
  return tandem::dispatch::Guard([&] {
    if (gradients == nullptr) {
      return tandem::dispatch::Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                                    "gradients is null, must point to a tandem_gradients");
    }
    return tandem::dispatch::Attention(problem, outputs, gradients, options);
  });
}
