// What is done with sums when a plane or all planes are complete: gradients in the tensors' types
// and strides, and the gradients that are sums over rows.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_WRITE_GRADIENTS_H_
#define TANDEM_BACKEND_CPU_BACKWARD_WRITE_GRADIENTS_H_

#include "backend_cpu/backward/pack_tiles.h"
#include "backend_cpu/flash/output.h"
#include "backend_cpu/parallel.h"

namespace tandem::cpu {
namespace {

// `rows` rows of sums (null: zeros), `stride` apart, times `factor`, to rows of a gradient; + 0
// turns -0 into +0. line: a row of scratch.
template <class Arch, typename Offset>
TANDEM_ISA_INLINE void WriteRows(const core::Array4& gradient, const float* sums, int64_t stride,
                                 int64_t columns, int64_t dim, int64_t rows, float factor,
                                 float* line, const Offset& offset) {
  using V = Vector<Arch>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
      const V x = sums == nullptr ? V(0.0f) : V::load_aligned(sums + r * stride + c) * V(factor);
      (x + V(0.0f)).store_aligned(line + c);
    }
    StoreRow(gradient.data, gradient.dtype, offset(r), gradient.column_stride, dim, line);
  }
}

// rows: 65 rows of scratch.
template <class Multiplier>
__attribute__((flatten, noinline)) void WriteQueryTile(const Plane& plane, int64_t tile,
                                                       float* rows) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const QueryTile at = QueryTileAt(plane, tile);
  int64_t stride = RowScratchStride(p);
  float* line = rows + core::kTile * stride;
  const float* sums =
      Multiplier::QueryRows(SumsOf(plane, w.dq, tile, w.qk_columns), w.qk_columns, rows, &stride);
  WriteRows<typename Multiplier::Arch>(
      p.dq, sums, stride, w.qk_columns, p.qk_dim, at.count, p.scale, line,
      [&](int64_t r) { return core::QueryOffset(p.dq, plane.s, at.head, at.first + r); });
}

// dK or dV of a tile; `array` is where the sums are. Tiles beyond the sequence's keys get zeros.
template <class Multiplier>
TANDEM_ISA_INLINE void WriteKeyRows(const Plane& plane, int64_t tile, const core::Array4& gradient,
                                    int64_t array, int64_t columns, int64_t dim, float factor,
                                    float* rows) {
  if (gradient.data == nullptr) return;
  int64_t stride = RowScratchStride(*plane.p);
  float* line = rows + core::kTile * stride;
  const int64_t first = tile * core::kTile;
  const float* sums = nullptr;
  if (tile < plane.kv_tiles) {
    sums = Multiplier::KeyRows(SumsOf(plane, array, tile, columns), columns, rows, &stride);
  }
  WriteRows<typename Multiplier::Arch>(
      gradient, sums, stride, columns, dim,
      core::Min<int64_t>(core::kTile, plane.s.kv_rows - first), factor, line,
      [&](int64_t r) { return core::KeyOffset(gradient, plane.s, plane.kv_head, first + r); });
}

// Tiles of all of the tensors' keys.
template <class Multiplier>
__attribute__((flatten, noinline)) void WriteKeyTile(const Plane& plane, int64_t tile,
                                                     float* rows) {
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  WriteKeyRows<Multiplier>(plane, tile, p.dk, w.dk, w.qk_columns, p.qk_dim, p.scale, rows);
  WriteKeyRows<Multiplier>(plane, tile, p.dv, w.dv, w.v_columns, p.v_dim, 1.0f, rows);
}

// Sums over the rows of the plane's heads: dSink, dALiBi, and dBias where one element is for all
// keys.
TANDEM_ISA_INLINE void SumRows(const Plane& plane, void* workspace) {
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
    double* sums = HeadSums(p, *plane.layout, workspace, plane.s.batch, head);
    sums[0] = sink;
    sums[1] = alibi;
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
TANDEM_ISA_INLINE void WriteHeadSums(const core::Problem& p, const PlaneLayout& layout,
                                     void* workspace) {
  const auto sums_of = [&](int64_t b, int64_t head) {
    return HeadSums(p, layout, workspace, b, head);
  };
  const bool slopes_by_sequence = p.dalibi_batch_stride != 0;
  const bool slopes_by_head = p.dalibi_head_stride != 0;
  for (int64_t head = 0; head < p.q_heads; ++head) {
    double sink = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sink += sums_of(b, head)[0];
    if (p.dsink != nullptr) p.dsink[head * p.dsink_stride] = static_cast<float>(sink) + 0.0f;
  }
  if (p.dalibi == nullptr) return;
  for (int64_t b = 0; b < (slopes_by_sequence ? p.batch : 1); ++b) {
    for (int64_t head = 0; head < (slopes_by_head ? p.q_heads : 1); ++head) {
      double sum = 0.0;
      for (int64_t n = b; n < (slopes_by_sequence ? b + 1 : p.batch); ++n) {
        for (int64_t h = head; h < (slopes_by_head ? head + 1 : p.q_heads); ++h) {
          sum += sums_of(n, h)[1];
        }
      }
      p.dalibi[b * p.dalibi_batch_stride + head * p.dalibi_head_stride] =
          static_cast<float>(sum) + 0.0f;
    }
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_WRITE_GRADIENTS_H_
