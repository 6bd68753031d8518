// A block of query rows at work: its scratch, what it sees of the mask, and the group of key tiles
// that is being collected for it.
#ifndef TANDEM_BACKEND_CPU_FLASH_BLOCK_H_
#define TANDEM_BACKEND_CPU_FLASH_BLOCK_H_

#include "backend_cpu/flash/layout.h"
#include "backend_cpu/flash/micro_kernel.h"
#include "backend_cpu/flash/pack.h"
#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/mask_rows.h"

namespace tandem::cpu {
namespace {

static_assert(kQueryBlock % kBlockRows == 0);
inline constexpr int kRowBlocks = kQueryBlock / kBlockRows;

// Rows of S are apart by a little more than a power of two, so that the rows of a register block do
// not fall into the same cache sets.
inline constexpr int64_t kScoreStride = kGroupTiles * core::kTile + 16;

// What a thread works in. All arrays are 64-byte aligned.
struct Scratch {
  float* q;             // [kQueryBlock][Dqk]
  float* scores;        // [kQueryBlock][kScoreStride]
  float* o;             // [kQueryBlock][v_columns]
  float* v_row;         // [v_columns]
  Row* rows;            // [kQueryBlock]
  uint64_t* words;      // [kGroupTiles][kQueryBlock]
  float* pack;          // PackScratch; this and below only for a block that packs its tiles itself
  float* k_tiles;       // [kGroupTiles]
  float* v_tiles;       // [kGroupTiles]
  uint8_t* not_finite;  // [kGroupTiles]
};

// Hands out parts of `base`, which may be null to learn the size alone.
TANDEM_HD Scratch LayOutScratch(const core::Problem& p, const WorkspaceLayout& layout,
                                bool packs_itself, char* base, int64_t* size) {
  constexpr int kParts = 10;
  const int64_t own = packs_itself ? 1 : 0;
  const int64_t bytes[kParts] = {4 * kQueryBlock * p.qk_dim,
                                 4 * kQueryBlock * kScoreStride,
                                 4 * kQueryBlock * layout.v_columns,
                                 4 * layout.v_columns,
                                 static_cast<int64_t>(sizeof(Row)) * kQueryBlock,
                                 8 * kGroupTiles * kQueryBlock,
                                 own * 4 * PackScratch(p),
                                 own * 4 * kGroupTiles * layout.k_tile,
                                 own * 4 * kGroupTiles * layout.v_tile,
                                 own * kGroupTiles};
  int64_t offset[kParts];
  *size = 0;
  for (int t = 0; t < kParts; ++t) {
    offset[t] = *size;
    *size += core::RoundUp<int64_t>(bytes[t], 64);
  }
  if (base == nullptr) return {};
  return {reinterpret_cast<float*>(base + offset[0]), reinterpret_cast<float*>(base + offset[1]),
          reinterpret_cast<float*>(base + offset[2]), reinterpret_cast<float*>(base + offset[3]),
          reinterpret_cast<Row*>(base + offset[4]),   reinterpret_cast<uint64_t*>(base + offset[5]),
          reinterpret_cast<float*>(base + offset[6]), reinterpret_cast<float*>(base + offset[7]),
          reinterpret_cast<float*>(base + offset[8]), reinterpret_cast<uint8_t*>(base + offset[9])};
}

// The keys [begin, end) of a tile outside which a register block of rows sees nothing: whole
// vectors, none where it sees nothing of the tile.
struct KeyRange {
  int16_t begin, end;
};

// A tile of the group that is being collected.
struct GroupTile {
  int64_t first_key;  // local
  PackedTile packed;
  bool all_visible;
  KeyRange keys[kRowBlocks];
};

// A block of query rows and the group of key tiles that is being collected for it.
struct Block {
  const core::Problem* p;
  const WorkspaceLayout* layout;
  core::Sequence s;
  RowPairs rows;
  bool packs_itself;
  PackedTile first_tile;  // else: the sequence's first tile, in the workspace
  Scratch scratch;

  int tile_count;
  GroupTile tiles[kGroupTiles];
};

template <class Arch>
TANDEM_ISA_INLINE KeyRange VisibleVectors(uint64_t word) {
  if (word == 0) return {0, 0};
  constexpr int kMask = kLanes<Arch> - 1;
  return {static_cast<int16_t>(__builtin_ctzll(word) & ~kMask),
          static_cast<int16_t>(((63 - __builtin_clzll(word)) | kMask) + 1)};
}

// Appends a tile to the group, unless no row sees any of it.
template <class Arch>
TANDEM_ISA_INLINE void AddTile(Block* block, int64_t tile, core::TileClass tile_class) {
  const WorkspaceLayout& layout = *block->layout;
  const Scratch& scratch = block->scratch;
  const int t = block->tile_count;
  uint64_t* words = scratch.words + t * kQueryBlock;
  if (tile_class == core::TileClass::kFull) {
    for (int64_t r = 0; r < block->rows.count; ++r) words[r] = ~uint64_t{0};
  } else if (FillWords(*block->p, block->s, block->rows, tile, words) == 0) {
    return;
  }
  GroupTile& added = block->tiles[t];
  for (int64_t b = 0; b < kRowBlocks; ++b) {
    uint64_t any = 0;
    for (int64_t r = b * kBlockRows;
         r < core::Min<int64_t>((b + 1) * kBlockRows, block->rows.count); ++r) {
      any |= words[r];
    }
    added.keys[b] = VisibleVectors<Arch>(any);
  }
  added.first_key = tile * core::kTile;
  added.all_visible = tile_class == core::TileClass::kFull;
  if (block->packs_itself) {
    added.packed = {scratch.k_tiles + t * layout.k_tile, scratch.v_tiles + t * layout.v_tile,
                    scratch.not_finite + t};
    PackTile<Arch>(*block->p, block->s, block->rows.kv_head, tile, scratch.pack, added.packed);
  } else {
    added.packed = {block->first_tile.k + tile * layout.k_tile,
                    block->first_tile.v + tile * layout.v_tile,
                    block->first_tile.not_finite + tile};
  }
  ++block->tile_count;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_BLOCK_H_
