// A plane is one sequence and one key head, with the query heads that share it: what is worked on
// together. Its query tiles are 64 rows of one head, head after head; its key tiles 64 keys. This
// file says where a plane's packed tensors and sums are, and cuts planes into blocks.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_PLANE_H_
#define TANDEM_BACKEND_CPU_BACKWARD_PLANE_H_

#include "core/mask_prepare.h"
#include "core/mask_tiles.h"
#include "core/problem.h"

namespace tandem::cpu {

// Tiles of a block of rows or keys. A task is a pair of blocks.
inline constexpr int64_t kBlockTiles = 4;
// Planes are in work together until there are about this many tasks at a time.
inline constexpr int64_t kTasksAtATime = 128;

// What a query row needs beside its vectors.
struct RowData {
  float lse;
  float offset;     // D - dLSE
  float ds_sum;     // over its keys, where the bias has one key for all
  float alibi_sum;  // of dS |d - j|
};

// What a tile of 64 rows takes in floats: as operands of the products (panel_multiplier.h,
// tile_multiplier.h), and as sums, whose columns are head dims rounded up.
struct TileSizes {
  int64_t q, dout, k, v;
  int64_t qk_columns, v_columns;
};

// Offsets of one plane's arrays in floats; a plane's memory is a slot.
struct PlaneLayout {
  TileSizes sizes;
  int64_t qk_columns, v_columns;
  int64_t q_tiles, kv_tiles;  // of the longest sequence
  // By query tile: the operands Q and dO, and the sum dQ.
  int64_t q, dout, dq;
  int64_t rows;     // RowData
  int64_t q_words;  // QueryWords
  // By key tile: the operands K and V, and the sums dK and dV.
  int64_t k, v, dk, dv;
  int64_t kv_words;  // KeyWords
  int64_t size;      // of a slot
  int64_t slots;
  int64_t head_sums;  // after the slots: f64 dSink and dALiBi of each (sequence, head)
  int64_t bytes;      // of everything
};

TANDEM_HD PlaneLayout LayOutPlanes(const core::Problem& p, const TileSizes& sizes) {
  PlaneLayout w = {};
  w.sizes = sizes;
  w.qk_columns = sizes.qk_columns;
  w.v_columns = sizes.v_columns;
  w.q_tiles = p.group * core::CeilDiv<int64_t>(p.q_rows, core::kTile);
  w.kv_tiles = core::CeilDiv<int64_t>(p.kv_rows, core::kTile);
  int64_t at = 0;
  auto take = [&at](int64_t floats) {
    const int64_t begin = at;
    at += core::RoundUp<int64_t>(floats, core::kBufferAlignment / 4);
    return begin;
  };
  const int64_t q_rows = w.q_tiles * core::kTile, kv_rows = w.kv_tiles * core::kTile;
  w.q = take(w.q_tiles * sizes.q);
  w.dout = take(w.q_tiles * sizes.dout);
  w.dq = take(q_rows * w.qk_columns);
  w.rows = take(q_rows * static_cast<int64_t>(sizeof(RowData) / 4));
  w.q_words = take(w.q_tiles * 6);
  w.k = take(w.kv_tiles * sizes.k);
  w.v = take(w.kv_tiles * sizes.v);
  w.dk = take(kv_rows * w.qk_columns);
  w.dv = take(kv_rows * w.v_columns);
  w.kv_words = take(w.kv_tiles * 4);
  w.size = at;
  const int64_t planes = p.batch * p.kv_heads;
  const int64_t blocks = core::Max<int64_t>(core::CeilDiv(w.kv_tiles, kBlockTiles), 1);
  w.slots = core::Min(planes, core::CeilDiv(kTasksAtATime, blocks));
  w.head_sums = w.slots * w.size;
  w.bytes =
      4 * w.head_sums + core::RoundUp<int64_t>(16 * p.batch * p.q_heads, core::kBufferAlignment);
  return w;
}

// A plane in its slot.
struct Plane {
  const core::Problem* p;
  const PlaneLayout* layout;
  core::Sequence s;
  int64_t kv_head;
  int64_t head_tiles;  // query tiles of one head
  int64_t q_tiles, kv_tiles;
  float* slot;
};

TANDEM_HD Plane MakePlane(const core::Problem& p, const PlaneLayout& layout, int64_t index,
                          int64_t slot, void* workspace) {
  Plane plane;
  int32_t status = 0;
  plane.p = &p;
  plane.layout = &layout;
  plane.s = core::ResolveSequence(p, index / p.kv_heads, &status);
  plane.kv_head = index % p.kv_heads;
  plane.head_tiles = core::CeilDiv<int64_t>(plane.s.q_rows, core::kTile);
  plane.q_tiles = p.group * plane.head_tiles;
  plane.kv_tiles = core::CeilDiv<int64_t>(core::LocalKeys(plane.s), core::kTile);
  plane.slot = static_cast<float*>(workspace) + slot * layout.size;
  return plane;
}

// A query tile: which rows of which head.
struct QueryTile {
  int64_t head;
  int64_t first;  // local row
  int64_t count;  // 1 to 64
};
TANDEM_HD QueryTile QueryTileAt(const Plane& plane, int64_t tile) {
  const int64_t first = tile % plane.head_tiles * core::kTile;
  return {plane.kv_head * plane.p->group + tile / plane.head_tiles, first,
          core::Min<int64_t>(core::kTile, plane.s.q_rows - first)};
}

// A tile of operands, of `size` floats, or of sums.
TANDEM_HD float* OperandOf(const Plane& plane, int64_t array, int64_t tile, int64_t size) {
  return plane.slot + array + tile * size;
}
TANDEM_HD float* SumsOf(const Plane& plane, int64_t array, int64_t tile, int64_t columns) {
  return plane.slot + array + tile * core::kTile * columns;
}
TANDEM_HD RowData* RowsOf(const Plane& plane, int64_t tile) {
  return reinterpret_cast<RowData*>(plane.slot + plane.layout->rows) + tile * core::kTile;
}
// Rows that hold what packing left out of Q, of dO, and empty rows.
struct QueryWords {
  uint64_t q_left_out, dout_left_out, empty;
};
TANDEM_HD QueryWords* QueryWordsOf(const Plane& plane, int64_t tile) {
  return reinterpret_cast<QueryWords*>(plane.slot + plane.layout->q_words) + tile;
}
// Keys that hold what packing left out of K, of V.
struct KeyWords {
  uint64_t k_left_out, v_left_out;
};
TANDEM_HD KeyWords* KeyWordsOf(const Plane& plane, int64_t tile) {
  return reinterpret_cast<KeyWords*>(plane.slot + plane.layout->kv_words) + tile;
}

// The sums of dSink and dALiBi of a head.
TANDEM_HD double* HeadSums(const core::Problem& p, const PlaneLayout& layout, void* workspace,
                           int64_t batch, int64_t head) {
  auto* sums = reinterpret_cast<double*>(static_cast<float*>(workspace) + layout.head_sums);
  return sums + 2 * (batch * p.q_heads + head);
}

// Blocks of keys and of rows, and the phases of a plane. In phase t key block n meets query block
// (n + t) mod phases: within a phase no two tasks share a block of either kind, so they may run at
// once, and every sum is taken in the order of the phases.
TANDEM_HD int64_t KeyBlocks(const Plane& plane) {
  return core::CeilDiv(plane.kv_tiles, kBlockTiles);
}
TANDEM_HD int64_t Phases(const Plane& plane) {
  return core::Max(KeyBlocks(plane), core::CeilDiv(plane.q_tiles, kBlockTiles));
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_PLANE_H_
