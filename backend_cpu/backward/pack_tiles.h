// Packing of tiles of 64 rows into f32 panels. By columns: panels of kPanelWidth columns (the last
// narrower), each [64 rows][width]. By keys: panels of kPanelWidth keys, each [dim][width].
//
// Rows that do not exist, and elements that are not finite, are zeros: 0 * NaN would reach pairs
// that are not visible. A word tells which rows held such elements; corrections.h adds them where
// they are visible.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_
#define TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_

#include "backend_cpu/backward/plane.h"
#include "backend_cpu/flash/pack.h"
#include "core/gradient.h"

namespace tandem::cpu {
namespace {

// Rows of packing scratch are apart by this many floats.
TANDEM_HD int64_t RowScratchStride(const core::Problem& p) {
  return core::RoundUp<int64_t>(core::Max(p.qk_dim, p.v_dim), 16);
}

// Zeros in place of what is not finite; true where there was such an element. `columns` are whole
// vectors.
template <class Arch>
TANDEM_ISA_INLINE bool MakeFinite(int64_t columns, float* row) {
  using V = Vector<Arch>;
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

template <class Arch>
TANDEM_ISA_INLINE void ToColumnPanels(const float* rows, int64_t stride, int64_t columns,
                                      float* tile) {
  for (int64_t panel = 0; panel < columns; panel += kPanelWidth<Arch>) {
    const int64_t width = core::Min<int64_t>(kPanelWidth<Arch>, columns - panel);
    float* to = tile + panel * core::kTile;
    for (int64_t r = 0; r < core::kTile; ++r) {
      for (int64_t c = 0; c < width; c += kLanes<Arch>) {
        Vector<Arch>::load_aligned(rows + r * stride + panel + c).store_aligned(to + r * width + c);
      }
    }
  }
}

template <class Arch>
TANDEM_ISA_INLINE void ToKeyPanels(const float* rows, int64_t stride, int64_t dim, float* tile) {
  const int64_t whole = dim - dim % 8;
  for (int64_t j = 0; j < core::kTile; j += 8) {
    float* to = tile + (j / kPanelWidth<Arch>)*kPanelWidth<Arch> * dim + j % kPanelWidth<Arch>;
    const float* from = rows + j * stride;
    int64_t d = 0;
    for (; d < whole; d += 8) {
      Transpose8x8(from + d, stride, to + d * kPanelWidth<Arch>, kPanelWidth<Arch>);
    }
    for (; d < dim; ++d) {
      for (int64_t t = 0; t < 8; ++t) to[d * kPanelWidth<Arch> + t] = from[t * stride + d];
    }
  }
}

TANDEM_ISA_INLINE void ZeroRow(int64_t columns, float* row) {
  for (int64_t c = 0; c < columns; ++c) row[c] = 0.0f;
}

// sum a b.
template <class Arch>
TANDEM_ISA_INLINE float DotRows(const float* a, const float* b, int64_t columns) {
  Vector<Arch> sum(0.0f);
  for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
    sum = Fma(Vector<Arch>::load_aligned(a + c), Vector<Arch>::load_aligned(b + c), sum);
  }
  return Sum(sum);
}

// LSE and D - dLSE of a row, from dO in `dout`; `out` is a row of scratch.
template <class Arch>
TANDEM_ISA_INLINE RowData LoadRowData(const Plane& plane, int64_t head, int64_t i, float lse,
                                      const float* dout, float* out) {
  const core::Problem& p = *plane.p;
  ZeroRow(plane.layout->v_columns, out);
  LoadRow<Arch>(p.out.data, p.out.dtype, core::QueryOffset(p.out, plane.s, head, i),
                p.out.column_stride, p.v_dim, out);
  float offset = DotRows<Arch>(dout, out, plane.layout->v_columns);
  if (p.dlse.data != nullptr) {
    offset -= core::LoadFloat(p.dlse.data, core::DType::kF32,
                              core::QueryOffset(p.dlse, plane.s, head, i));
  }
  return {lse, offset, 0.0f, 0.0f};
}

// Q, dO and what belongs to the rows of a query tile. scratch: 65 rows.
template <class Arch>
__attribute__((flatten, noinline)) void PackQueryTile(const Plane& plane, int64_t tile,
                                                      float* scratch) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const QueryTile at = QueryTileAt(plane, tile);
  const int64_t stride = RowScratchStride(p);
  RowData* rows = RowsOf(plane, tile);
  QueryWords words = {0, 0, 0};
  float* out = scratch + core::kTile * stride;
  for (int64_t r = 0; r < core::kTile; ++r) {
    float* dout = scratch + r * stride;
    ZeroRow(w.v_columns, dout);
    rows[r] = {0.0f, 0.0f, 0.0f, 0.0f};
    words.empty |= uint64_t{1} << r;
    if (r >= at.count || !core::RowExists(plane.s, at.first + r)) continue;
    const float lse = core::LoadFloat(p.lse.data, core::DType::kF32,
                                      core::QueryOffset(p.lse, plane.s, at.head, at.first + r));
    if (core::GradientRowIsEmpty(lse)) continue;
    words.empty &= ~(uint64_t{1} << r);
    LoadRow<Arch>(p.dout.data, p.dout.dtype,
                  core::QueryOffset(p.dout, plane.s, at.head, at.first + r), p.dout.column_stride,
                  p.v_dim, dout);
    rows[r] = LoadRowData<Arch>(plane, at.head, at.first + r, lse, dout, out);
    if (MakeFinite<Arch>(w.v_columns, dout)) words.dout_not_finite |= uint64_t{1} << r;
  }
  ToColumnPanels<Arch>(scratch, stride, w.v_columns, TileOf(plane, w.dout, tile, w.v_columns));
  for (int64_t r = 0; r < core::kTile; ++r) {
    float* q = scratch + r * stride;
    ZeroRow(w.qk_columns, q);
    if ((words.empty >> r) & 1u) continue;
    LoadRow<Arch>(p.q.data, p.dtype, core::QueryOffset(p.q, plane.s, at.head, at.first + r),
                  p.q.column_stride, p.qk_dim, q);
    if (MakeFinite<Arch>(w.qk_columns, q)) words.q_not_finite |= uint64_t{1} << r;
  }
  ToColumnPanels<Arch>(scratch, stride, w.qk_columns, TileOf(plane, w.q, tile, w.qk_columns));
  *QueryWordsOf(plane, tile) = words;
  ZeroRow(core::kTile * w.qk_columns, TileOf(plane, w.dq, tile, w.qk_columns));
}

// K and V of a key tile. scratch: 64 rows.
template <class Arch>
__attribute__((flatten, noinline)) void PackKeyTiles(const Plane& plane, int64_t tile,
                                                     float* scratch) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const int64_t stride = RowScratchStride(p);
  const int64_t first = tile * core::kTile;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(plane.s) - first);
  KeyWords words = {0, 0};
  for (int part = 0; part < 2; ++part) {
    const core::Array4& from = part == 0 ? p.k : p.v;
    const int64_t dim = part == 0 ? p.qk_dim : p.v_dim;
    const int64_t columns = part == 0 ? w.qk_columns : w.v_columns;
    uint64_t* not_finite = part == 0 ? &words.k_not_finite : &words.v_not_finite;
    for (int64_t j = 0; j < core::kTile; ++j) {
      float* row = scratch + j * stride;
      ZeroRow(columns, row);
      if (j >= count) continue;
      LoadRow<Arch>(from.data, p.dtype, core::KeyOffset(from, plane.s, plane.kv_head, first + j),
                    from.column_stride, dim, row);
      if (MakeFinite<Arch>(columns, row)) *not_finite |= uint64_t{1} << j;
    }
    ToKeyPanels<Arch>(scratch, stride, dim,
                      plane.slot + (part == 0 ? w.k_keys : w.v_keys) + first * dim);
    if (part == 0) {
      ToColumnPanels<Arch>(scratch, stride, columns, TileOf(plane, w.k_columns, tile, columns));
    }
    ZeroRow(core::kTile * columns, TileOf(plane, part == 0 ? w.dk : w.dv, tile, columns));
  }
  *KeyWordsOf(plane, tile) = words;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_
