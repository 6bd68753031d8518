// flash_cpu_backward, written once over a multiplier, which packs operands and computes the
// products of a pair of tiles: panel_multiplier.h in f32, tile_multiplier.h by matrix tiles.
//
// A plane (plane.h) is packed once, its pairs of tiles are visited once, and its sums are written
// out. For a pair of tiles: S = Q K^T and dP = dO V^T, then P and dS in place (tile_pair.h), then
// dV += P^T dO, dK += dS^T Q, dQ += dS K. Empty tiles are skipped; of a partial tile only the
// rectangle of rows and keys that sees anything is worked on.
//
// With many planes each is one task. With few, the blocks of a plane are tasks too, phase by phase.
// Both take every sum in the same order, so the bits do not depend on which it was.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_FLASH_BACKWARD_H_
#define TANDEM_BACKEND_CPU_BACKWARD_FLASH_BACKWARD_H_

#include "backend_cpu/backward/corrections.h"
#include "backend_cpu/backward/pack_tiles.h"
#include "backend_cpu/backward/write_gradients.h"
#include "backend_cpu/gradient_rows.h"
#include "backend_cpu/parallel.h"

namespace tandem::cpu {
namespace {

// One call.
struct Backward {
  const core::Problem* p;
  void* workspace;
  PlaneLayout layout;
  int32_t out_of_memory;
};

struct ThreadScratch {
  PairScratch* pair;
  void* multiplier;
  float* rows;  // 65 of RowScratchStride
};
template <class Multiplier>
TANDEM_ISA_INLINE bool GetScratch(Backward* call, ThreadScratch* scratch) {
  const core::Problem& p = *call->p;
  const int64_t multiplier = core::RoundUp<int64_t>(sizeof(PairScratch), 64);
  const int64_t rows = multiplier + core::RoundUp<int64_t>(Multiplier::ScratchBytes(p), 64);
  char* memory =
      static_cast<char*>(WorkerScratch(rows + 4 * (core::kTile + 1) * RowScratchStride(p)));
  if (memory == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return false;
  }
  *scratch = {reinterpret_cast<PairScratch*>(memory), memory + multiplier,
              reinterpret_cast<float*>(memory + rows)};
  return true;
}

template <class Multiplier>
__attribute__((flatten, noinline)) void RunTilePair(const TilePair& pair, Multiplier* multiplier) {
  multiplier->Multiply(pair);
  if (pair.left_out) CorrectProducts(pair);
  multiplier->EvaluateAndAdd(pair);
  if (pair.left_out) {
    multiplier->Finish();
    CorrectSums<Multiplier>(pair);
  }
}

// Key block n with query block m.
template <class Multiplier>
TANDEM_ISA_INLINE void RunBlocks(const Plane& plane, int64_t n, int64_t m,
                                 const ThreadScratch& scratch) {
  Multiplier multiplier(scratch.multiplier);
  const int64_t q_end = core::Min((m + 1) * kBlockTiles, plane.q_tiles);
  const int64_t kv_end = core::Min((n + 1) * kBlockTiles, plane.kv_tiles);
  for (int64_t q_tile = m * kBlockTiles; q_tile < q_end; ++q_tile) {
    TilePair pair;
    pair.plane = &plane;
    pair.rows = QueryTileAt(plane, q_tile);
    pair.q_tile = q_tile;
    pair.scratch = scratch.pair;
    const core::Interval hull = core::VisibleKeyHull(
        plane.p->mask, plane.s, pair.rows.head, pair.rows.first, pair.rows.first + pair.rows.count);
    for (int64_t kv_tile = n * kBlockTiles; kv_tile < kv_end; ++kv_tile) {
      pair.kv_tile = kv_tile;
      pair.first_key = kv_tile * core::kTile;
      if (pair.first_key >= hull.end || pair.first_key + core::kTile <= hull.begin) continue;
      if (FindVisible(&pair)) RunTilePair(pair, &multiplier);
    }
  }
  multiplier.Finish();
}

TANDEM_HD int64_t KeyTilesOfTensors(const Plane& plane) {
  return core::CeilDiv<int64_t>(plane.s.kv_rows, core::kTile);
}

// All pairs of blocks, two phases at a time: a block of keys meets one block of rows and the next,
// and each of those meets the key block before right after, so that blocks are taken from the
// cache. (n, t + 1) comes after (n, t) and after (n + 1, t), which is the order of phases for every
// sum.
template <class Multiplier>
TANDEM_ISA_INLINE void VisitPlane(const Plane& plane, const ThreadScratch& scratch) {
  const int64_t phases = Phases(plane);
  for (int64_t phase = 0; phase < phases; phase += 2) {
    for (int64_t k = 0; k <= phases; ++k) {
      // From the last key block down, and again the last, whose second phase waited for block 0.
      const int64_t n = (2 * phases - 1 - k) % phases;
      const int64_t begin = phase + (k == phases ? 1 : 0);
      const int64_t end = core::Min(phase + (k == 0 ? 1 : 2), phases);
      for (int64_t t = begin; t < end && n < KeyBlocks(plane); ++t) {
        RunBlocks<Multiplier>(plane, n, (n + t) % phases, scratch);
      }
    }
  }
}

// A whole plane by one thread.
template <class Multiplier>
TANDEM_ISA_INLINE void RunPlane(Backward* call, int64_t index, int64_t slot) {
  ThreadScratch scratch;
  if (!GetScratch<Multiplier>(call, &scratch)) return;
  const Plane plane = MakePlane(*call->p, call->layout, index, slot, call->workspace);
  for (int64_t t = 0; t < plane.q_tiles; ++t) {
    PackQueryTile<Multiplier>(plane, t, scratch.rows, scratch.multiplier);
  }
  for (int64_t t = 0; t < plane.kv_tiles; ++t) {
    PackKeyTile<Multiplier>(plane, t, scratch.rows, scratch.multiplier);
  }
  VisitPlane<Multiplier>(plane, scratch);
  if (call->p->dq.data != nullptr) {
    for (int64_t t = 0; t < plane.q_tiles; ++t) WriteQueryTile<Multiplier>(plane, t, scratch.rows);
  }
  for (int64_t t = 0; t < KeyTilesOfTensors(plane); ++t) {
    WriteKeyTile<Multiplier>(plane, t, scratch.rows);
  }
  SumRows(plane, call->workspace);
}

// Planes that may be in work at once: none of them shares an element of dBias with another.
struct Round {
  int64_t batch_begin, batch_end;
  int64_t head_begin, head_end;  // key heads
  int64_t count() const { return (batch_end - batch_begin) * (head_end - head_begin); }
};
TANDEM_HD int64_t PlaneOfRound(const core::Problem& p, const Round& round, int64_t n) {
  const int64_t heads = round.head_end - round.head_begin;
  return (round.batch_begin + n / heads) * p.kv_heads + round.head_begin + n % heads;
}

template <class Multiplier>
struct PlaneLoop {
  Backward* call;
  Round round;
  static void Task(void* argument, int64_t index, int worker) {
    auto* loop = static_cast<PlaneLoop*>(argument);
    RunPlane<Multiplier>(loop->call, PlaneOfRound(*loop->call->p, loop->round, index), worker);
  }
};

// A step of planes [first, first + slots) of a round, cut into tasks of (plane, part).
template <class Multiplier>
struct PartLoop {
  Backward* call;
  Round round;
  int64_t first;
  int64_t parts;
  int64_t phase;

