// Rows of the output that a kernel writes without computing.
#ifndef TANDEM_BACKEND_CPU_OUTPUT_ROWS_H_
#define TANDEM_BACKEND_CPU_OUTPUT_ROWS_H_

#include <cstdint>

#include "core/problem.h"

namespace tandem::cpu {

// O = +0 and LSE = -inf for local rows [begin, end) of one sequence and head.
void WriteEmptyRows(const core::Problem& problem, const core::Sequence& sequence, int64_t head,
                    int64_t begin, int64_t end);

// The same for the rows of packed tensors that belong to no sequence. Nothing in other layouts.
void WriteRowsOutsideSequences(const core::Problem& problem);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_OUTPUT_ROWS_H_
