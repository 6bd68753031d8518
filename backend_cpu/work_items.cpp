#include "backend_cpu/work_items.h"

#include <algorithm>

#include "backend_cpu/mask_rows.h"

namespace tandem::cpu {
namespace {

using core::Problem;
using core::Sequence;

// Whether the hull of visible keys says nearly all about how many there are.
bool HullIsEnough(const core::Mask& mask) {
  return mask.dense.words == nullptr && mask.row_ranges_count == 0 && mask.segments_count == 0 &&
         mask.block_sparse_count == 0;
}

int64_t Weight(const Problem& p, const Sequence& s, const RowPairs& rows) {
  const core::Interval hull = HullForRows(p, s, rows);
  int64_t keys = core::Max<int64_t>(hull.end - hull.begin, 0);
  if (!HullIsEnough(p.mask)) {
    keys = 0;
    for (int64_t tile = hull.begin / core::kTile; tile * core::kTile < hull.end; ++tile) {
      if (ClassifyForRows(p, s, rows, tile) != core::TileClass::kEmpty) keys += core::kTile;
    }
  }
  return rows.count * (keys + 1);
}

}  // namespace

int64_t ListWorkItems(const Problem& p, int64_t block_rows, WorkItem* items) {
  const bool heads_differ = core::MaskVariesByHead(p.mask);
  int64_t count = 0;
  int32_t status = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = core::ResolveSequence(p, b, &status);
    if (IsShort(p, s)) continue;
    const int64_t pairs = s.q_rows * p.group;
    const int64_t blocks = core::CeilDiv(pairs, block_rows);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * block_rows;
        const RowPairs rows = MakeRowPairs(p, head, first, core::Min(block_rows, pairs - first));
        // The same block of the head before.
        const int64_t weight =
            head > 0 && !heads_differ ? items[count - blocks].weight : Weight(p, s, rows);
        items[count++] = {b, head, first, rows.count, weight};
      }
    }
  }
  const auto heavier = [](const WorkItem& a, const WorkItem& b) { return a.weight > b.weight; };
  // Items of one key head stay together where they weigh the same, so that its keys stay in cache.
  if (!std::is_sorted(items, items + count, heavier))
    std::stable_sort(items, items + count, heavier);
  return count;
}

void ShareWorkItems(int64_t workers, WorkItem* items, int64_t count, int64_t* first) {
  const auto heavier = [](const WorkItem& a, const WorkItem& b) { return a.weight > b.weight; };
  std::stable_sort(items, items + count, [](const WorkItem& a, const WorkItem& b) {
    if (a.kv_head != b.kv_head) return a.kv_head < b.kv_head;
    if (a.batch != b.batch) return a.batch < b.batch;
    return a.weight > b.weight;
  });
  double total = 0;
  for (int64_t n = 0; n < count; ++n) total += static_cast<double>(items[n].weight);
  double before = 0;
  int64_t worker = 0;
  first[0] = 0;
  for (int64_t n = 0; n < count; ++n) {
    const double weight = static_cast<double>(items[n].weight);
    const double middle = (before + weight / 2) * static_cast<double>(workers) / total;
    for (; worker + 1 < workers && static_cast<double>(worker + 1) <= middle; ++worker) {
      first[worker + 1] = n;
    }
    before += weight;
  }
  for (; worker < workers; ++worker) first[worker + 1] = count;
  for (int64_t w = 0; w < workers; ++w) {
    std::stable_sort(items + first[w], items + first[w + 1], heavier);
  }
}

int64_t ListSplits(const Problem& p, SplitGroup* groups, int64_t* group_of_split,
                   int64_t* split_count) {
  int64_t count = 0;
  int64_t splits = 0;
  int32_t status = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = core::ResolveSequence(p, b, &status);
    if (!IsShort(p, s) || s.q_rows == 0) continue;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const core::Interval hull = HullForRows(p, s, MakeRowPairs(p, head, 0, s.q_rows * p.group));
      const int64_t first = hull.begin / kSplitKeys;
      const int64_t end = core::CeilDiv(core::Max(hull.begin, hull.end), kSplitKeys);
      groups[count] = {b, head, first, hull.begin < hull.end ? end - first : 0, splits, 0};
      for (int64_t n = 0; n < groups[count].split_count; ++n) group_of_split[splits++] = count;
      ++count;
    }
  }
  *split_count = splits;
  return count;
}

}  // namespace tandem::cpu
