// Packing of queries, keys and values into tiles of bf16 parts (tile_layout.h). Rows, keys and
// columns that do not exist are zeros.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_PACK_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_PACK_H_

#include "backend_cpu/tiles/tile_layout.h"

namespace tandem::cpu {
namespace {

// Bytes of scratch that packing needs: a row of f32, and 64 rows of one part, or of all of two
// values.
TANDEM_HD int64_t TilePackScratch(const TileShape& shape) {
  return 4 * 32 * core::Max(shape.depth_steps, shape.column_pairs) +
         2 * shape.parts * core::Max(shape.k_part, shape.v_part);
}

// A row of `count` elements as f32, followed by zeros up to a multiple of 32.
template <class Leaf>
TANDEM_ISA_INLINE void LoadPaddedRow(const core::Array4& array, int64_t offset, int64_t count,
                                     float* row) {
  LoadRow<typename Leaf::Arch>(array.data, array.dtype, offset, array.column_stride, count, row);
  const int64_t padded = core::RoundUp<int64_t>(count, 32);
  for (int64_t d = count; d < padded; ++d) row[d] = 0.0f;
}

// A row of bf16 that is as it should be in a tile; null where it has to be worked on.
template <int kParts>
TANDEM_HD const uint16_t* WholeBf16Row(const core::Array4& array, int64_t offset, int64_t count) {
  const bool is_whole = kParts == 1 && array.dtype == core::DType::kBF16 &&
                        array.column_stride == 1 && count % 32 == 0;
  return is_whole ? static_cast<const uint16_t*>(array.data) + offset : nullptr;
}

// Keys [first, first + count), count in [1, 64]. Returns those that are out of range.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE uint64_t PackKeys(const core::Problem& p, const core::Sequence& s,
                                    const TileShape& shape, int64_t head, int64_t first,
                                    int64_t count, float* row, uint16_t* rows, uint16_t* tile) {
  const PartRange range = OperandRange(p.dtype);
  const int64_t halves = 32 * shape.depth_steps;
  uint64_t outside = 0;
  for (int64_t j = 0; j < core::kTile; ++j) {
    if (j < count) {
      const int64_t offset = core::KeyRowOffset(p, p.k, s, head, first + j);
      if (const uint16_t* whole = WholeBf16Row<kParts>(p.k, offset, p.qk_dim)) {
        bool is_outside = false;
        for (int64_t d = 0; d < halves; d += 32) {
          is_outside |= !Leaf::Copy32Bf16(range, whole + d, rows + j * halves + d);
        }
        outside |= uint64_t{is_outside} << j;
        continue;
      }
      LoadPaddedRow<Leaf>(p.k, offset, p.qk_dim, row);
      outside |= uint64_t{!Leaf::AllInRange(range, row, halves)} << j;
    } else if (j == count) {
      for (int64_t d = 0; d < halves; ++d) row[d] = 0.0f;
    }
    for (int64_t d = 0; d < halves; d += 32) {
      StorePartsOf<Leaf, kParts>(row + d, rows + j * halves + d, shape.k_part);
    }
  }
  for (int part = 0; part < kParts; ++part) {
    // Words of two numbers: transposed as f32.
    const float* from = reinterpret_cast<const float*>(rows + part * shape.k_part);
    float* to = reinterpret_cast<float*>(tile + part * shape.k_part);
    const int64_t words = halves / 2;
    for (int64_t j = 0; j < core::kTile; j += 8) {
      for (int64_t w = 0; w < words; w += 8) {
        const int64_t register_index = (j / 32 * shape.depth_steps + w / 16) * 2 + j / 16 % 2;
        Transpose8x8(from + j * words + w, words,
                     to + register_index * kRegisterFloats + w % 16 * 16 + j % 16, 16);
      }
    }
  }
  return outside;
}

// Elements out of range become 0. Returns whether all are in.
template <class Leaf>
TANDEM_ISA_INLINE bool LeaveOut(const PartRange& range, int64_t count, float* row) {
  if (Leaf::AllInRange(range, row, count)) return true;
  for (int64_t c = 0; c < count; ++c) {
    if (!IsInRange(range, row[c])) row[c] = 0.0f;
  }
  return false;
}

// The values of the same keys. Returns those that are out of range.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE uint64_t PackValues(const core::Problem& p, const core::Sequence& s,
                                      const TileShape& shape, int64_t head, int64_t first,
                                      int64_t count, float* row, uint16_t* rows, uint16_t* tile) {
  const PartRange range = ValueRange(p.dtype);
  const int64_t halves = 32 * shape.column_pairs;
  uint64_t outside = 0;
  for (int64_t j = 0; j < core::kTile; j += 2) {
    for (int64_t t = 0; t < 2; ++t) {
      if (j + t < count) {
        const int64_t offset = core::KeyRowOffset(p, p.v, s, head, first + j + t);
        if (const uint16_t* whole = WholeBf16Row<kParts>(p.v, offset, p.v_dim)) {
          bool is_inside = true;
          for (int64_t c = 0; c < halves; c += 32) {
            is_inside &= Leaf::Copy32Bf16(range, whole + c, rows + t * halves + c);
          }
          if (is_inside) continue;
        }
        LoadPaddedRow<Leaf>(p.v, offset, p.v_dim, row);
        outside |= uint64_t{!LeaveOut<Leaf>(range, halves, row)} << (j + t);
      } else {
        for (int64_t c = 0; c < halves; ++c) row[c] = 0.0f;
      }
      for (int64_t c = 0; c < halves; c += 32) {
        StorePartsOf<Leaf, kParts>(row + c, rows + t * halves + c, 2 * halves);
      }
    }
    for (int part = 0; part < kParts; ++part) {
      const uint16_t* from = rows + part * 2 * halves;
      uint16_t* to = tile + part * shape.v_part;
      for (int64_t c = 0; c < halves; c += 16) {
        const int64_t register_index = (c / 32 * 2 + j / 32) * 2 + c / 16 % 2;
        Leaf::Interleave16(from + c, from + halves + c,
                           to + register_index * kRegisterHalves + j % 32 * 16);
      }
    }
  }
  return outside;
}

