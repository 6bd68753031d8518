// What packing left out: elements of q, k, v and dO that the products cannot stand for, for the
// pairs that are visible. Rare, so written plainly.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_CORRECTIONS_H_
#define TANDEM_BACKEND_CPU_BACKWARD_CORRECTIONS_H_

#include "backend_cpu/backward/tile_pair.h"

namespace tandem::cpu {
namespace {

// A row of one of the tensors.
struct RawRow {
  const core::Array4* array;
  int64_t offset;
  float At(int64_t column) const {
    return core::LoadFloat(array->data, array->dtype, offset + column * array->column_stride);
  }
};

TANDEM_HD RawRow RawQueryRow(const TilePair& pair, const core::Array4& array, int64_t r) {
  return {&array, core::QueryOffset(array, pair.plane->s, pair.rows.head, pair.rows.first + r)};
}
TANDEM_HD RawRow RawKeyRow(const TilePair& pair, const core::Array4& array, int64_t j) {
  return {&array, core::KeyOffset(array, pair.plane->s, pair.plane->kv_head, pair.first_key + j)};
}

// Products <row, key> again from what the tensors hold, for visible pairs of the rows and keys
// marked.
TANDEM_ISA_INLINE void RedoProducts(const TilePair& pair, const core::Array4& of_rows,
                                    uint64_t marked_rows, const core::Array4& of_keys,
                                    uint64_t marked_keys, int64_t dim, float* products) {
  for (int64_t r = pair.row_begin; r < pair.row_end; ++r) {
    const bool whole_row = (marked_rows >> r) & 1u;
    uint64_t word = pair.scratch->visible[r] & (whole_row ? ~uint64_t{0} : marked_keys);
    for (; word != 0; word &= word - 1) {
      const int64_t j = __builtin_ctzll(word);
      const RawRow a = RawQueryRow(pair, of_rows, r), b = RawKeyRow(pair, of_keys, j);
      float sum = 0.0f;
      for (int64_t d = 0; d < dim; ++d) sum += a.At(d) * b.At(d);
      products[r * core::kTile + j] = sum;
    }
  }
}

__attribute__((noinline)) inline void CorrectProducts(const TilePair& pair) {
  const core::Problem& p = *pair.plane->p;
  const QueryWords& q = *QueryWordsOf(*pair.plane, pair.q_tile);
  const KeyWords& k = *KeyWordsOf(*pair.plane, pair.kv_tile);
  RedoProducts(pair, p.q, q.q_left_out, p.k, k.k_left_out, p.qk_dim, pair.scratch->p);
  RedoProducts(pair, p.dout, q.dout_left_out, p.v, k.v_left_out, p.v_dim, pair.scratch->ds);
}

// sums(row or key, column) += factor * element for the elements of marked rows that were left out.
// by_rows: the marked are query rows and the sums are of keys; else the other way round.
template <class Multiplier>
TANDEM_ISA_INLINE void AddElements(const TilePair& pair, bool by_rows, const core::Array4& array,
                                   uint64_t marked, const uint64_t* words, const float* factors,
                                   int64_t dim, float* sums, int64_t columns) {
  for (; marked != 0; marked &= marked - 1) {
    const int64_t n = __builtin_ctzll(marked);
    const RawRow row = by_rows ? RawQueryRow(pair, array, n) : RawKeyRow(pair, array, n);
    for (int64_t c = 0; c < dim; ++c) {
      const float x = row.At(c);
      if (!Multiplier::IsLeftOut(x)) continue;
      for (int64_t m = by_rows ? 0 : pair.row_begin; m < (by_rows ? core::kTile : pair.row_end);
           ++m) {
        const int64_t r = by_rows ? n : m, j = by_rows ? m : n;
        if (((words[r] >> j) & 1u) != 0) {
          sums[by_rows ? Multiplier::KeySum(m, c, columns) : Multiplier::QuerySum(m, c, columns)] +=
              factors[r * core::kTile + j] * x;
        }
      }
    }
  }
}

template <class Multiplier>
__attribute__((noinline)) void CorrectSums(const TilePair& pair) {
  const Plane& plane = *pair.plane;
  const core::Problem& p = *plane.p;
  const PlaneLayout& w = *plane.layout;
  const QueryWords& q = *QueryWordsOf(plane, pair.q_tile);
  const KeyWords& k = *KeyWordsOf(plane, pair.kv_tile);
  const uint64_t rows = core::IntervalWord(pair.row_begin, pair.row_end);
  const PairScratch& scratch = *pair.scratch;
  AddElements<Multiplier>(pair, false, p.k, k.k_left_out, scratch.visible, scratch.ds, p.qk_dim,
                          SumsOf(plane, w.dq, pair.q_tile, w.qk_columns), w.qk_columns);
  AddElements<Multiplier>(pair, true, p.q, q.q_left_out & rows, scratch.visible, scratch.ds,
                          p.qk_dim, SumsOf(plane, w.dk, pair.kv_tile, w.qk_columns), w.qk_columns);
  AddElements<Multiplier>(pair, true, p.dout, q.dout_left_out & rows, scratch.kept, scratch.p,
                          p.v_dim, SumsOf(plane, w.dv, pair.kv_tile, w.v_columns), w.v_columns);
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_CORRECTIONS_H_
