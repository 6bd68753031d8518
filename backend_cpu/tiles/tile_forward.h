// Attention forward on matrix tiles, written once over a leaf (tiles.h).
//
// A pre-pass packs K and V once per key head. A work item is up to 256 rows of one sequence and key
// head, as sub-blocks of 32. For each chunk of keys that fits in the L2 cache, each sub-block walks
// over the tiles of the chunk that it can see (a tile is a unit). Units form a pipeline: while
// the softmax of one unit runs, the scores of the next one and the product with V of the one before
// are computed between its rows (tile_products.h).
//
// O of a unit is only touched by its own product: what else changes O (moved references, values
// left out) is done between two steps, when the product before is complete and its own is not
// begun.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_FORWARD_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_FORWARD_H_

#include <cstring>
#include <type_traits>

#include "backend_cpu/flash/finish_row.h"
#include "backend_cpu/output_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/split/split_forward.h"
#include "backend_cpu/tiles/tile_pack.h"
#include "backend_cpu/tiles/tile_products.h"
#include "backend_cpu/tiles/tiles.h"
#include "backend_cpu/tiles/unit_passes.h"

namespace tandem::cpu {
namespace {

// One call.
struct TileCall {
  const core::Problem* problem;
  void* workspace;
  TileShape shape;
  TileWorkspace layout;
  const WorkItem* items;
  int32_t out_of_memory;
};

// Units under way: one before the softmax, one in it, one after it.
inline constexpr int64_t kUnits = 3;

inline constexpr int64_t kItemBlocks = kItemRows / kSubRows;

// What a thread works in, and where it is in the item.
struct ItemWalk {
  const TileCall* call;
  core::Sequence s;
  int64_t kv_head;
  KeyTile first_tile;  // of the sequence
  int block_count;
  SubBlock blocks[kItemBlocks];
  core::Interval tiles[kItemBlocks];  // that the block may see
  bool fills_words;