  Plane PlaneAt(int64_t slot) const {
    return MakePlane(*call->p, call->layout, PlaneOfRound(*call->p, round, first + slot), slot,
                     call->workspace);
  }
  static void Pack(void* argument, int64_t index, int) {
    auto* loop = static_cast<PartLoop*>(argument);
    ThreadScratch scratch;
    if (!GetScratch<Multiplier>(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t tile = index % loop->parts;
    if (tile < plane.q_tiles)
      PackQueryTile<Multiplier>(plane, tile, scratch.rows, scratch.multiplier);
    if (tile < plane.kv_tiles)
      PackKeyTile<Multiplier>(plane, tile, scratch.rows, scratch.multiplier);
  }
  static void Visit(void* argument, int64_t index, int) {
    auto* loop = static_cast<PartLoop*>(argument);
    ThreadScratch scratch;
    if (!GetScratch<Multiplier>(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t n = index % loop->parts, phases = Phases(plane);
    if (n >= KeyBlocks(plane) || loop->phase >= phases) return;
    RunBlocks<Multiplier>(plane, n, (n + loop->phase) % phases, scratch);
  }
  static void Write(void* argument, int64_t index, int) {
    auto* loop = static_cast<PartLoop*>(argument);
    ThreadScratch scratch;
    if (!GetScratch<Multiplier>(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t tile = index % loop->parts;
    if (tile < plane.q_tiles && loop->call->p->dq.data != nullptr) {
      WriteQueryTile<Multiplier>(plane, tile, scratch.rows);
    }
    if (tile < KeyTilesOfTensors(plane)) WriteKeyTile<Multiplier>(plane, tile, scratch.rows);
    if (tile == 0) SumRows(plane, loop->call->workspace);
  }
};

template <class Multiplier>
void RunRound(Backward* call, const Round& round, const core::Context& context) {
  const PlaneLayout& w = call->layout;
  const int workers = WorkerCount(context, round.count());
  if (workers <= w.slots &&
      (workers == 1 ? WorkerCount(context, INT64_MAX) == 1 : round.count() >= 2 * workers)) {
    PlaneLoop<Multiplier> loop = {call, round};
    ParallelFor(context, round.count(), PlaneLoop<Multiplier>::Task, &loop);
    return;
  }
  int64_t first_task[kMaxWorkers + 1];
  for (int64_t first = 0; first < round.count(); first += w.slots) {
    const int64_t planes = core::Min(w.slots, round.count() - first);
    const int64_t tiles = core::Max<int64_t>(core::Max(w.q_tiles, w.kv_tiles), 1);
    PartLoop<Multiplier> loop = {call, round, first, tiles, 0};
    // A worker begins with the same part of the planes in every step: what it packed and summed is
    // still in its cache.
    const auto run = [&](int64_t tasks, void (*task)(void*, int64_t, int)) {
      const int64_t task_workers = WorkerCount(context, tasks);
      for (int64_t n = 0; n <= task_workers; ++n) first_task[n] = n * tasks / task_workers;
      ParallelForNear(context, tasks, first_task, task, &loop);
    };
    run(planes * tiles, PartLoop<Multiplier>::Pack);
    loop.parts = core::CeilDiv(w.kv_tiles, kBlockTiles);
    const int64_t phases = core::Max(loop.parts, core::CeilDiv(w.q_tiles, kBlockTiles));
    for (; loop.phase < phases; ++loop.phase) {
      run(planes * loop.parts, PartLoop<Multiplier>::Visit);
    }
    loop.parts = tiles;
    run(planes * tiles, PartLoop<Multiplier>::Write);
  }
}

template <class Multiplier>
tandem_status RunBackward(const core::Problem& p, void* workspace, const core::Context& context) {
  Backward call = {&p, workspace, LayOutPlanes(p, Multiplier::Sizes(p)), 0};
  const bool has_bias = p.dbias.data != nullptr;
  if (has_bias) ZeroBias(p, context);
  const int64_t batches = has_bias && p.dbias.batch_stride == 0 ? p.batch : 1;
  const int64_t heads = has_bias && p.dbias.head_stride == 0 ? p.kv_heads : 1;
  for (int64_t n = 0; n < batches * heads && call.out_of_memory == 0; ++n) {
    const int64_t b = n / heads, h = n % heads;
    const Round round = {batches == 1 ? 0 : b, batches == 1 ? p.batch : b + 1, heads == 1 ? 0 : h,
                         heads == 1 ? p.kv_heads : h + 1};
    RunRound<Multiplier>(&call, round, context);
  }
  if (call.out_of_memory != 0) {
    core::Format(context.error, "out of memory: scratch of a CPU thread");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  WriteHeadSums(p, call.layout, workspace);
  WriteGradientsOutsideSequences(p);
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_FLASH_BACKWARD_H_
