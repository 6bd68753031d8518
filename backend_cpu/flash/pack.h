// Packing of keys and values into f32 panels, once per key head, by the tile of 64 keys.
//
// K tile: panels of kPanelWidth keys, each [Dqk][kPanelWidth]. V tile: panels of kPanelWidth
// columns (the last narrower), each [64 keys][width]. Keys that do not exist are zeros in both, and
// so are non-finite elements of V, which would poison rows that do not see them (0 * NaN): the tile
// is flagged instead, and flash_forward.h adds those elements where they are visible.
#ifndef TANDEM_BACKEND_CPU_FLASH_PACK_H_
#define TANDEM_BACKEND_CPU_FLASH_PACK_H_

#include "backend_cpu/flash/layout.h"
#include "backend_cpu/flash/micro_kernel.h"

namespace tandem::cpu {
namespace {

// Floats of scratch that packing needs: 64 rows of K, or a row of V.
TANDEM_HD int64_t PackScratch(const core::Problem& p) {
  return core::Max(core::kTile * core::RoundUp<int64_t>(p.qk_dim, 8),
                   core::RoundUp<int64_t>(p.v_dim, 16));
}

// Keys [first, first + count) of one head; count in [1, 64].
template <class Arch>
TANDEM_ISA_INLINE void PackKeyTile(const core::Problem& p, const core::Sequence& s, int64_t head,
                                   int64_t first, int64_t count, float* scratch, float* tile) {
  const int64_t stride = core::RoundUp<int64_t>(p.qk_dim, 8);
  const int64_t rows = core::RoundUp<int64_t>(count, 8);
  for (int64_t j = 0; j < rows; ++j) {
    float* row = scratch + j * stride;
    if (j < count) {
      LoadRow<Arch>(p.k.data, p.dtype, core::KeyRowOffset(p, p.k, s, head, first + j),
                    p.k.column_stride, p.qk_dim, row);
    } else {
      for (int64_t d = 0; d < p.qk_dim; ++d) row[d] = 0.0f;
    }
  }
  const int64_t whole = p.qk_dim - p.qk_dim % 8;
  for (int64_t j = 0; j < core::kTile; j += 8) {
    float* to = tile + (j / kPanelWidth<Arch>)*kPanelWidth<Arch> * p.qk_dim + j % kPanelWidth<Arch>;
    const float* from = scratch + j * stride;
    if (j >= rows) {
      for (int64_t d = 0; d < p.qk_dim; ++d) {
        _mm256_storeu_ps(to + d * kPanelWidth<Arch>, _mm256_setzero_ps());
      }
      continue;
    }
    int64_t d = 0;
    for (; d < whole; d += 8) {
      Transpose8x8(from + d, stride, to + d * kPanelWidth<Arch>, kPanelWidth<Arch>);
    }
    for (; d < p.qk_dim; ++d) {
      for (int64_t t = 0; t < 8; ++t) to[d * kPanelWidth<Arch> + t] = from[t * stride + d];
    }
  }
}

// The same keys of V; returns whether an element was not finite.
template <class Arch>
TANDEM_ISA_INLINE bool PackValueTile(const core::Problem& p, const core::Sequence& s, int64_t head,
                                     int64_t first, int64_t count, float* scratch, float* tile) {
  using V = Vector<Arch>;
  constexpr uint64_t kAllLanes = (uint64_t{1} << kLanes<Arch>)-1;
  const int64_t columns = core::RoundUp<int64_t>(p.v_dim, kLanes<Arch>);
  for (int64_t c = p.v_dim; c < columns; ++c) scratch[c] = 0.0f;
  uint64_t all_finite = kAllLanes;
  for (int64_t j = 0; j < core::kTile; ++j) {
    if (j < count) {
      LoadRow<Arch>(p.v.data, p.dtype, core::KeyRowOffset(p, p.v, s, head, first + j),
                    p.v.column_stride, p.v_dim, scratch);
    }
    for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
      const int64_t panel = c - c % kPanelWidth<Arch>;
      const int64_t width = core::Min<int64_t>(kPanelWidth<Arch>, columns - panel);
      float* to = tile + panel * core::kTile + j * width + (c - panel);
      if (j >= count) {
        V(0.0f).store_aligned(to);
        continue;
      }
      const V x = V::load_aligned(scratch + c);
      const uint64_t finite = EqualBits(x - x, V(0.0f));
      all_finite &= finite;
      SelectBits(finite, x, V(0.0f)).store_aligned(to);
    }
  }
  return all_finite != kAllLanes;
}

// Tile `tile` of one sequence and head, which has at least one key.
template <class Arch>
TANDEM_ISA_INLINE void PackTile(const core::Problem& p, const core::Sequence& s, int64_t head,
                                int64_t tile, float* scratch, const PackedTile& to) {
  const int64_t first = tile * core::kTile;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - first);
  PackKeyTile<Arch>(p, s, head, first, count, scratch, to.k);
  *to.not_finite = PackValueTile<Arch>(p, s, head, first, count, scratch, to.v) ? 1 : 0;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_PACK_H_
