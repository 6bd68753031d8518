// flash_cpu forward, written once over an xsimd arch.
//
// A pre-pass packs K and V once per key head (pack.h), but for sequences of a single query block,
// which packs its tiles itself. Then every query block - rows of one sequence and the heads that
// share a key head - walks over the tiles of 64 keys that it can see, kGroupTiles at a time: S = Q
// K^T, softmax (softmax_rows.h), O = rescale * O + P V. Empty tiles are skipped, and in partial
// tiles also what register blocks of rows do not see: all of it, or vectors of keys at its ends.
//
// Blocks are cut by the sequence's own rows, and every row is computed in an order that its
// sequence and mask alone decide: its bits do not depend on threads or batch mates.
#ifndef TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_
#define TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_

#include "backend_cpu/flash/block.h"
#include "backend_cpu/flash/finish_row.h"
#include "backend_cpu/flash/layout.h"
#include "backend_cpu/flash/micro_kernel.h"
#include "backend_cpu/flash/pack.h"
#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/output_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/split/split_forward.h"

namespace tandem::cpu {
namespace {

// Tiles of one task of the pre-pass.
inline constexpr int64_t kPackTiles = 4;

// One call.
struct Flash {
  const core::Problem* problem;
  void* workspace;
  WorkspaceLayout layout;
  const WorkItem* items;
  int32_t out_of_memory;
};

template <class Arch>
TANDEM_ISA_INLINE void MultiplyQueriesByKeys(Block* block) {
  const int64_t depth = block->p->qk_dim;
  for (int t = 0; t < block->tile_count; ++t) {
    const GroupTile& tile = block->tiles[t];
    for (int64_t panel = 0; panel < core::kTile; panel += kPanelWidth<Arch>) {
      for (int b = 0; b < kRowBlocks; ++b) {
        const int64_t begin = core::Max<int64_t>(tile.keys[b].begin, panel);
        const int64_t end = core::Min<int64_t>(tile.keys[b].end, panel + kPanelWidth<Arch>);
        if (begin >= end) continue;
        const Segment segment = {0, tile.packed.k + panel * depth + (begin - panel), depth};
        const int64_t r = int64_t{b} * kBlockRows;
        MultiplyPanel<Arch>(
            static_cast<int>((end - begin) / kLanes<Arch>), block->scratch.q + r * depth, depth,
            &segment, 1, kPanelWidth<Arch>, false,
            block->scratch.scores + r * kScoreStride + t * core::kTile + begin, kScoreStride);
      }
    }
  }
}

// The tiles of the group that register block `row_block` sees.
TANDEM_HD RowTiles TilesOfRowBlock(const Block& block, int64_t row_block) {
  RowTiles tiles;
  tiles.count = 0;
  for (int t = 0; t < block.tile_count; ++t) {
    const GroupTile& tile = block.tiles[t];
    if (tile.keys[row_block].begin == tile.keys[row_block].end) continue;
    tiles.tile[tiles.count] = t;
    tiles.first_key[tiles.count] = tile.first_key;
    tiles.all_visible[tiles.count] = tile.all_visible;
    ++tiles.count;
  }
  return tiles;
}

template <class Arch>
TANDEM_ISA_INLINE void SoftmaxRows(Block* block) {
  const int64_t columns = block->layout->v_columns;
  RowTiles tiles = {};
  for (int64_t r = 0; r < block->rows.count; ++r) {
    if (r % kBlockRows == 0) tiles = TilesOfRowBlock(*block, r / kBlockRows);
    if (tiles.count == 0) continue;
    Row* row = block->scratch.rows + r;
    const bool first = core::SoftmaxRowIsEmpty(row->m, row->l);
    SoftmaxRow<Arch>(*block->p, block->s, tiles, row, block->scratch.scores + r * kScoreStride,
                     block->scratch.words + r, kQueryBlock);
    if (first || row->rescale == 1.0f) continue;
    float* o = block->scratch.o + r * columns;
    for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
      (Vector<Arch>::load_aligned(o + c) * Vector<Arch>(row->rescale)).store_aligned(o + c);
    }
  }
}

template <class Arch>
TANDEM_ISA_INLINE void AddProbabilitiesTimesValues(Block* block) {
  const int64_t columns = block->layout->v_columns;
  for (int64_t panel = 0; panel < columns; panel += kPanelWidth<Arch>) {
    const int64_t width = core::Min<int64_t>(kPanelWidth<Arch>, columns - panel);
    for (int b = 0; b < kRowBlocks; ++b) {
      Segment segments[kGroupTiles];
      int count = 0;
      for (int t = 0; t < block->tile_count; ++t) {
        const GroupTile& tile = block->tiles[t];
        const int64_t begin = tile.keys[b].begin;
        const int64_t depth = tile.keys[b].end - begin;
        if (depth == 0) continue;
        segments[count++] = {t * core::kTile + begin,
                             tile.packed.v + panel * core::kTile + begin * width, depth};
      }
      if (count == 0) continue;
      const int64_t r = int64_t{b} * kBlockRows;
      MultiplyPanel<Arch>(static_cast<int>(width / kLanes<Arch>),
                          block->scratch.scores + r * kScoreStride, kScoreStride, segments, count,
                          width, true, block->scratch.o + r * columns + panel, columns);
    }
  }
}

// Adds what packing left out of a flagged tile: p * v for each element of V that is not finite, for
// the pairs that are visible and kept.
template <class Arch>
TANDEM_ISA_INLINE void AddNonFiniteValues(Block* block, int t) {
  const core::Problem& p = *block->p;
  const int64_t columns = block->layout->v_columns;
  const int64_t first = block->tiles[t].first_key;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(block->s) - first);
  for (int64_t j = 0; j < count; ++j) {
    float* v = block->scratch.v_row;
    LoadRow<Arch>(p.v.data, p.dtype,
                  core::KeyRowOffset(p, p.v, block->s, block->rows.kv_head, first + j),
                  p.v.column_stride, p.v_dim, v);
    for (int64_t c = 0; c < p.v_dim; ++c) {
      if (core::IsFinite(v[c])) continue;
      for (int64_t r = 0; r < block->rows.count; ++r) {
        if (((block->scratch.words[t * kQueryBlock + r] >> j) & 1u) == 0) continue;
        block->scratch.o[r * columns + c] +=
            block->scratch.scores[r * kScoreStride + t * core::kTile + j] * v[c];
      }
    }
  }
}

