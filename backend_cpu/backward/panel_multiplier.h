// The products of a pair of tiles in f32, over panels. Rows of queries are packed by columns:
// panels of kPanelWidth columns (the last narrower), each [64 rows][width]. Keys are packed by
// keys, panels of kPanelWidth keys, each [dim][width], and K by columns too. Sums are rows.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_PANEL_MULTIPLIER_H_
#define TANDEM_BACKEND_CPU_BACKWARD_PANEL_MULTIPLIER_H_

#include "backend_cpu/backward/products.h"
#include "backend_cpu/backward/tile_pair.h"

namespace tandem::cpu {
namespace {

TANDEM_HD TileSizes PanelSizes(const core::Problem& p, int64_t lanes) {
  const int64_t qk_columns = core::RoundUp(p.qk_dim, lanes);
  const int64_t v_columns = core::RoundUp(p.v_dim, lanes);
  return {core::kTile * qk_columns,
          core::kTile * v_columns,
          core::kTile * (p.qk_dim + qk_columns),
          core::kTile * p.v_dim,
          qk_columns,
          v_columns};
}

template <class Arch_>
class PanelMultiplier {
 public:
  using Arch = Arch_;

  static TileSizes Sizes(const core::Problem& p) { return PanelSizes(p, kLanes<Arch>); }
  static int64_t ScratchBytes(const core::Problem&) { return 0; }

  explicit PanelMultiplier(void* /*scratch*/) {}

  // Zeros in place of what is not finite; true where there was such an element. `columns` are whole
  // vectors.
  TANDEM_ISA_INLINE static bool LeaveOut(int64_t columns, float* row) {
    constexpr uint64_t kAllLanes = (uint64_t{1} << kLanes<Arch>)-1;
    uint64_t all = kAllLanes;
    for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
      const V x = V::load_aligned(row + c);
      const uint64_t finite = EqualBits(x - x, V(0.0f));
      if (finite != kAllLanes) SelectBits(finite, x, V(0.0f)).store_aligned(row + c);
      all &= finite;
    }
    return all != kAllLanes;
  }
  static bool IsLeftOut(float x) { return !core::IsFinite(x); }

  // Tiles of 64 rows, `stride` apart, to operands.
  TANDEM_ISA_INLINE static void PackQueries(const float* rows, int64_t stride, int64_t dim,
                                            float* tile, void* /*scratch*/) {
    ToColumnPanels(rows, stride, core::RoundUp<int64_t>(dim, kLanes<Arch>), tile);
  }
  TANDEM_ISA_INLINE static void PackKeys(const float* rows, int64_t stride, int64_t dim,
                                         float* tile, void* /*scratch*/) {
    ToKeyPanels(rows, stride, dim, tile);
    ToColumnPanels(rows, stride, core::RoundUp<int64_t>(dim, kLanes<Arch>),
                   tile + core::kTile * dim);
  }
  TANDEM_ISA_INLINE static void PackValues(const float* rows, int64_t stride, int64_t dim,
                                           float* tile, void* /*scratch*/) {
    ToKeyPanels(rows, stride, dim, tile);
  }

  // Q K^T and dO V^T.
  TANDEM_ISA_INLINE void Multiply(const TilePair& pair) const {
    const core::Problem& p = *pair.plane->p;
    const PairOperands at = OperandsOf(pair);
    MultiplyRowsByKeys(pair, at.q, at.k, p.qk_dim, pair.scratch->p);
    MultiplyRowsByKeys(pair, at.dout, at.v, p.v_dim, pair.scratch->ds);
  }

  // P and dS of them, and dV += P^T dO, dK += dS^T Q, dQ += dS K.
  TANDEM_ISA_INLINE void EvaluateAndAdd(const TilePair& pair) const {
    EvaluatePairs<Arch, kLanes<Arch>>(pair);
    const core::Problem& p = *pair.plane->p;
    const PlaneLayout& w = *pair.plane->layout;
    const PairOperands at = OperandsOf(pair);
    if (at.dv != nullptr) AddToKeys(pair, pair.scratch->p, at.dout, w.v_columns, at.dv);
    if (at.dk != nullptr) AddToKeys(pair, pair.scratch->ds, at.q, w.qk_columns, at.dk);
    if (at.dq != nullptr) {
      AddToRows(pair, pair.scratch->ds, at.k + core::kTile * p.qk_dim, w.qk_columns, at.dq);
    }
  }

  TANDEM_ISA_INLINE void Finish() const {}

