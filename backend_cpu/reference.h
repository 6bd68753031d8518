// reference.cpu: attention row by row in f64 arithmetic, forward and backward. It serves every
// problem and needs no memory of its own, so that there is always an answer; it is the slowest
// kernel.
#ifndef TANDEM_BACKEND_CPU_REFERENCE_H_
#define TANDEM_BACKEND_CPU_REFERENCE_H_

#include "core/backend.h"

namespace tandem::cpu {

bool ReferenceDecline(const core::Problem& problem, core::Text* reason);
int64_t ReferenceWorkspace(const core::Problem& problem);
tandem_status ReferenceRun(const core::Problem& problem, void* workspace,
                           const core::Context& context);

// The backward pass; part of ReferenceRun.
tandem_status ReferenceBackward(const core::Problem& problem, const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_REFERENCE_H_
