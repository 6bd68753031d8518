// flash_cpu_backward: the gradients of attention by tiles of 64 rows and 64 keys, one entry per
// instruction set. Every function obeys docs/semantics.md section 6. Arithmetic is in f32, also for
// f16 and bf16 tensors, but for the products on matrix tiles, whose operands are bf16 numbers or
// sums of them (tiles/tiles.h). Results are the same bits for any number of threads.
//
// This header is safe in baseline files. The functions it declares are defined in files compiled
// for one instruction set each and may only be called where the machine has it.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_H_
#define TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_H_

#include "core/backend.h"

namespace tandem::cpu {

inline constexpr int64_t kBackwardMaxHeadDim = 512;

// What a backward kernel of one dtype does not serve, as KernelRecord::decline.
TANDEM_HD bool BackwardDecline(core::DType dtype, const core::Problem& problem,
                               core::Text* reason) {
  if (!problem.is_backward) {
    core::Format(reason, "it computes gradients, and none are asked for");
    return true;
  }
  if (problem.dtype != dtype) {
    core::Format(reason, "it takes %s tensors, and q, k and v are %s", core::DTypeName(dtype),
                 core::DTypeName(problem.dtype));
    return true;
  }
  if (problem.has_block_table || problem.has_kv_cache) {
    core::Format(reason, "%s is given, and it has no gradients of paged or packed keys",
                 problem.has_block_table ? "block_table" : "kv_cache");
    return true;
  }
  if (problem.qk_dim > kBackwardMaxHeadDim || problem.v_dim > kBackwardMaxHeadDim) {
    core::Format(reason, "head dims are 1 to %lld, and that of q and k is %lld, that of v is %lld",
                 static_cast<long long>(kBackwardMaxHeadDim),
                 static_cast<long long>(problem.qk_dim), static_cast<long long>(problem.v_dim));
    return true;
  }
  return false;
}

// Bytes of workspace; no data is read.
int64_t BackwardWorkspaceAvx2(const core::Problem& problem);
int64_t BackwardWorkspaceAvx512(const core::Problem& problem);
int64_t BackwardWorkspaceTiles(const core::Problem& problem);

// Runs a problem that BackwardDecline lets through, for any of the three dtypes. Out of memory
// (scratch of a thread): OUT_OF_MEMORY and a message; some gradients are written then.
tandem_status BackwardRunAvx2(const core::Problem& problem, void* workspace,
                              const core::Context& context);
tandem_status BackwardRunAvx512(const core::Problem& problem, void* workspace,
                                const core::Context& context);
tandem_status BackwardRunAmx(const core::Problem& problem, void* workspace,
                             const core::Context& context);
// As on AMX, with the tiles emulated in AVX2.
tandem_status BackwardRunEmulated(const core::Problem& problem, void* workspace,
                                  const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_H_
