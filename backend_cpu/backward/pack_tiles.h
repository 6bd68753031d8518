// Packing of tiles of 64 rows into operands. Rows that do not exist, and elements that the products
// cannot stand for, are zeros: 0 * NaN would reach pairs that are not visible. A word tells which
// rows held such elements; corrections.h adds them where they are visible.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_
#define TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_

#include "backend_cpu/backward/plane.h"
#include "backend_cpu/flash/simd.h"
#include "core/gradient.h"

namespace tandem::cpu {
namespace {

// Rows of packing scratch are apart by this many floats.
TANDEM_HD int64_t RowScratchStride(const core::Problem& p) {
  return core::RoundUp<int64_t>(core::Max(p.qk_dim, p.v_dim), 32);
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

// Q, dO and what belongs to the rows of a query tile. rows: 65 rows of scratch; scratch: the
// multiplier's.
template <class Multiplier>
__attribute__((flatten, noinline)) void PackQueryTile(const Plane& plane, int64_t tile, float* rows,
                                                      void* scratch) {
  using Arch = typename Multiplier::Arch;
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const QueryTile at = QueryTileAt(plane, tile);
  const int64_t stride = RowScratchStride(p);
  RowData* data = RowsOf(plane, tile);
  QueryWords words = {0, 0, 0};
  float* out = rows + core::kTile * stride;
  for (int64_t r = 0; r < core::kTile; ++r) {
    float* dout = rows + r * stride;
    ZeroRow(w.v_columns, dout);
    data[r] = {0.0f, 0.0f, 0.0f, 0.0f};
    words.empty |= uint64_t{1} << r;
    if (r >= at.count || !core::RowExists(plane.s, at.first + r)) continue;
    const float lse = core::LoadFloat(p.lse.data, core::DType::kF32,
                                      core::QueryOffset(p.lse, plane.s, at.head, at.first + r));
    if (core::GradientRowIsEmpty(lse)) continue;
    words.empty &= ~(uint64_t{1} << r);
    LoadRow<Arch>(p.dout.data, p.dout.dtype,
                  core::QueryOffset(p.dout, plane.s, at.head, at.first + r), p.dout.column_stride,
                  p.v_dim, dout);
    data[r] = LoadRowData<Arch>(plane, at.head, at.first + r, lse, dout, out);
    if (Multiplier::LeaveOut(w.v_columns, dout)) words.dout_left_out |= uint64_t{1} << r;
  }
  Multiplier::PackQueries(rows, stride, p.v_dim, OperandOf(plane, w.dout, tile, w.sizes.dout),
                          scratch);
  for (int64_t r = 0; r < core::kTile; ++r) {
    float* q = rows + r * stride;
    ZeroRow(w.qk_columns, q);
    if ((words.empty >> r) & 1u) continue;
    LoadRow<Arch>(p.q.data, p.dtype, core::QueryOffset(p.q, plane.s, at.head, at.first + r),
                  p.q.column_stride, p.qk_dim, q);
    if (Multiplier::LeaveOut(w.qk_columns, q)) words.q_left_out |= uint64_t{1} << r;
  }
  Multiplier::PackQueries(rows, stride, p.qk_dim, OperandOf(plane, w.q, tile, w.sizes.q), scratch);
  *QueryWordsOf(plane, tile) = words;
  ZeroRow(core::kTile * w.qk_columns, SumsOf(plane, w.dq, tile, w.qk_columns));
}

// Keys of `from`, which is K or V, as rows of scratch. Returns those with elements left out.
template <class Multiplier>
TANDEM_ISA_INLINE uint64_t LoadKeys(const Plane& plane, int64_t tile, const core::Array4& from,
                                    int64_t dim, int64_t columns, float* rows) {
  const core::Problem& p = *plane.p;
  const int64_t stride = RowScratchStride(p);
  const int64_t first = tile * core::kTile;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(plane.s) - first);
  uint64_t left_out = 0;
  for (int64_t j = 0; j < core::kTile; ++j) {
    float* row = rows + j * stride;
    ZeroRow(columns, row);
    if (j >= count) continue;
    LoadRow<typename Multiplier::Arch>(from.data, p.dtype,
                                       core::KeyOffset(from, plane.s, plane.kv_head, first + j),
                                       from.column_stride, dim, row);
    if (Multiplier::LeaveOut(columns, row)) left_out |= uint64_t{1} << j;
  }
  return left_out;
}

// K and V of a key tile.
template <class Multiplier>
__attribute__((flatten, noinline)) void PackKeyTile(const Plane& plane, int64_t tile, float* rows,
                                                    void* scratch) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const int64_t stride = RowScratchStride(p);
  KeyWords words;
  words.k_left_out = LoadKeys<Multiplier>(plane, tile, p.k, p.qk_dim, w.qk_columns, rows);
  Multiplier::PackKeys(rows, stride, p.qk_dim, OperandOf(plane, w.k, tile, w.sizes.k), scratch);
  words.v_left_out = LoadKeys<Multiplier>(plane, tile, p.v, p.v_dim, w.v_columns, rows);
  Multiplier::PackValues(rows, stride, p.v_dim, OperandOf(plane, w.v, tile, w.sizes.v), scratch);
  *KeyWordsOf(plane, tile) = words;
  ZeroRow(core::kTile * w.qk_columns, SumsOf(plane, w.dk, tile, w.qk_columns));
  ZeroRow(core::kTile * w.v_columns, SumsOf(plane, w.dv, tile, w.v_columns));
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_PACK_TILES_H_
