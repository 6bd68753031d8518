// The only validator: from the public descriptors to core::Problem, or a status and a sentence that
// names the argument, what it was and what it may be.
#ifndef TANDEM_CORE_VALIDATE_H_
#define TANDEM_CORE_VALIDATE_H_

#include "core/problem.h"
#include "core/text.h"
#include "tandem/tandem.h"

namespace tandem::core {

// outputs null: only the mask and the shapes are wanted (mask plans, inspection); then q, k and v
// may have null data. gradients null: forward. On success *result is complete but for its prepared
// mask (core/mask_prepare.h). Data in host memory (lengths, cu_seqlens, block lists) is checked
// too; data on a device is not read.
tandem_status Validate(const tandem_problem* problem, const tandem_outputs* outputs,
                       const tandem_gradients* gradients, Problem* result, Text* error);

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_H_
