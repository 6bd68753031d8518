// onednn.cpu: matmul, the shared safe softmax, matmul, with oneDNN's f32 products: a second opinion
// that shares no matrix product with Tandem's own kernels.
#ifndef TANDEM_BACKEND_CPU_ONEDNN_ONEDNN_KERNEL_H_
#define TANDEM_BACKEND_CPU_ONEDNN_ONEDNN_KERNEL_H_

#include "core/backend.h"

namespace tandem::cpu {

bool OnednnDecline(const core::Problem& problem, core::Text* reason);
int64_t OnednnWorkspace(const core::Problem& problem);
tandem_status OnednnRun(const core::Problem& problem, void* workspace,
                        const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_ONEDNN_ONEDNN_KERNEL_H_
