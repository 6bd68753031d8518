#include "backend_cpu/backward/backward.h"
#include "backend_cpu/backward/flash_backward.h"
#include "backend_cpu/backward/panel_multiplier.h"

namespace tandem::cpu {

int64_t BackwardWorkspaceAvx2(const core::Problem& problem) {
  return LayOutPlanes(problem, PanelMultiplier<Avx2>::Sizes(problem)).bytes;
}

tandem_status BackwardRunAvx2(const core::Problem& problem, void* workspace,
                              const core::Context& context) {
  return RunBackward<PanelMultiplier<Avx2>>(problem, workspace, context);
}

}  // namespace tandem::cpu
