#include "backend_cpu/flash/flash.h"
#include "backend_cpu/flash/flash_forward.h"

namespace tandem::cpu {

int64_t FlashWorkspaceAvx2(const core::Problem& problem) {
  return LayOutWorkspace(problem, kLanes<Avx2>).size;
}

tandem_status FlashRunAvx2(const core::Problem& problem, void* workspace,
                           const core::Context& context) {
  return RunFlash<Avx2>(problem, workspace, context);
}

}  // namespace tandem::cpu
