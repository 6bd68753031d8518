// flash_cpu_backward, written once over an xsimd arch.
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
#include "backend_cpu/backward/plane.h"
#include "backend_cpu/backward/tile_pair.h"
#include "backend_cpu/flash/output.h"
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

TANDEM_HD int64_t BackwardScratchBytes(const core::Problem& p) {
  return core::RoundUp<int64_t>(sizeof(PairScratch), 64) +
         4 * (core::kTile + 1) * RowScratchStride(p);
}

struct ThreadScratch {
  PairScratch* pair;
  float* rows;  // 65 of RowScratchStride
};
TANDEM_ISA_INLINE bool GetScratch(Backward* call, ThreadScratch* scratch) {
  char* memory = static_cast<char*>(WorkerScratch(BackwardScratchBytes(*call->p)));
  if (memory == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return false;
  }
  scratch->pair = reinterpret_cast<PairScratch*>(memory);
  scratch->rows =
      reinterpret_cast<float*>(memory + core::RoundUp<int64_t>(sizeof(PairScratch), 64));
  return true;
}

// products = rows of a query tile (in panels of columns) times keys (in panels of keys).
template <class Arch>
TANDEM_ISA_INLINE void MultiplyRowsByKeys(const TilePair& pair, const float* rows, int64_t columns,
                                          const float* keys, int64_t dim, float* products) {
  constexpr int64_t kWidth = kPanelWidth<Arch>;
  constexpr int kMostParts = 512 / kWidth;
  Part parts[kMostParts];
  for (int64_t j = pair.key_begin / kWidth * kWidth; j < pair.key_end; j += kWidth) {
    int count = 0;
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t width = core::Min<int64_t>(kWidth, columns - d);
      parts[count++] = {rows + d * core::kTile, width, keys + j * dim + d * kWidth,
                        core::Min<int64_t>(kWidth, dim - d)};
    }
    Product<Arch, false>(kPanelVectors<Arch>, parts, count, pair.row_begin, pair.row_end, false,
                         products + j, core::kTile);
  }
}

// sums (of keys) += factors^T rows.
template <class Arch>
TANDEM_ISA_INLINE void AddToKeys(const TilePair& pair, const float* factors, const float* rows,
                                 int64_t columns, float* sums) {
  for (int64_t panel = 0; panel < columns; panel += kPanelWidth<Arch>) {
    const int64_t width = core::Min<int64_t>(kPanelWidth<Arch>, columns - panel);
    const Part part = {factors + pair.row_begin * core::kTile, core::kTile,
                       rows + panel * core::kTile + pair.row_begin * width,
                       pair.row_end - pair.row_begin};
    Product<Arch, true>(static_cast<int>(width / kLanes<Arch>), &part, 1, pair.key_begin,
                        pair.key_end, true, sums + panel, columns);
  }
}

// sums (of rows) += factors keys.
template <class Arch>
TANDEM_ISA_INLINE void AddToRows(const TilePair& pair, const float* factors, const float* keys,
                                 int64_t columns, float* sums) {
  for (int64_t panel = 0; panel < columns; panel += kPanelWidth<Arch>) {
    const int64_t width = core::Min<int64_t>(kPanelWidth<Arch>, columns - panel);
    const Part part = {factors + pair.key_begin, core::kTile,
                       keys + panel * core::kTile + pair.key_begin * width,
                       pair.key_end - pair.key_begin};
    Product<Arch, false>(static_cast<int>(width / kLanes<Arch>), &part, 1, pair.row_begin,
                         pair.row_end, true, sums + panel, columns);
  }
}

template <class Arch>
__attribute__((flatten, noinline)) void RunTilePair(const TilePair& pair) {
  const Plane& plane = *pair.plane;
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  PairScratch* scratch = pair.scratch;
  const float* q = TileOf(plane, w.q, pair.q_tile, w.qk_columns);
  const float* dout = TileOf(plane, w.dout, pair.q_tile, w.v_columns);
  MultiplyRowsByKeys<Arch>(pair, q, w.qk_columns, plane.slot + w.k_keys + pair.first_key * p.qk_dim,
                           p.qk_dim, scratch->p);
  MultiplyRowsByKeys<Arch>(pair, dout, w.v_columns,
                           plane.slot + w.v_keys + pair.first_key * p.v_dim, p.v_dim, scratch->ds);
  const QueryWords& query_words = *QueryWordsOf(plane, pair.q_tile);
  const KeyWords& key_words = *KeyWordsOf(plane, pair.kv_tile);
  const bool not_finite = (query_words.q_not_finite | query_words.dout_not_finite |
                           key_words.k_not_finite | key_words.v_not_finite) != 0;
  if (not_finite) CorrectProducts(pair);
  EvaluatePairs<Arch>(pair);
  if (p.dv.data != nullptr) {
    AddToKeys<Arch>(pair, scratch->p, dout, w.v_columns,
                    TileOf(plane, w.dv, pair.kv_tile, w.v_columns));
  }
  if (p.dk.data != nullptr) {
    AddToKeys<Arch>(pair, scratch->ds, q, w.qk_columns,
                    TileOf(plane, w.dk, pair.kv_tile, w.qk_columns));
  }
  if (p.dq.data != nullptr) {
    AddToRows<Arch>(pair, scratch->ds, TileOf(plane, w.k_columns, pair.kv_tile, w.qk_columns),
                    w.qk_columns, TileOf(plane, w.dq, pair.q_tile, w.qk_columns));
  }
  if (not_finite) CorrectSums(pair);
}

