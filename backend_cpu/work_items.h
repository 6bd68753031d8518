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

// Fills `items`, which has room for that many; returns how many there are. Short sequences, below,
// have none.
int64_t ListWorkItems(const core::Problem& problem, int64_t block_rows, WorkItem* items);

// Orders the items by workers for ParallelForNear: each begins with about the same weight, of as
// few key heads as can be, so that their keys and values stay in the worker's cache; heaviest
// first. first: workers + 1 entries.
void ShareWorkItems(int64_t workers, WorkItem* items, int64_t count, int64_t* first);

// Sequences of so few pairs per key head (decoding) that reading keys and values is the work. They
// are cut along the keys instead, at a fixed size.
inline constexpr int64_t kShortPairs = 16;
inline constexpr int64_t kSplitKeys = 512;

TANDEM_HD bool IsShort(const core::Problem& p, const core::Sequence& s) {
  return s.q_rows * p.group <= kShortPairs;
}
// Whether every sequence is; p.q_rows is the longest one's.
TANDEM_HD bool AllAreShort(const core::Problem& p) { return p.q_rows * p.group <= kShortPairs; }

// A short sequence and key head, with the splits that can see something of it.
struct SplitGroup {
  int64_t batch;
  int64_t kv_head;
  int64_t first_split;  // keys [split * kSplitKeys, (split + 1) * kSplitKeys)
  int64_t split_count;
  int64_t first_item;  // its splits are items first_item + n
  int64_t done;        // splits that are complete
};

// How many groups, and how many splits, there can be.
TANDEM_HD int64_t SplitGroupCapacity(const core::Problem& p) {
  return core::IsPacked(p) || AllAreShort(p) ? p.batch * p.kv_heads : 0;
}
TANDEM_HD int64_t SplitCapacity(const core::Problem& p) {
  if (core::IsPacked(p)) return p.kv_heads * (p.kv_total / kSplitKeys + p.batch);
  return AllAreShort(p) ? p.batch * p.kv_heads * core::CeilDiv(p.kv_rows, kSplitKeys) : 0;
}

// Fills `groups` and, for each split, the index of its group. Returns the number of groups;
// *split_count is that of splits.
int64_t ListSplits(const core::Problem& problem, SplitGroup* groups, int64_t* group_of_split,
                   int64_t* split_count);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_WORK_ITEMS_H_