  // Where a tile of sums has the element of a row and column.
  static int64_t QuerySum(int64_t r, int64_t c, int64_t columns) { return r * columns + c; }
  static int64_t KeySum(int64_t j, int64_t c, int64_t columns) { return j * columns + c; }

  // The sums of a tile as rows, `*stride` apart on return; rows: scratch.
  static const float* QueryRows(const float* sums, int64_t columns, float* /*rows*/,
                                int64_t* stride) {
    *stride = columns;
    return sums;
  }
  static const float* KeyRows(const float* sums, int64_t columns, float* /*rows*/,
                              int64_t* stride) {
    *stride = columns;
    return sums;
  }

 private:
  using V = Vector<Arch>;
  static constexpr int64_t kWidth = kPanelWidth<Arch>;

  TANDEM_ISA_INLINE static void ToColumnPanels(const float* rows, int64_t stride, int64_t columns,
                                               float* tile) {
    for (int64_t panel = 0; panel < columns; panel += kWidth) {
      const int64_t width = core::Min(kWidth, columns - panel);
      float* to = tile + panel * core::kTile;
      for (int64_t r = 0; r < core::kTile; ++r) {
        for (int64_t c = 0; c < width; c += kLanes<Arch>) {
          V::load_aligned(rows + r * stride + panel + c).store_aligned(to + r * width + c);
        }
      }
    }
  }

  TANDEM_ISA_INLINE static void ToKeyPanels(const float* rows, int64_t stride, int64_t dim,
                                            float* tile) {
    const int64_t whole = dim - dim % 8;
    for (int64_t j = 0; j < core::kTile; j += 8) {
      float* to = tile + j / kWidth * kWidth * dim + j % kWidth;
      const float* from = rows + j * stride;
      int64_t d = 0;
      for (; d < whole; d += 8) Transpose8x8(from + d, stride, to + d * kWidth, kWidth);
      for (; d < dim; ++d) {
        for (int64_t t = 0; t < 8; ++t) to[d * kWidth + t] = from[t * stride + d];
      }
    }
  }

  TANDEM_ISA_INLINE static void MultiplyRowsByKeys(const TilePair& pair, const float* rows,
                                                   const float* keys, int64_t dim,
                                                   float* products) {
    constexpr int kMostParts = 512 / kWidth;
    const int64_t columns = core::RoundUp<int64_t>(dim, kLanes<Arch>);
    Part parts[kMostParts];
    for (int64_t j = pair.key_begin / kWidth * kWidth; j < pair.key_end; j += kWidth) {
      int count = 0;
      for (int64_t d = 0; d < dim; d += kWidth) {
        const int64_t width = core::Min(kWidth, columns - d);
        parts[count++] = {rows + d * core::kTile, width, keys + j * dim + d * kWidth,
                          core::Min(kWidth, dim - d)};
      }
      Product<Arch, false>(kPanelVectors<Arch>, parts, count, pair.row_begin, pair.row_end, false,
                           products + j, core::kTile);
    }
  }

  // sums (of keys) += factors^T rows.
  TANDEM_ISA_INLINE static void AddToKeys(const TilePair& pair, const float* factors,
                                          const float* rows, int64_t columns, float* sums) {
    for (int64_t panel = 0; panel < columns; panel += kWidth) {
      const int64_t width = core::Min(kWidth, columns - panel);
      const Part part = {factors + pair.row_begin * core::kTile, core::kTile,
                         rows + panel * core::kTile + pair.row_begin * width,
                         pair.row_end - pair.row_begin};
      Product<Arch, true>(static_cast<int>(width / kLanes<Arch>), &part, 1, pair.key_begin,
                          pair.key_end, true, sums + panel, columns);
    }
  }

  // sums (of rows) += factors keys.
  TANDEM_ISA_INLINE static void AddToRows(const TilePair& pair, const float* factors,
                                          const float* keys, int64_t columns, float* sums) {
    for (int64_t panel = 0; panel < columns; panel += kWidth) {
      const int64_t width = core::Min(kWidth, columns - panel);
      const Part part = {factors + pair.key_begin, core::kTile,
                         keys + panel * core::kTile + pair.key_begin * width,
                         pair.key_end - pair.key_begin};
      Product<Arch, false>(static_cast<int>(width / kLanes<Arch>), &part, 1, pair.row_begin,
                           pair.row_end, true, sums + panel, columns);
    }
  }
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_PANEL_MULTIPLIER_H_
