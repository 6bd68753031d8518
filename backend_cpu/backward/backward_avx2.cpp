#include "backend_cpu/backward/backward.h"
#include "backend_cpu/backward/flash_backward.h"

namespace tandem::cpu {

int64_t BackwardWorkspaceAvx2(const core::Problem& problem) {
  return LayOutPlanes(problem, kLanes<Avx2>).bytes;
}

tandem_status BackwardRunAvx2(const core::Problem& problem, void* workspace,
                              const core::Context& context) {
  return RunBackward<Avx2>(problem, workspace, context);
}

}  // namespace tandem::cpu