// Key block n with query block m.
template <class Arch>
TANDEM_ISA_INLINE void RunBlocks(const Plane& plane, int64_t n, int64_t m, PairScratch* scratch) {
  const int64_t q_end = core::Min((m + 1) * kBlockTiles, plane.q_tiles);
  const int64_t kv_end = core::Min((n + 1) * kBlockTiles, plane.kv_tiles);
  for (int64_t q_tile = m * kBlockTiles; q_tile < q_end; ++q_tile) {
    TilePair pair;
    pair.plane = &plane;
    pair.rows = QueryTileAt(plane, q_tile);
    pair.q_tile = q_tile;
    pair.scratch = scratch;
    const core::Interval hull = core::VisibleKeyHull(
        plane.p->mask, plane.s, pair.rows.head, pair.rows.first, pair.rows.first + pair.rows.count);
    for (int64_t kv_tile = n * kBlockTiles; kv_tile < kv_end; ++kv_tile) {
      pair.kv_tile = kv_tile;
      pair.first_key = kv_tile * core::kTile;
      if (pair.first_key >= hull.end || pair.first_key + core::kTile <= hull.begin) continue;
      if (FindVisible(&pair)) RunTilePair<Arch>(pair);
    }
  }
}

// `rows` rows of sums, times `factor`, from row `first` of a gradient on; + 0 turns -0 into +0.
template <class Arch, typename Offset>
TANDEM_ISA_INLINE void WriteRows(const core::Array4& gradient, const float* sums, int64_t columns,
                                 int64_t dim, int64_t rows, float factor, float* scratch,
                                 const Offset& offset) {
  using V = Vector<Arch>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
      const V x = sums == nullptr ? V(0.0f) : V::load_aligned(sums + r * columns + c) * V(factor);
      (x + V(0.0f)).store_aligned(scratch + c);
    }
    StoreRow(gradient.data, gradient.dtype, offset(r), gradient.column_stride, dim, scratch);
  }
}

template <class Arch>
__attribute__((flatten, noinline)) void WriteQueryTile(const Plane& plane, int64_t tile,
                                                       float* scratch) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const QueryTile at = QueryTileAt(plane, tile);
  WriteRows<Arch>(
      p.dq, TileOf(plane, w.dq, tile, w.qk_columns), w.qk_columns, p.qk_dim, at.count, p.scale,
      scratch, [&](int64_t r) { return core::QueryOffset(p.dq, plane.s, at.head, at.first + r); });
}

// Tiles of all of the tensors' keys: those beyond the sequence's length get zeros.
template <class Arch>
__attribute__((flatten, noinline)) void WriteKeyTile(const Plane& plane, int64_t tile,
                                                     float* scratch) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const int64_t first = tile * core::kTile;
  const int64_t rows = core::Min<int64_t>(core::kTile, plane.s.kv_rows - first);
  const bool has_sums = tile < plane.kv_tiles;
  if (p.dk.data != nullptr) {
    WriteRows<Arch>(p.dk, has_sums ? TileOf(plane, w.dk, tile, w.qk_columns) : nullptr,
                    w.qk_columns, p.qk_dim, rows, p.scale, scratch, [&](int64_t r) {
                      return core::KeyOffset(p.dk, plane.s, plane.kv_head, first + r);
                    });
  }
  if (p.dv.data != nullptr) {
    WriteRows<Arch>(p.dv, has_sums ? TileOf(plane, w.dv, tile, w.v_columns) : nullptr, w.v_columns,
                    p.v_dim, rows, 1.0f, scratch, [&](int64_t r) {
                      return core::KeyOffset(p.dv, plane.s, plane.kv_head, first + r);
                    });
  }
}

TANDEM_HD double* HeadSums(const Backward& call, int64_t batch, int64_t head) {
  double* sums =
      reinterpret_cast<double*>(static_cast<float*>(call.workspace) + call.layout.head_sums);
  return sums + 2 * (batch * call.p->q_heads + head);
}

