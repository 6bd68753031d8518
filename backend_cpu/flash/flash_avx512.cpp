#include "backend_cpu/flash/flash.h"
#include "backend_cpu/flash/flash_forward.h"

namespace tandem::cpu {

int64_t FlashWorkspaceAvx512(const core::Problem& problem) {
  return LayOutWorkspace(problem, kLanes<Avx512>).size;
}

tandem_status FlashRunAvx512(const core::Problem& problem, void* workspace,
                             const core::Context& context) {
  return RunFlash<Avx512>(problem, workspace, context);
}

}  // namespace tandem::cpu
