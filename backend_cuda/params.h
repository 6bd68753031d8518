// What a forward kernel receives, by value in constant memory.
#ifndef TANDEM_BACKEND_CUDA_PARAMS_H_
#define TANDEM_BACKEND_CUDA_PARAMS_H_

#include "core/problem.h"

namespace tandem::cuda {

struct ForwardParams {
  core::Problem problem;
  int64_t row_blocks;  // of the longest sequence
  int64_t items;       // (batch, head, row block) triples; one block each
};

// Kernel parameters are limited to 4 KB on every architecture served.
static_assert(sizeof(ForwardParams) <= 4096, "ForwardParams no longer fits kernel parameters");

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_PARAMS_H_