  int64_t chunk_begin, chunk_end;  // tiles
  int64_t last_tile;               // end of the item's tiles
  int block;
  int64_t tile;
  int64_t full_end;  // tiles before it are FULL for the block
};

// Parts of a thread's scratch.
struct ItemScratch {
  uint16_t* q;
  float* o;
  RowState* state;
  float* scores;  // of kUnits units
  uint16_t* p;    // of as many
  float* row;
  int64_t size;
};

TANDEM_HD ItemScratch LayOutItemScratch(const TileShape& shape, int64_t blocks, char* base) {
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* part = base + size;
    size += core::RoundUp<int64_t>(bytes, 64);
    return part;
  };
  ItemScratch scratch = {};
  // What every step touches first: it then lies in few pages.
  scratch.scores = reinterpret_cast<float*>(take(kUnits * 4 * kUnitScores));
  scratch.p = shape.parts <= 2
                  ? reinterpret_cast<uint16_t*>(scratch.scores)
                  : reinterpret_cast<uint16_t*>(take(kUnits * 2 * shape.parts * kUnitScores));
  scratch.state = reinterpret_cast<RowState*>(take(blocks * int64_t{sizeof(RowState)}));
  scratch.q = reinterpret_cast<uint16_t*>(
      take(blocks * 2 * shape.parts * shape.depth_steps * 2 * kRegisterHalves));
  scratch.o = reinterpret_cast<float*>(take(blocks * 4 * shape.column_pairs * 4 * kRegisterFloats));
  scratch.row =
      reinterpret_cast<float*>(take(4 * 32 * core::Max(shape.depth_steps, shape.column_pairs)));
  scratch.size = size;
  return scratch;
}

// The block's first tile in the chunk, and how far all tiles from there on are FULL.
TANDEM_ISA_INLINE void EnterChunk(ItemWalk* walk) {
  const core::Problem& p = *walk->call->problem;
  const core::Interval& tiles = walk->tiles[walk->block];
  const int64_t begin = core::Max(walk->chunk_begin, tiles.begin);
  const int64_t end =
      core::Min(core::Min(walk->chunk_end, tiles.end), core::LocalKeys(walk->s) / core::kTile);
  walk->tile = begin;
  walk->full_end = begin;
  // What these terms say is known from every row and key alone.
  const bool is_costly = p.mask.row_ranges_count > 0 || p.mask.segments_count > 0;
  if (begin < end && !is_costly &&
      ClassifyForRows(p, walk->s, walk->blocks[walk->block].rows, begin, end) ==
          core::TileClass::kFull) {
    walk->full_end = end;
  }
}

// Moves to the next unit of the item; false at its end.
TANDEM_ISA_INLINE bool NextUnit(ItemWalk* walk, Unit* unit) {
  const core::Problem& p = *walk->call->problem;
  const TileShape& shape = walk->call->shape;
  for (;;) {
    if (walk->tile >= core::Min(walk->chunk_end, walk->tiles[walk->block].end)) {
      if (++walk->block == walk->block_count) {
        if (walk->chunk_end >= walk->last_tile) {
          --walk->block;
          return false;
        }
        walk->block = 0;
        walk->chunk_begin = walk->chunk_end;
        walk->chunk_end += shape.chunk_tiles;
      }
      EnterChunk(walk);
      continue;
    }
    const int64_t tile = walk->tile++;
    unit->block = &walk->blocks[walk->block];
    const RowPairs& rows = unit->block->rows;
    const core::TileClass tile_class =
        tile < walk->full_end ? core::TileClass::kFull : ClassifyForRows(p, walk->s, rows, tile);
    if (tile_class == core::TileClass::kEmpty) continue;
    unit->is_masked = tile_class == core::TileClass::kPartial;
    if (unit->is_masked) {
      const SubBlock& block = *unit->block;
      const uint64_t any = block.has_dense_rows ? FillDenseWords(p, walk->s, block.dense_rows,
                                                                 rows.count, tile, unit->words)
                                                : FillWords(p, walk->s, rows, tile, unit->words);
      if (any == 0) continue;
    }
    unit->tile = {walk->first_tile.k + tile * shape.parts * shape.k_part,
                  walk->first_tile.v + tile * shape.parts * shape.v_part,
                  walk->first_tile.notes + tile};
    unit->first_key = tile * core::kTile;
    const bool has_left_out = unit->tile.notes->left_out != 0;
    unit->adds_bias = unit->block->adds_bias && !unit->block->state->is_new && !has_left_out &&
                      unit->first_key + core::kTile <= core::LocalKeys(walk->s);
    if (!unit->is_masked && !unit->adds_bias && (walk->fills_words || has_left_out)) {
      for (int64_t r = 0; r < kSubRows; ++r) unit->words[r] = ~uint64_t{0};
    }
    unit->is_first = unit->block->state->is_new;
    unit->block->state->is_new = false;
    return true;
  }
}

// One step of the pipeline: the softmax of `unit`, between products of its neighbours.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE void RunStep(const TileCall& call, const core::Sequence& s, ScoreFactor factor,
                               int score_products, const Unit* next, const Unit& unit,
                               const Unit* previous, bool is_masked, typename Leaf::Tiles* tiles) {
  const auto step = [&](auto masked, auto adds_bias) __attribute__((always_inline)) {
    Step<Leaf, kParts>(
        call.shape, score_products, next, previous, tiles,
        UnitSoftmax<Leaf, kParts, masked.value, adds_bias.value>(*call.problem, s, unit, factor));
  };
  if (unit.adds_bias) {
    if (unit.is_masked) {
      step(std::true_type(), std::true_type());
    } else {
      step(std::false_type(), std::true_type());
    }
  } else if (is_masked) {
    step(std::true_type(), std::false_type());
  } else {
    step(std::false_type(), std::false_type());
  }
}

