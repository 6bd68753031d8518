// Where things are in the workspace: packed keys and values, work items. Plain arithmetic on the
// problem.
#ifndef TANDEM_BACKEND_CPU_FLASH_LAYOUT_H_
#define TANDEM_BACKEND_CPU_FLASH_LAYOUT_H_

#include "backend_cpu/split/split_layout.h"
#include "backend_cpu/work_items.h"
#include "core/mask_prepare.h"
#include "core/problem.h"

namespace tandem::cpu {

// Rows of a query block: (query row, head of the group) pairs, heads innermost, so that the heads
// that share keys share a block. A multiple of the register block's 6 rows.
inline constexpr int64_t kQueryBlock = 96;

// A sequence's share of a packed dimension, in units of `unit` rows: it owns CeilDiv(rows, unit)
// places from FirstPlace on. Places of different sequences are disjoint without a prefix sum over
// the sequences, at the price of at most one unused place each.
TANDEM_HD int64_t FirstPlace(int64_t first_row, int64_t sequence, int64_t unit) {
  return first_row / unit + sequence;
}

// Places of all sequences together.
TANDEM_HD int64_t KeyTilePlaces(const core::Problem& p) {
  return core::IsPacked(p) ? p.kv_total / core::kTile + p.batch
                           : p.batch * core::CeilDiv<int64_t>(p.kv_rows, core::kTile);
}

// The place of a sequence's first tile of 64 keys.
TANDEM_HD int64_t FirstKeyTile(const core::Problem& p, const core::Sequence& s) {
  return core::IsPacked(p) ? FirstPlace(s.kv_start, s.batch, core::kTile)
                           : s.batch * core::CeilDiv<int64_t>(p.kv_rows, core::kTile);
}

// The last sequence whose first tile is at or before `place`. There is one, since sequence 0 begins
// at or after row 0; if not, 0.
TANDEM_HD core::Sequence SequenceOfPlace(const core::Problem& p, int64_t place) {
  int64_t low = 0, high = p.batch;  // the answer is in [low, high)
  int32_t status = 0;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (FirstKeyTile(p, core::ResolveSequence(p, middle, &status)) <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return core::ResolveSequence(p, low, &status);
}

// Whether a sequence's only query block packs the tiles that it sees itself, into its thread's
// scratch: nobody else needs them, and keys and values are then read from memory once (decoding).
TANDEM_HD bool PacksItself(const core::Problem& p, const core::Sequence& s) {
  return s.q_rows * p.group <= kQueryBlock;
}

// The workspace: for each key head and tile place a tile of K, one of V, and a byte that is not 0
// where V holds NaN or infinity. Offsets in bytes, tiles in floats.
struct WorkspaceLayout {
  int64_t places;
  int64_t v_columns;  // Dv, rounded up to whole vectors
  int64_t k_tile;
  int64_t v_tile;
  int64_t v_offset;
  int64_t flag_offset;
  int64_t item_offset;   // of the work items
  int64_t split_offset;  // of short sequences
  int64_t size;
};

TANDEM_HD WorkspaceLayout LayOutWorkspace(const core::Problem& p, int64_t lanes) {
  WorkspaceLayout w;
  // p.q_rows is the longest sequence's.
  w.places = p.q_rows * p.group <= kQueryBlock ? 0 : KeyTilePlaces(p);
  w.v_columns = core::RoundUp(p.v_dim, lanes);
  w.k_tile = core::kTile * p.qk_dim;
  w.v_tile = core::kTile * w.v_columns;
  const int64_t tiles = p.kv_heads * w.places;
  w.v_offset = core::RoundUp<int64_t>(4 * tiles * w.k_tile, core::kBufferAlignment);
  w.flag_offset = core::RoundUp<int64_t>(w.v_offset + 4 * tiles * w.v_tile, core::kBufferAlignment);
  w.item_offset = core::RoundUp(w.flag_offset + tiles, core::kBufferAlignment);
  w.split_offset = core::RoundUp<int64_t>(
      w.item_offset + int64_t{sizeof(WorkItem)} * WorkItemCapacity(p, kQueryBlock),
      core::kBufferAlignment);
  w.size = w.split_offset + LayOutSplits(p).size;
  return w;
}

// One packed tile of keys and values.
struct PackedTile {
  float* k;
  float* v;
  uint8_t* not_finite;
};

TANDEM_HD PackedTile PackedTileAt(const WorkspaceLayout& w, void* workspace, int64_t head,
                                  int64_t place) {
  char* base = static_cast<char*>(workspace);
  const int64_t tile = head * w.places + place;
  return {reinterpret_cast<float*>(base) + tile * w.k_tile,
          reinterpret_cast<float*>(base + w.v_offset) + tile * w.v_tile,
          reinterpret_cast<uint8_t*>(base + w.flag_offset) + tile};
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_LAYOUT_H_
