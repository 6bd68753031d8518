// A problem whose keys and values are in a cache.
#ifndef TANDEM_CORE_VALIDATE_CACHE_H_
#define TANDEM_CORE_VALIDATE_CACHE_H_

#include "core/problem.h"
#include "core/tensor_check.h"

namespace tandem::core {

// What stands in the place of k and v.
struct CachedTensors {
  tandem_tensor k, v;
};

// Checks what problem.kv_cache excludes and what it has to share with q, a valid tensor of rank 4
// (3 with layout THD); sets the cache's tensors, and the problem's lengths to those of the cache.
bool TakeCache(const tandem_problem& input, bool has_gradients, Checker* check,
               CachedTensors* tensors, Problem* p);

// After the terms: lengths that they give are at most those of the cache. True without a cache.
bool CachedLengths(const tandem_problem& input, Checker* check, const Problem& p);

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_CACHE_H_
