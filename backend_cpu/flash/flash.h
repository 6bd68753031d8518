// flash_cpu: attention forward by blocked online softmax, one entry per instruction set. Every
// function obeys docs/semantics.md; all arithmetic is in f32, also for f16 and bf16 tensors.
//
// This header is safe in baseline files. The functions it declares are defined in files compiled
// for one instruction set each and may only be called where the machine has it.
#ifndef TANDEM_BACKEND_CPU_FLASH_FLASH_H_
#define TANDEM_BACKEND_CPU_FLASH_FLASH_H_

#include "core/backend.h"

namespace tandem::cpu {

inline constexpr int64_t kFlashMaxHeadDim = 512;

// What a flash kernel of one dtype does not serve, as KernelRecord::decline.
TANDEM_HD bool FlashDecline(core::DType dtype, const core::Problem& problem, core::Text* reason) {
  if (problem.dtype != dtype) {
    core::Format(reason, "it takes %s tensors, and q, k and v are %s", core::DTypeName(dtype),
                 core::DTypeName(problem.dtype));
    return true;
  }
  if (problem.is_backward) {
    core::Format(reason, "it computes the forward pass only, and gradients are asked for");
    return true;
  }
  if (problem.qk_dim < 1 || problem.qk_dim > kFlashMaxHeadDim || problem.v_dim < 1 ||
      problem.v_dim > kFlashMaxHeadDim) {
    core::Format(reason, "head dims are 1 to %lld, and that of q and k is %lld, that of v is %lld",
                 static_cast<long long>(kFlashMaxHeadDim), static_cast<long long>(problem.qk_dim),
                 static_cast<long long>(problem.v_dim));
    return true;
  }
  return false;
}

// Bytes of workspace; no data is read.
int64_t FlashWorkspaceAvx2(const core::Problem& problem);
int64_t FlashWorkspaceAvx512(const core::Problem& problem);

// Runs a problem that FlashDecline lets through, for any of the three dtypes. workspace: as many
// bytes as above, aligned to kBufferAlignment. Out of memory (scratch of a thread): OUT_OF_MEMORY
// and a message; some outputs are written then.
tandem_status FlashRunAvx2(const core::Problem& problem, void* workspace,
                           const core::Context& context);
tandem_status FlashRunAvx512(const core::Problem& problem, void* workspace,
                             const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_FLASH_H_
