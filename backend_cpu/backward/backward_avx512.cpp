#include "backend_cpu/backward/backward.h"
#include "backend_cpu/backward/flash_backward.h"
#include "backend_cpu/backward/panel_multiplier.h"

namespace tandem::cpu {

int64_t BackwardWorkspaceAvx512(const core::Problem& problem) {
  return LayOutPlanes(problem, PanelMultiplier<Avx512>::Sizes(problem)).bytes;
}

tandem_status BackwardRunAvx512(const core::Problem& problem, void* workspace,
                                const core::Context& context) {
  return RunBackward<PanelMultiplier<Avx512>>(problem, workspace, context);
}

}  // namespace tandem::cpu
