// Gradients that a kernel writes without computing.
#ifndef TANDEM_BACKEND_CPU_GRADIENT_ROWS_H_
#define TANDEM_BACKEND_CPU_GRADIENT_ROWS_H_

#include <cstdint>

#include "core/problem.h"

namespace tandem::cpu {

// +0 for dQ, dK and dV of the rows of packed tensors that belong to no sequence. Nothing in other
// layouts.
void WriteGradientsOutsideSequences(const core::Problem& problem);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_GRADIENT_ROWS_H_