// All units of an item.
template <class Leaf, int kParts>
__attribute__((noinline)) void RunUnits(ItemWalk* walk, const ItemScratch& scratch) {
  const TileCall& call = *walk->call;
  const core::Problem& p = *call.problem;
  const ScoreFactor factor = FactorOf(p);
  const bool finishes_scores = NeedsFinishedScores(p);
  const int score_products = ScoreProducts(kParts, p.qk_dim);
  typename Leaf::Tiles tiles;
  Unit units[kUnits];
  const auto ready = [&](Unit* unit) {
    RedoScores(p, walk->s, *unit);
    if (finishes_scores && !unit->adds_bias) {
      FinishUnitScores<typename Leaf::Arch>(p, walk->s, unit);
    }
    if (unit->is_first) FindReferences<Leaf>(*unit, factor, unit->is_masked && !finishes_scores);
  };
  int64_t count = 0;
  const auto take = [&](Unit* unit) {
    unit->scores = scratch.scores + count % kUnits * kUnitScores;
    unit->p = scratch.p + count % kUnits * core::Max(kParts, 2) * kUnitScores;
    ++count;
    return NextUnit(walk, unit);
  };
  Unit* previous = nullptr;
  Unit* unit = &units[0];
  if (!take(unit)) return;
  Step<Leaf, kParts>(call.shape, score_products, unit, static_cast<const Unit*>(nullptr), &tiles,
                     NoWork());
  ready(unit);
  while (unit != nullptr) {
    Unit* next = &units[count % kUnits];
    if (!take(next)) next = nullptr;
    // Finished scores are -inf where invisible.
    RunStep<Leaf, kParts>(call, walk->s, factor, score_products, next, *unit, previous,
                          unit->is_masked && !finishes_scores, &tiles);
    if (unit->block->state->any_rescale) {
      RescaleRows<typename Leaf::Arch>(call.shape, *unit->block);
    }
    if (p.dropout.enabled) DropProbabilities(p, walk->s, kParts, unit);
    AddLeftOutValues(p, walk->s, kParts, *unit);
    if (next != nullptr) ready(next);
    previous = unit;
    unit = next;
  }
  Step<Leaf, kParts>(call.shape, score_products, static_cast<const Unit*>(nullptr), previous,
                     &tiles, NoWork());
}

template <class Leaf>
TANDEM_ISA_INLINE void FinishBlock(const core::Problem& p, const core::Sequence& s,
                                   const TileShape& shape, ScoreFactor factor,
                                   const SubBlock& block, float* o) {
  using V = Vector<typename Leaf::Arch>;
  const int64_t columns = 32 * shape.column_pairs;
  for (int64_t r = 0; r < block.rows.count; ++r) {
    const float* from = block.o + OutputRow(r);
    V sum(0.0f);
    for (int64_t c = 0; c < 16; c += kLanes<typename Leaf::Arch>) {
      sum = sum + V::load_aligned(block.state->sum[r] + c);
    }
    for (int64_t c = 0; c < columns; c += kLanes<typename Leaf::Arch>) {
      V::load_aligned(from + c / 16 * kOutputGroupStride + c % 16).store_aligned(o + c);
    }
    FinishRow<typename Leaf::Arch>(p, s, PairRow(p, block.rows, r), PairHead(p, block.rows, r),
                                   block.state->reference[r] * factor.to_score, Sum(sum), o,
                                   columns);
  }
}

template <class Leaf, int kParts>
__attribute__((flatten, noinline)) void StartBlock(const core::Problem& p, const core::Sequence& s,
                                                   const TileShape& shape, float* row,
                                                   SubBlock* block) {
  std::memset(block->q, 0, 2 * kParts * shape.depth_steps * 2 * kRegisterHalves);
  std::memset(block->o, 0, 4 * shape.column_pairs * 4 * kRegisterFloats);
  block->careful_rows = 0;
  block->state->any_rescale = false;
  block->state->is_new = true;
  for (int64_t r = 0; r < kSubRows; ++r) {
    StartRow(block->state, r);
    const int64_t i = PairRow(p, block->rows, r);
    if (r >= block->rows.count || !core::RowExists(s, i)) continue;
    const int64_t q = core::QueryOffset(p.q, s, PairHead(p, block->rows, r), i);
    if (!PackQueryRow<Leaf, kParts>(p, shape, q, r, row, block->q)) {
      block->careful_rows |= uint32_t{1} << r;
    }
  }
}

