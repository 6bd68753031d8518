// reference.cpu: attention row by row in f64 arithmetic. It serves every forward problem and needs
// no memory of its own, so that there is always an answer; it is the slowest kernel.
#ifndef TANDEM_BACKEND_CPU_REFERENCE_H_
#define TANDEM_BACKEND_CPU_REFERENCE_H_

#include "core/backend.h"

namespace tandem::cpu {

bool ReferenceDecline(const core::Problem& problem, core::Text* reason);
int64_t ReferenceWorkspace(const core::Problem& problem);
tandem_status ReferenceRun(const core::Problem& problem, void* workspace,
                           const core::Context& context);

// What no CPU kernel serves yet: true with the reason.
bool DeclineUnbuilt(const core::Problem& problem, core::Text* reason);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_REFERENCE_H_