// Tile `tile` of one sequence and head, which has at least one key. scratch: TilePackScratch bytes.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE void PackTileParts(const core::Problem& p, const core::Sequence& s,
                                     const TileShape& shape, int64_t head, int64_t tile,
                                     float* scratch, const KeyTile& to) {
  const int64_t first = tile * core::kTile;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - first);
  auto* rows =
      reinterpret_cast<uint16_t*>(scratch + 32 * core::Max(shape.depth_steps, shape.column_pairs));
  to.notes->careful_keys =
      PackKeys<Leaf, kParts>(p, s, shape, head, first, count, scratch, rows, to.k);
  to.notes->left_out =
      PackValues<Leaf, kParts>(p, s, shape, head, first, count, scratch, rows, to.v);
}

// One query row into row r of a sub-block's registers, [part][depth step][2 groups of 16 rows].
// Returns whether all is in range. row: 32 depth_steps floats of scratch.
template <class Leaf, int kParts>
TANDEM_ISA_INLINE bool PackQueryRow(const core::Problem& p, const TileShape& shape, int64_t offset,
                                    int64_t r, float* row, uint16_t* q) {
  if (const uint16_t* whole = WholeBf16Row<kParts>(p.q, offset, p.qk_dim)) {
    bool is_inside = true;
    for (int64_t step = 0; step < shape.depth_steps; ++step) {
      is_inside &= Leaf::Copy32Bf16(OperandRange(p.dtype), whole + 32 * step,
                                    q + (step * 2 + r / 16) * kRegisterHalves + r % 16 * 32);
    }
    return is_inside;
  }
  LoadPaddedRow<Leaf>(p.q, offset, p.qk_dim, row);
  for (int64_t step = 0; step < shape.depth_steps; ++step) {
    StorePartsOf<Leaf, kParts>(row + 32 * step,
                               q + (step * 2 + r / 16) * kRegisterHalves + r % 16 * 32,
                               shape.depth_steps * 2 * kRegisterHalves);
  }
  return Leaf::AllInRange(OperandRange(p.dtype), row, 32 * shape.depth_steps);
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_PACK_H_
