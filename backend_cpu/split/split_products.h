// The products of a few rows with a tile of keys or values that is read where it is: each element
// comes from memory once, is converted on the way, and meets all rows while it is in a register or
// the first cache.
#ifndef TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_
#define TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_

#include "backend_cpu/flash/simd.h"

namespace tandem::cpu {
namespace {

// A tile of keys or values: rows of whole vectors, `stride` bytes apart. What is `ahead` bytes
// after what is read is asked for, evenly as the work goes on; 0: nothing is, as the tile is in a
// cache.
struct TileRowsView {
  const char* data;
  int64_t stride;
  int64_t ahead;
};

template <class Arch, core::DType kType>
TANDEM_ISA_INLINE Vector<Arch> LoadElements(const char* from) {
  if constexpr (kType == core::DType::kF32) {
    return Vector<Arch>::load_unaligned(reinterpret_cast<const float*>(from));
  } else if constexpr (kType == core::DType::kF16) {
    return LoadF16(reinterpret_cast<const uint16_t*>(from), Arch{});
  } else {
    return LoadBf16(reinterpret_cast<const uint16_t*>(from), Arch{});
  }
}

template <core::DType kType>
inline constexpr int64_t kElementSize = kType == core::DType::kF32 ? 4 : 2;

// Rows that a block of registers holds, for 4 keys; and rows by vectors of a block of values.
template <class Arch>
constexpr int kScoreRows = kLanes<Arch> == 16 ? 4 : 2;
inline constexpr int kValueRows = 4;
template <class Arch>
constexpr int kValueVectors = kLanes<Arch> == 16 ? 4 : 2;

// scores[r][j] = <q_r, k_j> for kRows rows and kKeys keys (1 or 4).
template <class Arch, core::DType kType, int kRows, int kKeys>
TANDEM_ISA_INLINE void ScoreBlock(const float* q, int64_t q_stride, const char* k, int64_t k_stride,
                                  int64_t depth, float* scores, int64_t score_stride) {
  using V = Vector<Arch>;
  V sum[kRows][kKeys];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) sum[r][j] = V(0.0f);
  }
  for (int64_t d = 0; d < depth; d += kLanes<Arch>) {
    V key[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) {
      key[j] = LoadElements<Arch, kType>(k + j * k_stride + d * kElementSize<kType>);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V query = V::load_aligned(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) sum[r][j] = Fma(query, key[j], sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kKeys == 4) {
      _mm_storeu_ps(scores + r * score_stride, Sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    } else {
      scores[r * score_stride] = Sum(sum[r][0]);
    }
  }
}

template <class Arch, core::DType kType, int kRows>
__attribute__((noinline)) void ScoreRows(const float* q, int64_t q_stride, const TileRowsView& k,
                                         int64_t keys, int64_t depth, float* scores,
                                         int64_t score_stride) {
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    const char* row = k.data + j * k.stride;
    if (k.ahead != 0) {
      for (int64_t n = 0; n < 4; ++n) {
        const char* next = row + n * k.stride + k.ahead;
        for (int64_t d = 0; d < depth * kElementSize<kType>; d += 64) {
          _mm_prefetch(next + d, _MM_HINT_T0);
        }
      }
    }
    ScoreBlock<Arch, kType, kRows, 4>(q, q_stride, row, k.stride, depth, scores + j, score_stride);
  }
  for (; j < keys; ++j) {
    ScoreBlock<Arch, kType, kRows, 1>(q, q_stride, k.data + j * k.stride, k.stride, depth,
                                      scores + j, score_stride);
  }
}

// Scores of `rows` rows with the first `keys` keys of a tile. depth: whole vectors.
template <class Arch, core::DType kType>
TANDEM_ISA_INLINE void ScoreTile(const float* q, int64_t q_stride, int64_t rows,
                                 const TileRowsView& k, int64_t keys, int64_t depth, float* scores,
                                 int64_t score_stride) {
  for (int64_t r = 0; r < rows;) {
    const float* block = q + r * q_stride;
    float* to = scores + r * score_stride;
    if (rows - r >= kScoreRows<Arch>) {
      ScoreRows<Arch, kType, kScoreRows<Arch>>(block, q_stride, k, keys, depth, to, score_stride);
      r += kScoreRows<Arch>;
    } else if (rows - r >= 2) {
      ScoreRows<Arch, kType, 2>(block, q_stride, k, keys, depth, to, score_stride);
      r += 2;
    } else {
      ScoreRows<Arch, kType, 1>(block, q_stride, k, keys, depth, to, score_stride);
      r += 1;
    }
  }
}

// o[r][c] += p[r][j] v[j][c] for the keys of `word`, in their order, over kVectors vectors of
// columns.
template <class Arch, core::DType kType, int kRows, int kVectors>
TANDEM_ISA_INLINE void ValueBlock(const float* p, int64_t p_stride, const TileRowsView& v,
                                  uint64_t word, int64_t column, float* o, int64_t o_stride) {
  using V = Vector<Arch>;
  V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sum[r][n] = V::load_aligned(o + r * o_stride + column + n * kLanes<Arch>);
    }
  }
  const char* data = v.data + column * kElementSize<kType>;
  for (; word != 0; word &= word - 1) {
    const int64_t j = __builtin_ctzll(word);
    if (v.ahead != 0) {
      for (int64_t n = 0; n < kVectors * kLanes<Arch> * kElementSize<kType>; n += 64) {
        _mm_prefetch(data + j * v.stride + v.ahead + n, _MM_HINT_T0);
      }
    }
    V value[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      value[n] =
          LoadElements<Arch, kType>(data + j * v.stride + n * kLanes<Arch> * kElementSize<kType>);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V probability(p[r * p_stride + j]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[r][n] = Fma(probability, value[n], sum[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sum[r][n].store_aligned(o + r * o_stride + column + n * kLanes<Arch>);
    }
  }
}

template <class Arch, core::DType kType, int kRows>
__attribute__((noinline)) void ValueRows(const float* p, int64_t p_stride, const TileRowsView& v,
                                         uint64_t word, int64_t columns, float* o,
                                         int64_t o_stride) {
  constexpr int64_t kWidth = kValueVectors<Arch> * kLanes<Arch>;
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    ValueBlock<Arch, kType, kRows, kValueVectors<Arch>>(p, p_stride, v, word, c, o, o_stride);
  }
  for (; c < columns; c += kLanes<Arch>) {
    ValueBlock<Arch, kType, kRows, 1>(p, p_stride, v, word, c, o, o_stride);
  }
}

// O += P V for `rows` rows that all see the keys of `word`. columns: whole vectors.
template <class Arch, core::DType kType>
TANDEM_ISA_INLINE void AddTileValues(const float* p, int64_t p_stride, int64_t rows,
                                     const TileRowsView& v, uint64_t word, int64_t columns,
                                     float* o, int64_t o_stride) {
  int64_t r = 0;
  for (; r + kValueRows <= rows; r += kValueRows) {
    ValueRows<Arch, kType, kValueRows>(p + r * p_stride, p_stride, v, word, columns,
                                       o + r * o_stride, o_stride);
  }
  for (; r < rows; ++r) {
    ValueRows<Arch, kType, 1>(p + r * p_stride, p_stride, v, word, columns, o + r * o_stride,
                              o_stride);
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_
