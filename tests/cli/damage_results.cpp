// Loaded before the library by cli_test.py: tandem_plan_run as it is, and then one element of the
// output (of dq in the backward pass) changed, so that `tandem compare` has something to find.
#include <dlfcn.h>

#include "tandem/tandem.h"

extern "C" tandem_status tandem_plan_run(const tandem_plan* plan, const tandem_problem* problem,
                                         const tandem_outputs* outputs,
                                         const tandem_gradients* gradients, void* workspace,
                                         size_t workspace_size, void* stream) {
  using PlanRun = decltype(&tandem_plan_run);
  static const PlanRun run = reinterpret_cast<PlanRun>(dlsym(RTLD_NEXT, "tandem_plan_run"));
  const tandem_status status =
      run(plan, problem, outputs, gradients, workspace, workspace_size, stream);
  const tandem_tensor* result = gradients == nullptr ? outputs->out : gradients->dq;
  if (status == TANDEM_STATUS_OK) static_cast<float*>(result->data)[0] += 0.125f;
  return status;
}
