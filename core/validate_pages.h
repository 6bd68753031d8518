// A problem whose keys and values are in pages.
#ifndef TANDEM_CORE_VALIDATE_PAGES_H_
#define TANDEM_CORE_VALIDATE_PAGES_H_

#include "core/problem.h"
#include "core/tensor_check.h"

namespace tandem::core {

// Takes block_table, and k and v as [pages, page_size, Hk, D]; dtypes, devices and ranks of q, k
// and v have been checked, and the batch, query heads and head dims of the problem are known.
bool TakePages(const tandem_problem& input, bool needs_data, Checker* check, Problem* p);

// After the terms: a table in host memory names pages of k for all keys of every sequence. True
// without a table.
bool ListedPages(bool needs_data, Checker* check, const Problem& p);

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_PAGES_H_
