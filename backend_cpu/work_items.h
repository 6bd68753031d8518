// The work of a forward call: blocks of (query row, head of the group) pairs (mask_rows.h),
// heaviest first, so that dynamic scheduling ends evenly. The list is the same for any number of
// threads.
#ifndef TANDEM_BACKEND_CPU_WORK_ITEMS_H_
#define TANDEM_BACKEND_CPU_WORK_ITEMS_H_

#include <cstdint>

#include "core/problem.h"

namespace tandem::cpu {

struct WorkItem {
  int64_t batch;
  int64_t kv_head;
  int64_t first;  // pair
  int64_t count;
  int64_t weight;  // pairs of rows and keys in tiles that are not empty, about
};

// How many items there can be with blocks of `block_rows` pairs, whatever the sequences are.
TANDEM_HD int64_t WorkItemCapacity(const core::Problem& p, int64_t block_rows) {
  const int64_t blocks = core::IsPacked(p)
                             ? p.q_total * p.group / block_rows + p.batch
                             : p.batch * core::CeilDiv(p.q_rows * p.group, block_rows);
  return p.kv_heads * blocks;
}

// Fills `items`, which has room for that many; returns how many there are.
int64_t ListWorkItems(const core::Problem& problem, int64_t block_rows, WorkItem* items);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_WORK_ITEMS_H_
