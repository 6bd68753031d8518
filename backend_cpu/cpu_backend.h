// The CPU backend: its kernels, best first, and its device.
#ifndef TANDEM_BACKEND_CPU_CPU_BACKEND_H_
#define TANDEM_BACKEND_CPU_CPU_BACKEND_H_

#include "core/backend.h"

namespace tandem::cpu {

// A static object that is always there.
const core::Backend* CpuBackend();

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_CPU_BACKEND_H_
