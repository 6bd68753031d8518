// The validator's part for what a call writes, and for what the backward pass reads beside the
// problem; used by core/validate.cpp only.
#ifndef TANDEM_CORE_VALIDATE_OUTPUTS_H_
#define TANDEM_CORE_VALIDATE_OUTPUTS_H_

#include "core/problem.h"
#include "core/tensor_check.h"

namespace tandem::core {

// Which of a tensor's dimensions are batch, head, row and column; batch -1: packed, none.
struct Axes {
  int batch, head, row, column;
};
Axes AxesOf(Layout layout);

// q, k, v, out or one of their gradients as kernels see it.
Array4 ViewOf(Layout layout, const tandem_tensor& tensor);

// out and lse; with gradients, which may be null, the backward pass: out and lse are then inputs.
// Everything else of `p` is complete.
bool OutputTensors(const tandem_problem& in, const tandem_outputs& outputs,
                   const tandem_gradients* gradients, Checker* check, Problem* p);

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_OUTPUTS_H_