// Sums over the rows of the plane's heads: dSink, dALiBi, and dBias where one element is for all
// keys.
TANDEM_ISA_INLINE void SumRows(const Backward& call, const Plane& plane) {
  const core::Problem& p = *plane.p;
  const bool bias_by_row = p.dbias.data != nullptr && p.dbias.column_stride == 0;
  for (int64_t g = 0; g < p.group; ++g) {
    const int64_t head = plane.kv_head * p.group + g;
    double sink = 0.0, alibi = 0.0;
    for (int64_t i = 0; i < plane.s.q_rows; ++i) {
      const int64_t tile = g * plane.head_tiles + i / core::kTile;
      if ((QueryWordsOf(plane, tile)->empty >> (i % core::kTile)) & 1u) continue;
      const RowData& row = RowsOf(plane, tile)[i % core::kTile];
      if (p.dsink != nullptr) {
        sink += double{core::SinkGradient(p.sink[head * p.sink_stride], row.lse, row.offset)};
      }
      alibi -= double{row.alibi_sum};
      if (bias_by_row) {
        static_cast<float*>(
            p.dbias.data)[core::BiasOffset(p.dbias, plane.s, head, plane.s.q_offset + i, 0)] +=
            row.ds_sum;
      }
    }
    double* sums = HeadSums(call, plane.s.batch, head);
    sums[0] = sink;
    sums[1] = alibi;
  }
}

TANDEM_HD int64_t KeyTilesOfTensors(const Plane& plane) {
  return core::CeilDiv<int64_t>(plane.s.kv_rows, core::kTile);
}

// A whole plane by one thread.
template <class Arch>
TANDEM_ISA_INLINE void RunPlane(Backward* call, int64_t index, int64_t slot) {
  ThreadScratch scratch;
  if (!GetScratch(call, &scratch)) return;
  const Plane plane = MakePlane(*call->p, call->layout, index, slot, call->workspace);
  for (int64_t t = 0; t < plane.q_tiles; ++t) PackQueryTile<Arch>(plane, t, scratch.rows);
  for (int64_t t = 0; t < plane.kv_tiles; ++t) PackKeyTiles<Arch>(plane, t, scratch.rows);
  const int64_t phases = Phases(plane);
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t n = 0; n < KeyBlocks(plane); ++n) {
      RunBlocks<Arch>(plane, n, (n + phase) % phases, scratch.pair);
    }
  }
  if (call->p->dq.data != nullptr) {
    for (int64_t t = 0; t < plane.q_tiles; ++t) WriteQueryTile<Arch>(plane, t, scratch.rows);
  }
  for (int64_t t = 0; t < KeyTilesOfTensors(plane); ++t) WriteKeyTile<Arch>(plane, t, scratch.rows);
  SumRows(*call, plane);
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

template <class Arch>
struct PlaneLoop {
  Backward* call;
  Round round;
  static void Task(void* argument, int64_t index, int worker) {
    auto* loop = static_cast<PlaneLoop*>(argument);
    RunPlane<Arch>(loop->call, PlaneOfRound(*loop->call->p, loop->round, index), worker);
  }
};

