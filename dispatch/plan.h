// Validate -> plan -> run: the steps shared by the plan functions and the one-call functions.
#ifndef TANDEM_DISPATCH_PLAN_H_
#define TANDEM_DISPATCH_PLAN_H_

#include "core/backend.h"
#include "dispatch/select.h"

struct tandem_plan {
  tandem::core::Problem structure;  // of the problem planned for: no data pointers, no values
  const tandem::core::Backend* backend;
  const tandem::core::KernelRecord* kernel;
  int64_t workspace_size;
  int32_t device_index;
  int32_t threads;
  const tandem_executor* executor;
};

namespace tandem::dispatch {

// options, or defaults where null; checked.
tandem_status ReadOptions(const tandem_options* options, tandem_options* result);

// Validation by core::Validate, its message kept as the thread's last error.
tandem_status ValidateProblem(const tandem_problem* problem, const tandem_outputs* outputs,
                              const tandem_gradients* gradients, core::Problem* result);

// The verdicts of one device's kernels.
Selection SelectOn(const core::Backend& backend, const core::Problem& problem,
                   const tandem_options& options, int32_t device_index);

// Fails where options name a kernel that no backend has.
tandem_status CheckKernelName(const tandem_options& options);

// Plans a validated problem on the device its tensors are on.
tandem_status MakePlan(const core::Problem& problem, const tandem_options& options,
                       tandem_plan* plan);

// Scratch bytes for this very problem: the prepared mask, then the kernel's own.
int64_t WorkspaceSize(const core::KernelRecord& kernel, const core::Problem& problem);

// Prepares the mask and runs the kernel; the workspace is large enough and aligned.
tandem_status RunPlan(const tandem_plan& plan, core::Problem* problem, void* workspace,
                      void* stream);

// The problem without its data: what must be equal between planning and running.
core::Problem StructureOf(const core::Problem& problem);

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_PLAN_H_
