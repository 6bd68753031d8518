// Where the tiles of keys and values are in the workspace. Plain arithmetic on the problem.
//
// A tile register holds 1 KB: 16 rows of 16 words. Of the 64 keys of a canonical tile, K is
// [part][2 pairs of 16 keys][depth step of 32][2 groups of 16 keys][16 pairs of depth][16 keys][2],
// V is [part][pairs of 16 columns][2 steps of 32 keys][2 groups of 16 columns][16 pairs of
// keys][16 columns][2]: in the order in which the products read them.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_LAYOUT_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_LAYOUT_H_

#include "backend_cpu/flash/layout.h"
#include "backend_cpu/tiles/parts.h"
#include "backend_cpu/tiles/quads.h"
#include "backend_cpu/work_items.h"

namespace tandem::cpu {

// Rows of a sub-block: two tile registers. A row's arithmetic depends on its sub-block's visible
// tiles, and sub-blocks are cut by the sequence's own rows.
inline constexpr int64_t kSubRows = 32;

// Rows of a work item: as many as keep Q and O in the L2 cache beside a chunk of K and V, and fewer
// where there would be too few items for the threads. Results do not depend on it.
inline constexpr int64_t kItemRows = 256;
inline constexpr int64_t kSmallItemRows = 64;

// Bytes of K and V that a work item's sub-blocks share before the next are taken.
inline constexpr int64_t kChunkBytes = 512 << 10;

struct TileShape {
  int parts;
  int64_t depth_steps;   // of 32, of the head dim of q and k
  int64_t column_pairs;  // of 32, of the head dim of v
  int64_t k_part;        // halves of one part of a tile of 64 keys
  int64_t v_part;
  int64_t chunk_tiles;
};

TANDEM_HD TileShape ShapeOf(const core::Problem& p) {
  TileShape shape;
  shape.parts = PartCount(p.dtype);
  shape.depth_steps = core::CeilDiv<int64_t>(p.qk_dim, 32);
  shape.column_pairs = core::CeilDiv<int64_t>(p.v_dim, 32);
  shape.k_part = core::kTile * 32 * shape.depth_steps;
  shape.v_part = core::kTile * 32 * shape.column_pairs;
  const int64_t tile_bytes = 2 * shape.parts * (shape.k_part + shape.v_part);
  shape.chunk_tiles = core::Clamp<int64_t>(kChunkBytes / tile_bytes, 2, 16) & ~int64_t{1};
  return shape;
}

// What packing noted about a tile, a bit for each key. Such elements are worked on one by one, so
// that they change nothing for the rest of the tile.
struct TileNotes {
  uint64_t careful_keys;  // K has elements that the parts cannot stand for
  uint64_t left_out;      // V has; they are 0 in the tile
};

struct TileWorkspace {
  int64_t places;
  int64_t v_offset;  // in bytes
  int64_t note_offset;
  int64_t item_offset;
  int64_t split_offset;  // of short sequences
  int64_t size;
};

TANDEM_HD TileWorkspace LayOutTileWorkspace(const core::Problem& p, const TileShape& shape) {
  TileWorkspace w;
  w.places = AllAreShort(p) ? 0 : KeyTilePlaces(p);
  const int64_t tiles = p.kv_heads * w.places;
  w.v_offset =
      core::RoundUp<int64_t>(2 * shape.parts * tiles * shape.k_part, core::kBufferAlignment);
  w.note_offset = core::RoundUp<int64_t>(w.v_offset + 2 * shape.parts * tiles * shape.v_part,
                                         core::kBufferAlignment);
  w.item_offset =
      core::RoundUp(w.note_offset + tiles * int64_t{sizeof(TileNotes)}, core::kBufferAlignment);
  w.split_offset = core::RoundUp<int64_t>(
      w.item_offset + static_cast<int64_t>(sizeof(WorkItem)) * WorkItemCapacity(p, kSmallItemRows),
      core::kBufferAlignment);
  w.size = w.split_offset + LayOutSplits(p).size;
  return w;
}

struct KeyTile {
  uint16_t* k;
  uint16_t* v;
  TileNotes* notes;
};

TANDEM_HD KeyTile KeyTileAt(const TileShape& shape, const TileWorkspace& w, void* workspace,
                            int64_t kv_head, int64_t place) {
  char* base = static_cast<char*>(workspace);
  const int64_t tile = kv_head * w.places + place;
  return {reinterpret_cast<uint16_t*>(base) + tile * shape.parts * shape.k_part,
          reinterpret_cast<uint16_t*>(base + w.v_offset) + tile * shape.parts * shape.v_part,
          reinterpret_cast<TileNotes*>(base + w.note_offset) + tile};
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_LAYOUT_H_
