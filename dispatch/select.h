// Selection: which kernel of a table serves a problem. Pure: the table, the features and the
// problem decide, nothing else, so that it is tested with made-up ones.
#ifndef TANDEM_DISPATCH_SELECT_H_
#define TANDEM_DISPATCH_SELECT_H_

#include <string>
#include <vector>

#include "core/backend.h"

namespace tandem::dispatch {

struct Verdict {
  const core::KernelRecord* kernel;
  std::string reason;  // empty: it would serve the problem
};

struct Selection {
  int chosen = -1;  // index into verdicts; -1: none
  std::vector<Verdict> verdicts;
};

// Reads the table top-down; the first kernel that the features allow, that is `wanted` (null: any),
// and that does not decline is chosen. Every kernel gets its verdict.
Selection Select(const core::Problem& problem, const core::KernelRecord* kernels, int kernel_count,
                 uint64_t features, const char* wanted);

// "lacks avx512f, ..." or empty when the features suffice.
std::string MissingFeatures(const core::KernelRecord& kernel, uint64_t features);

// All reasons in one sentence, for the message when nothing serves.
std::string JoinReasons(const Selection& selection);

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_SELECT_H_