// A step of planes [first, first + slots) of a round, cut into tasks of (plane, part).
template <class Arch>
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
    if (!GetScratch(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t tile = index % loop->parts;
    if (tile < plane.q_tiles) PackQueryTile<Arch>(plane, tile, scratch.rows);
    if (tile < plane.kv_tiles) PackKeyTiles<Arch>(plane, tile, scratch.rows);
  }
  static void Visit(void* argument, int64_t index, int) {
    auto* loop = static_cast<PartLoop*>(argument);
    ThreadScratch scratch;
    if (!GetScratch(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t n = index % loop->parts, phases = Phases(plane);
    if (n >= KeyBlocks(plane) || loop->phase >= phases) return;
    RunBlocks<Arch>(plane, n, (n + loop->phase) % phases, scratch.pair);
  }
  static void Write(void* argument, int64_t index, int) {
    auto* loop = static_cast<PartLoop*>(argument);
    ThreadScratch scratch;
    if (!GetScratch(loop->call, &scratch)) return;
    const Plane plane = loop->PlaneAt(index / loop->parts);
    const int64_t tile = index % loop->parts;
    if (tile < plane.q_tiles && loop->call->p->dq.data != nullptr) {
      WriteQueryTile<Arch>(plane, tile, scratch.rows);
    }
    if (tile < KeyTilesOfTensors(plane)) WriteKeyTile<Arch>(plane, tile, scratch.rows);
    if (tile == 0) SumRows(*loop->call, plane);
  }
};

template <class Arch>
void RunRound(Backward* call, const Round& round, const core::Context& context) {
  const PlaneLayout& w = call->layout;
  const int workers = WorkerCount(context, round.count());
  if (workers <= w.slots &&
      (workers == 1 ? WorkerCount(context, INT64_MAX) == 1 : round.count() >= 2 * workers)) {
    PlaneLoop<Arch> loop = {call, round};
    ParallelFor(context, round.count(), PlaneLoop<Arch>::Task, &loop);
    return;
  }
  for (int64_t first = 0; first < round.count(); first += w.slots) {
    const int64_t planes = core::Min(w.slots, round.count() - first);
    const int64_t tiles = core::Max<int64_t>(core::Max(w.q_tiles, w.kv_tiles), 1);
    PartLoop<Arch> loop = {call, round, first, tiles, 0};
    ParallelFor(context, planes * tiles, PartLoop<Arch>::Pack, &loop);
    loop.parts = core::CeilDiv(w.kv_tiles, kBlockTiles);
    const int64_t phases = core::Max(loop.parts, core::CeilDiv(w.q_tiles, kBlockTiles));
    for (; loop.phase < phases; ++loop.phase) {
      ParallelFor(context, planes * loop.parts, PartLoop<Arch>::Visit, &loop);
    }
    loop.parts = tiles;
    ParallelFor(context, planes * tiles, PartLoop<Arch>::Write, &loop);
  }
}

TANDEM_ISA_INLINE void ZeroBias(const core::Problem& p, const core::Context& context) {
  const core::Array4& d = p.dbias;
  const int64_t heads = d.head_stride == 0 ? 1 : p.q_heads;
  const int64_t rows = d.row_stride == 0 ? 1 : p.global_q_len;
  const int64_t keys = d.column_stride == 0 ? 1 : p.global_kv_len;
  const int64_t batch = d.batch_stride == 0 ? 1 : p.batch;
  auto zero = [&](int64_t index, int) {
    float* row = static_cast<float*>(d.data) + index / rows / heads * d.batch_stride +
                 index / rows % heads * d.head_stride + index % rows * d.row_stride;
    for (int64_t j = 0; j < keys; ++j) row[j * d.column_stride] = 0.0f;
  };
  ParallelForEach(context, batch * heads * rows, zero);
}

// dSink and dALiBi from the sums of the heads, in the order of the sequences.
TANDEM_ISA_INLINE void WriteHeadSums(const Backward& call) {
  const core::Problem& p = *call.p;
  const bool slopes_by_sequence = p.dalibi_batch_stride != 0;
  const bool slopes_by_head = p.dalibi_head_stride != 0;
  for (int64_t head = 0; head < p.q_heads; ++head) {
    double sink = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sink += HeadSums(call, b, head)[0];
    if (p.dsink != nullptr) p.dsink[head * p.dsink_stride] = static_cast<float>(sink) + 0.0f;
  }
  if (p.dalibi == nullptr) return;
  for (int64_t b = 0; b < (slopes_by_sequence ? p.batch : 1); ++b) {
    for (int64_t head = 0; head < (slopes_by_head ? p.q_heads : 1); ++head) {
      double sum = 0.0;
      for (int64_t n = b; n < (slopes_by_sequence ? b + 1 : p.batch); ++n) {
        for (int64_t h = head; h < (slopes_by_head ? head + 1 : p.q_heads); ++h) {
          sum += HeadSums(call, n, h)[1];
        }
      }
      p.dalibi[b * p.dalibi_batch_stride + head * p.dalibi_head_stride] =
          static_cast<float>(sum) + 0.0f;
    }
  }
}

template <class Arch>
tandem_status RunBackward(const core::Problem& p, void* workspace, const core::Context& context) {
  Backward call = {&p, workspace, LayOutPlanes(p, kLanes<Arch>), 0};
  const bool has_bias = p.dbias.data != nullptr;
  if (has_bias) ZeroBias(p, context);
  const int64_t batches = has_bias && p.dbias.batch_stride == 0 ? p.batch : 1;
  const int64_t heads = has_bias && p.dbias.head_stride == 0 ? p.kv_heads : 1;
  for (int64_t n = 0; n < batches * heads && call.out_of_memory == 0; ++n) {
    const int64_t b = n / heads, h = n % heads;
    const Round round = {batches == 1 ? 0 : b, batches == 1 ? p.batch : b + 1, heads == 1 ? 0 : h,
                         heads == 1 ? p.kv_heads : h + 1};
    RunRound<Arch>(&call, round, context);
  }
  if (call.out_of_memory != 0) {
    core::Format(context.error, "out of memory: scratch of a CPU thread");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  WriteHeadSums(call);
  WriteGradientsOutsideSequences(p);
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_FLASH_BACKWARD_H_
