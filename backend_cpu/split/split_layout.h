// The workspace of short sequences: lists, and what each split leaves for the merge.
#ifndef TANDEM_BACKEND_CPU_SPLIT_SPLIT_LAYOUT_H_
#define TANDEM_BACKEND_CPU_SPLIT_SPLIT_LAYOUT_H_

#include "backend_cpu/work_items.h"
#include "core/mask_prepare.h"

namespace tandem::cpu {

// A split's result for one row: columns of O, then m and l, then padding to whole cache lines.
TANDEM_HD int64_t PartialColumns(const core::Problem& p) {
  return core::RoundUp<int64_t>(p.v_dim, 16);
}
TANDEM_HD int64_t PartialRow(const core::Problem& p) { return PartialColumns(p) + 16; }

struct SplitWorkspace {
  int64_t group_offset;  // all in bytes
  int64_t index_offset;
  int64_t partial_offset;
  int64_t size;
};

TANDEM_HD SplitWorkspace LayOutSplits(const core::Problem& p) {
  SplitWorkspace w;
  const int64_t splits = SplitCapacity(p);
  const int64_t rows = core::Min<int64_t>(kShortPairs, p.q_rows * p.group);
  w.group_offset = 0;
  w.index_offset = int64_t{sizeof(SplitGroup)} * SplitGroupCapacity(p);
  w.partial_offset = core::RoundUp<int64_t>(w.index_offset + int64_t{sizeof(int64_t)} * splits,
                                            core::kBufferAlignment);
  w.size = core::RoundUp<int64_t>(w.partial_offset + 4 * splits * rows * PartialRow(p),
                                  core::kBufferAlignment);
  return w;
}

// Row r of a split's results.
TANDEM_HD float* PartialAt(const core::Problem& p, const SplitWorkspace& w, void* workspace,
                           int64_t split, int64_t r) {
  const int64_t rows = core::Min<int64_t>(kShortPairs, p.q_rows * p.group);
  return reinterpret_cast<float*>(static_cast<char*>(workspace) + w.partial_offset) +
         (split * rows + r) * PartialRow(p);
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_SPLIT_SPLIT_LAYOUT_H_