template <class Leaf, int kParts>
void RunItem(TileCall* call, const WorkItem& item) {
  const core::Problem& p = *call->problem;
  const TileShape& shape = call->shape;
  const int64_t blocks = core::CeilDiv(item.count, kSubRows);
  char* memory = static_cast<char*>(WorkerScratch(LayOutItemScratch(shape, blocks, nullptr).size));
  if (memory == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const ItemScratch scratch = LayOutItemScratch(shape, blocks, memory);
  int32_t status = 0;
  ItemWalk walk;
  walk.call = call;
  walk.s = core::ResolveSequence(p, item.batch, &status);
  walk.kv_head = item.kv_head;
  walk.first_tile =
      KeyTileAt(shape, call->layout, call->workspace, item.kv_head, FirstKeyTile(p, walk.s));
  walk.fills_words = NeedsFinishedScores(p) || p.dropout.enabled;
  const bool adds_bias = AddsBias(p) && !p.dropout.enabled;
  walk.block_count = static_cast<int>(blocks);
  int64_t first_tile = INT64_MAX, last_tile = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    SubBlock& block = walk.blocks[b];
    block.rows = MakeRowPairs(p, item.kv_head, item.first + b * kSubRows,
                              core::Min(kSubRows, item.count - b * kSubRows));
    block.q = scratch.q + b * kParts * shape.depth_steps * 2 * kRegisterHalves;
    block.o = scratch.o + b * shape.column_pairs * 4 * kRegisterFloats;
    block.state = scratch.state + b;
    StartBlock<Leaf, kParts>(p, walk.s, shape, scratch.row, &block);
    block.has_dense_rows = IsAlignedDense(p.mask, walk.s);
    if (block.has_dense_rows) block.dense_rows = FindDenseRows(p, walk.s, block.rows);
    block.adds_bias = adds_bias && core::RowExists(walk.s, block.rows.i_end - 1);
    for (int64_t r = 0; r < block.rows.count && block.adds_bias; ++r) {
      block.bias[r] =
          core::BiasOffset(p.bias, walk.s, PairHead(p, block.rows, r),
                           walk.s.q_offset + PairRow(p, block.rows, r), walk.s.kv_offset);
    }
    const core::Interval hull = HullForRows(p, walk.s, block.rows);
    walk.tiles[b] = {hull.begin / core::kTile,
                     core::CeilDiv<int64_t>(core::Max(hull.begin, hull.end), core::kTile)};
    if (hull.begin >= hull.end) continue;
    first_tile = core::Min(first_tile, walk.tiles[b].begin);
    last_tile = core::Max(last_tile, walk.tiles[b].end);
  }
  if (first_tile < last_tile) {
    // Chunks are cut from the sequence's beginning, whatever the item is.
    walk.chunk_begin = first_tile - first_tile % shape.chunk_tiles;
    walk.chunk_end = walk.chunk_begin + shape.chunk_tiles;
    walk.last_tile = last_tile;
    walk.block = 0;
    EnterChunk(&walk);
    RunUnits<Leaf, kParts>(&walk, scratch);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    FinishBlock<Leaf>(p, walk.s, shape, FactorOf(p), walk.blocks[b], scratch.row);
  }
}

