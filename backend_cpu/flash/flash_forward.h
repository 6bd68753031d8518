// flash_cpu forward, written once over an xsimd arch.
//
// A pre-pass packs K and V once per key head (pack.h), but for sequences of a single query block,
// which packs its tiles itself. Then every query block - rows of one sequence and the heads that
// share a key head - walks over the tiles of 64 keys that it can see, kGroupTiles at a time: S = Q
// K^T, softmax (softmax_rows.h), O = rescale * O + P V. Empty tiles are skipped, and in partial
// tiles also the register blocks of rows that see none of it.
//
// Blocks are cut by the sequence's own rows, and every row is computed in an order that its
// sequence and mask alone decide: its bits do not depend on threads or batch mates.
#ifndef TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_
#define TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_

#include "backend_cpu/flash/block.h"
#include "backend_cpu/flash/layout.h"
#include "backend_cpu/flash/micro_kernel.h"
#include "backend_cpu/flash/output.h"
#include "backend_cpu/flash/pack.h"
#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/parallel.h"

namespace tandem::cpu {
namespace {

// Tiles of one task of the pre-pass.
inline constexpr int64_t kPackTiles = 4;

// One call.
struct Flash {
  const core::Problem* problem;
  void* workspace;
  WorkspaceLayout layout;
  int32_t out_of_memory;
};

template <class Arch>
TANDEM_ISA_INLINE void MultiplyQueriesByKeys(Block* block) {
  const int64_t depth = block->p->qk_dim;
  for (int t = 0; t < block->tile_count; ++t) {
    const GroupTile& tile = block->tiles[t];
    for (int64_t panel = 0; panel < core::kTile; panel += kPanelWidth<Arch>) {
      const Segment segment = {0, tile.packed.k + panel * depth};
      for (int b = 0; b < kRowBlocks; ++b) {
        if (((tile.active >> b) & 1u) == 0) continue;
        const int64_t r = int64_t{b} * kBlockRows;
        MultiplyPanel<Arch>(
            kPanelVectors<Arch>, block->scratch.q + r * depth, depth, &segment, 1, depth, false,
            block->scratch.scores + r * kScoreStride + t * core::kTile + panel, kScoreStride);
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
    if (((tile.active >> row_block) & 1u) == 0) continue;
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
  for (int64_t r = 0; r < block->row_count; ++r) {
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
        if (((tile.active >> b) & 1u) == 0) continue;
        segments[count++] = {t * core::kTile, tile.packed.v + panel * core::kTile};
      }
      if (count == 0) continue;
      const int64_t r = int64_t{b} * kBlockRows;
      MultiplyPanel<Arch>(static_cast<int>(width / kLanes<Arch>),
                          block->scratch.scores + r * kScoreStride, kScoreStride, segments, count,
                          core::kTile, true, block->scratch.o + r * columns + panel, columns);
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
    LoadRow<Arch>(p.v.data, p.dtype, core::KeyOffset(p.v, block->s, block->kv_head, first + j),
                  p.v.column_stride, p.v_dim, v);
    for (int64_t c = 0; c < p.v_dim; ++c) {
      if (core::IsFinite(v[c])) continue;
      for (int64_t r = 0; r < block->row_count; ++r) {
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
TANDEM_ISA_INLINE void FinishBlock(const Block& block) {
  const core::Problem& p = *block.p;
  for (int64_t r = 0; r < block.row_count; ++r) {
    Row row = block.scratch.rows[r];
    float* o = block.scratch.o + r * block.layout->v_columns;
    const bool is_empty = core::SoftmaxRowIsEmpty(row.m, row.l);
    float rescale = 1.0f;
    if (p.sink != nullptr && core::RowExists(block.s, row.i)) {
      core::SoftmaxAddSink(p.sink[row.head * p.sink_stride], &row.m, &row.l, &rescale);
    }
    const float factor =
        rescale * core::SoftmaxInverse(row.l) * (p.dropout.enabled ? p.dropout.keep_scale : 1.0f);
    for (int64_t c = 0; c < block.layout->v_columns; c += kLanes<Arch>) {
      // + 0 turns -0 into +0: an invisible pair adds +0 or -0 by the sign of a value that must not
      // matter.
      const Vector<Arch> x = Vector<Arch>::load_aligned(o + c) + Vector<Arch>(0.0f);
      (is_empty ? Vector<Arch>(0.0f) : x * Vector<Arch>(factor)).store_aligned(o + c);
    }
    const int64_t row_index = block.s.q_start + row.i;
    StoreRow(p.out.data, p.out.dtype,
             block.s.batch * p.out.batch_stride + row.head * p.out.head_stride +
                 row_index * p.out.row_stride,
             p.out.column_stride, p.v_dim, o);
    if (p.lse.data != nullptr) {
      core::StoreFloat(p.lse.data, core::DType::kF32,
                       block.s.batch * p.lse.batch_stride + row.head * p.lse.head_stride +
                           row_index * p.lse.row_stride,
                       core::SoftmaxLse(row.m, row.l));
    }
  }
}

// Query rows [first, first + kQueryBlock) of the (row, head of the group) pairs of one sequence.
template <class Arch>
__attribute__((flatten, noinline)) void RunBlock(Flash* call, const core::Sequence& s,
                                                 int64_t kv_head, int64_t first) {
  const core::Problem& p = *call->problem;
  Block block;
  block.p = &p;
  block.layout = &call->layout;
  block.s = s;
  block.kv_head = kv_head;
  block.row_count = core::Min(kQueryBlock, s.q_rows * p.group - first);
  block.i_begin = first / p.group;
  block.i_end = (first + block.row_count - 1) / p.group + 1;
  block.mask_heads = core::MaskVariesByHead(p.mask) ? p.group : 1;
  block.packs_itself = PacksItself(p, s);
  if (!block.packs_itself) {
    block.first_tile = PackedTileAt(call->layout, call->workspace, kv_head, FirstKeyTile(p, s));
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

  const int64_t padded_rows = core::RoundUp<int64_t>(block.row_count, kBlockRows);
  for (int64_t r = 0; r < padded_rows; ++r) {
    float* q = block.scratch.q + r * p.qk_dim;
    Row* row = block.scratch.rows + r;
    *row = {(first + r) / p.group, kv_head * p.group + (first + r) % p.group,
            core::NegativeInfinity(), 0.0f, 1.0f};
    if (r < block.row_count && core::RowExists(s, row->i)) {
      LoadRow<Arch>(p.q.data, p.dtype, core::QueryOffset(p.q, s, row->head, row->i),
                    p.q.column_stride, p.qk_dim, q);
    } else {
      for (int64_t d = 0; d < p.qk_dim; ++d) q[d] = 0.0f;
    }
    float* o = block.scratch.o + r * call->layout.v_columns;
    for (int64_t c = 0; c < call->layout.v_columns; ++c) o[c] = 0.0f;
  }

  const core::Interval hull = HullForBlock(block);
  for (int64_t tile = hull.begin / core::kTile; tile * core::kTile < hull.end; ++tile) {
    const core::TileClass tile_class = ClassifyForBlock(block, tile);
    if (tile_class == core::TileClass::kEmpty) continue;
    AddTile<Arch>(&block, tile, tile_class);
    if (block.tile_count == kGroupTiles) ProcessGroup<Arch>(&block);
  }
  ProcessGroup<Arch>(&block);
  FinishBlock<Arch>(block);
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
    const core::Sequence s = SequenceOfPlace(p, place, FirstKeyTile);
    const int64_t tile = place - FirstKeyTile(p, s);
    if (tile * core::kTile >= core::LocalKeys(s) || PacksItself(p, s)) continue;
    PackTile<Arch>(p, s, kv_head, tile, scratch,
                   PackedTileAt(call->layout, call->workspace, kv_head, place));
  }
}

// Packed tensors: rows of one head that belong to no sequence are empty rows.
TANDEM_ISA_INLINE void WriteRowsOfNoSequence(const core::Problem& p, int64_t head) {
  const int64_t begin = core::Clamp<int64_t>(core::LoadIndex(p.cu_seqlens_q, 0), 0, p.q_total);
  const int64_t end =
      core::Clamp<int64_t>(core::LoadIndex(p.cu_seqlens_q, p.batch), begin, p.q_total);
  for (int64_t row = 0; row < p.q_total; ++row) {
    if (row == begin) row = end;
    if (row == p.q_total) break;
    const int64_t out = head * p.out.head_stride + row * p.out.row_stride;
    for (int64_t c = 0; c < p.v_dim; ++c) {
      core::StoreFloat(p.out.data, p.out.dtype, out + c * p.out.column_stride, 0.0f);
    }
    if (p.lse.data != nullptr) {
      core::StoreFloat(p.lse.data, core::DType::kF32,
                       head * p.lse.head_stride + row * p.lse.row_stride, core::NegativeInfinity());
    }
  }
}

template <class Arch>
void PackTask(void* argument, int64_t index, int /*worker*/) {
  Flash* call = static_cast<Flash*>(argument);
  const int64_t tasks = core::CeilDiv(call->layout.places, kPackTiles);
  PackPlaces<Arch>(call, index / tasks, index % tasks * kPackTiles);
}

// Blocks of one key head after another, so that its keys stay in cache; within a head the last
// block first, which sees the most keys where the mask is causal.
template <class Arch>
void BlockTask(void* argument, int64_t index, int /*worker*/) {
  Flash* call = static_cast<Flash*>(argument);
  const core::Problem& p = *call->problem;
  const int64_t places = QueryBlockPlaces(p);
  if (index >= p.kv_heads * places) {
    WriteRowsOfNoSequence(p, index - p.kv_heads * places);
    return;
  }
  const int64_t place = places - 1 - index % places;
  const core::Sequence s = SequenceOfPlace(p, place, FirstQueryBlock);
  const int64_t first = (place - FirstQueryBlock(p, s)) * kQueryBlock;
  if (first < s.q_rows * p.group) RunBlock<Arch>(call, s, index / places, first);
}

template <class Arch>
tandem_status RunFlash(const core::Problem& p, void* workspace, const core::Context& context) {
  Flash call = {&p, workspace, LayOutWorkspace(p, kLanes<Arch>), 0};
  ParallelFor(context, p.kv_heads * core::CeilDiv(call.layout.places, kPackTiles), PackTask<Arch>,
              &call);
  if (call.out_of_memory == 0) {
    const int64_t edges = core::IsPacked(p) ? p.q_heads : 0;
    ParallelFor(context, p.kv_heads * QueryBlockPlaces(p) + edges, BlockTask<Arch>, &call);
  }
  if (call.out_of_memory != 0) {
    core::Format(context.error, "out of memory: scratch of a CPU thread");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_FLASH_FORWARD_H_