template <class Arch>
__attribute__((flatten, noinline)) void ProcessGroup(Block* block) {
  if (block->tile_count == 0) return;
  MultiplyQueriesByKeys<Arch>(block);
  SoftmaxRows<Arch>(block);
  AddProbabilitiesTimesValues<Arch>(block);
  for (int t = 0; t < block->tile_count; ++t) {
    if (*block->tiles[t].packed.not_finite != 0) AddNonFiniteValues<Arch>(block, t);
  }
  block->tile_count = 0;
}

// Normalises and writes the rows of a block.
template <class Arch>
TANDEM_ISA_INLINE void FinishRows(const Block& block) {
  for (int64_t r = 0; r < block.rows.count; ++r) {
    const Row& row = block.scratch.rows[r];
    FinishRow<Arch>(*block.p, block.s, row.i, row.head, row.m, row.l,
                    block.scratch.o + r * block.layout->v_columns, block.layout->v_columns);
  }
}

template <class Arch>
__attribute__((flatten, noinline)) void RunBlock(Flash* call, const WorkItem& item) {
  const core::Problem& p = *call->problem;
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, item.batch, &status);
  Block block;
  block.p = &p;
  block.layout = &call->layout;
  block.s = s;
  block.rows = MakeRowPairs(p, item.kv_head, item.first, item.count);
  block.packs_itself = PacksItself(p, s);
  if (!block.packs_itself) {
    block.first_tile =
        PackedTileAt(call->layout, call->workspace, item.kv_head, FirstKeyTile(p, s));
  }
  block.tile_count = 0;

  int64_t size = 0;
  LayOutScratch(p, call->layout, block.packs_itself, nullptr, &size);
  char* memory = static_cast<char*>(WorkerScratch(size));
  if (memory == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  block.scratch = LayOutScratch(p, call->layout, block.packs_itself, memory, &size);

  const int64_t padded_rows = core::RoundUp<int64_t>(block.rows.count, kBlockRows);
  for (int64_t r = 0; r < padded_rows; ++r) {
    float* q = block.scratch.q + r * p.qk_dim;
    Row* row = block.scratch.rows + r;
    *row = {PairRow(p, block.rows, r), PairHead(p, block.rows, r), core::NegativeInfinity(), 0.0f,
            1.0f};
    if (r < block.rows.count && core::RowExists(s, row->i)) {
      LoadRow<Arch>(p.q.data, p.dtype, core::QueryOffset(p.q, s, row->head, row->i),
                    p.q.column_stride, p.qk_dim, q);
    } else {
      for (int64_t d = 0; d < p.qk_dim; ++d) q[d] = 0.0f;
    }
    float* o = block.scratch.o + r * call->layout.v_columns;
    for (int64_t c = 0; c < call->layout.v_columns; ++c) o[c] = 0.0f;
  }

  const core::Interval hull = HullForRows(p, s, block.rows);
  for (int64_t tile = hull.begin / core::kTile; tile * core::kTile < hull.end; ++tile) {
    const core::TileClass tile_class = ClassifyForRows(p, s, block.rows, tile);
    if (tile_class == core::TileClass::kEmpty) continue;
    AddTile<Arch>(&block, tile, tile_class);
    if (block.tile_count == kGroupTiles) ProcessGroup<Arch>(&block);
  }
  ProcessGroup<Arch>(&block);
  FinishRows<Arch>(block);
}

