// Preparation of the mask terms that are data, in parallel: the loops around core/mask_prepare.h.
#ifndef TANDEM_BACKEND_CPU_MASK_SCAN_H_
#define TANDEM_BACKEND_CPU_MASK_SCAN_H_

#include "core/backend.h"

namespace tandem::cpu {

// core::Backend::prepare_mask.
tandem_status PrepareMask(const core::Problem& problem, const core::PreparationLayout& layout,
                          void* buffer, const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_MASK_SCAN_H_