template <class Leaf>
void ItemTask(void* argument, int64_t index, int /*worker*/) {
  TileCall* call = static_cast<TileCall*>(argument);
  const WorkItem& item = call->items[index];
  if (call->shape.parts == 1) {
    RunItem<Leaf, 1>(call, item);
  } else if (call->shape.parts == 2) {
    RunItem<Leaf, 2>(call, item);
  } else {
    RunItem<Leaf, 3>(call, item);
  }
}

// Tiles of one task of the pre-pass.
inline constexpr int64_t kPackedTilesPerTask = 4;

template <class Leaf, int kParts>
__attribute__((flatten, noinline)) void PackPlace(const TileCall& call, int64_t kv_head,
                                                  int64_t place, float* scratch) {
  const core::Problem& p = *call.problem;
  const core::Sequence s = SequenceOfPlace(p, place);
  const int64_t tile = place - FirstKeyTile(p, s);
  if (tile * core::kTile >= core::LocalKeys(s) || IsShort(p, s)) return;
  PackTileParts<Leaf, kParts>(p, s, call.shape, kv_head, tile, scratch,
                              KeyTileAt(call.shape, call.layout, call.workspace, kv_head, place));
}

template <class Leaf>
void PackTilesTask(void* argument, int64_t index, int /*worker*/) {
  TileCall* call = static_cast<TileCall*>(argument);
  float* scratch = static_cast<float*>(WorkerScratch(TilePackScratch(call->shape)));
  if (scratch == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const int64_t tasks = core::CeilDiv(call->layout.places, kPackedTilesPerTask);
  const int64_t first = index % tasks * kPackedTilesPerTask;
  const int64_t end = core::Min(first + kPackedTilesPerTask, call->layout.places);
  for (int64_t place = first; place < end; ++place) {
    if (call->shape.parts == 1) {
      PackPlace<Leaf, 1>(*call, index / tasks, place, scratch);
    } else if (call->shape.parts == 2) {
      PackPlace<Leaf, 2>(*call, index / tasks, place, scratch);
    } else {
      PackPlace<Leaf, 3>(*call, index / tasks, place, scratch);
    }
  }
}

template <class Leaf>
tandem_status RunTiles(const core::Problem& p, void* workspace, const core::Context& context) {
  TileCall call = {&p, workspace, ShapeOf(p), {}, nullptr, 0};
  call.layout = LayOutTileWorkspace(p, call.shape);
  WorkItem* items =
      reinterpret_cast<WorkItem*>(static_cast<char*>(workspace) + call.layout.item_offset);
  call.items = items;
  // Smaller items even out cores that others slow down; of several parts, each loads more again.
  const int64_t items_per_worker = call.shape.parts == 1 ? 8 : 4;
  const int64_t wanted = items_per_worker * WorkerCount(context, INT64_MAX);
  int64_t item_rows = kItemRows;
  while (item_rows > kSmallItemRows && WorkItemCapacity(p, item_rows) < wanted) item_rows /= 2;
  const int64_t item_count = ListWorkItems(p, item_rows, items);

  WriteRowsOutsideSequences(p);
  const int64_t pack_tasks = core::CeilDiv(call.layout.places, kPackedTilesPerTask);
  int64_t first[kMaxWorkers + 1];
  const int64_t pack_count = p.kv_heads * pack_tasks;
  const int64_t pack_workers = WorkerCount(context, pack_count);
  for (int64_t w = 0; w <= pack_workers; ++w) first[w] = w * pack_count / pack_workers;
  ParallelForNear(context, pack_count, first, PackTilesTask<Leaf>, &call);
  if (call.out_of_memory == 0) {
    ShareWorkItems(WorkerCount(context, item_count), items, item_count, first);
    ParallelForNear(context, item_count, first, ItemTask<Leaf>, &call);
  }
  if (call.out_of_memory != 0 ||
      !RunShortSequences<typename Leaf::Arch>(
          p, static_cast<char*>(workspace) + call.layout.split_offset, context)) {
    core::Format(context.error, "out of memory: scratch of a CPU thread");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_FORWARD_H_