// Packs the tiles of places [first, first + kPackTiles) of one key head.
template <class Arch>
__attribute__((flatten, noinline)) void PackPlaces(Flash* call, int64_t kv_head, int64_t first) {
  const core::Problem& p = *call->problem;
  float* scratch = static_cast<float*>(WorkerScratch(4 * PackScratch(p)));
  if (scratch == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const int64_t end = core::Min(first + kPackTiles, call->layout.places);
  for (int64_t place = first; place < end; ++place) {
    const core::Sequence s = SequenceOfPlace(p, place);
    const int64_t tile = place - FirstKeyTile(p, s);
    if (tile * core::kTile >= core::LocalKeys(s) || PacksItself(p, s)) continue;
    PackTile<Arch>(p, s, kv_head, tile, scratch,
                   PackedTileAt(call->layout, call->workspace, kv_head, place));
  }
}

template <class Arch>
void PackTask(void* argument, int64_t index, int /*worker*/) {
  Flash* call = static_cast<Flash*>(argument);
  const int64_t tasks = core::CeilDiv(call->layout.places, kPackTiles);
  PackPlaces<Arch>(call, index / tasks, index % tasks * kPackTiles);
}

template <class Arch>
void BlockTask(void* argument, int64_t index, int /*worker*/) {
  Flash* call = static_cast<Flash*>(argument);
  RunBlock<Arch>(call, call->items[index]);
}

template <class Arch>
tandem_status RunFlash(const core::Problem& p, void* workspace, const core::Context& context) {
  Flash call = {&p, workspace, LayOutWorkspace(p, kLanes<Arch>), nullptr, 0};
  WorkItem* items =
      reinterpret_cast<WorkItem*>(static_cast<char*>(workspace) + call.layout.item_offset);
  call.items = items;
  const int64_t item_count = ListWorkItems(p, kQueryBlock, items);
  WriteRowsOutsideSequences(p);
  ParallelFor(context, p.kv_heads * core::CeilDiv(call.layout.places, kPackTiles), PackTask<Arch>,
              &call);
  if (call.out_of_memory == 0) ParallelFor(context, item_count, BlockTask<Arch>, &call);
  if (call.out_of_memory != 0 ||
      !RunShortSequences<Arch>(p, static_cast<char*>(workspace) + call.layout.split_offset,
                               context)) {
    core::Format(context.error, "out of memory: scratch of a CPU thread");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_
