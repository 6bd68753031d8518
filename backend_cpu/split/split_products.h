// The products of a few rows with a tile of keys or values that is read where it is: each element
// comes from memory once, is converted on the way, and meets all rows while it is in a register or
// the first cache.
//
// Memory is asked for in the order of its addresses, row by row, whatever order the products take
// their operands in: only such a stream comes at the speed that memory has.
#ifndef TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_
#define TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_

#include "backend_cpu/flash/simd.h"

namespace tandem::cpu {
namespace {

// A tile of keys or values: rows of whole vectors, `stride` bytes apart. While a row is worked on,
// the `row_bytes` of the row `rows_ahead` after it are asked for; 0: nothing is, as the tile is in
// a cache.
struct TileRowsView {
  const char* data;
  int64_t stride;
  int64_t row_bytes;
  int64_t rows_ahead;
};

template <core::DType kType>
inline constexpr int64_t kElementSize = kType == core::DType::kF32 ? 4 : 2;

template <class Arch>
inline constexpr int64_t kPairLanes = 2 * kLanes<Arch>;

// Columns are worked on by pairs of vectors, and a last vector alone where their number is odd.
// Pairs of bf16 are taken apart into the elements at even and at odd places, which costs half of
// what keeping their order would: this is the order of q, and of the sums of values.
// Calls visit(column, its place in that order).
template <class Arch, typename Visit>
TANDEM_ISA_INLINE void ForEachColumn(core::DType type, int64_t columns, Visit visit) {
  const int64_t paired = type == core::DType::kBF16 ? columns - columns % kPairLanes<Arch> : 0;
  for (int64_t c = 0; c < paired; c += kPairLanes<Arch>) {
    for (int64_t t = 0; t < kLanes<Arch>; ++t) {
      visit(c + 2 * t, c + t);
      visit(c + 2 * t + 1, c + kLanes<Arch> + t);
    }
  }
  for (int64_t c = paired; c < columns; ++c) visit(c, c);
}

template <class Arch>
TANDEM_ISA_INLINE void ToPairOrder(core::DType type, int64_t columns, const float* from,
                                   float* to) {
  ForEachColumn<Arch>(type, columns,
                      [&](int64_t column, int64_t place) { to[place] = from[column]; });
}

template <class Arch>
TANDEM_ISA_INLINE void FromPairOrder(core::DType type, int64_t columns, const float* from,
                                     float* to) {
  ForEachColumn<Arch>(type, columns,
                      [&](int64_t column, int64_t place) { to[column] = from[place]; });
}

TANDEM_ISA_INLINE void SplitBf16(const char* from, Vector<Avx2>* even, Vector<Avx2>* odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
}
#if defined(__AVX512F__)
TANDEM_ISA_INLINE void SplitBf16(const char* from, Vector<Avx512>* even, Vector<Avx512>* odd) {
  const __m512i words = _mm512_loadu_si512(from);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
}
#endif  // __AVX512F__

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

// kVectors (1 or 2) vectors of columns.
template <class Arch, core::DType kType, int kVectors>
TANDEM_ISA_INLINE void LoadColumns(const char* from, Vector<Arch>* to) {
  if constexpr (kVectors == 2 && kType == core::DType::kBF16) {
    SplitBf16(from, &to[0], &to[1]);
  } else {
    for (int n = 0; n < kVectors; ++n) {
      to[n] = LoadElements<Arch, kType>(from + n * kLanes<Arch> * kElementSize<kType>);
    }
  }
}

// Asks for rows in the order of their addresses, a few cache lines at a time, into the second
// cache: what fits the first would be too little ahead.
class RowsAhead {
 public:
  TANDEM_ISA_INLINE RowsAhead(const TileRowsView& view, int64_t row)
      : line_(view.data + (row + view.rows_ahead) * view.stride),
        gap_(view.stride - view.row_bytes),
        row_bytes_(view.row_bytes),
        row_left_(gap_ == 0 ? INT64_MAX : row_bytes_) {}

  template <int kLines>
  TANDEM_ISA_INLINE void Ask() {
#pragma GCC unroll 16
    for (int n = 0; n < kLines; ++n) {
      _mm_prefetch(line_, _MM_HINT_T1);
      line_ += 64;
      row_left_ -= 64;
      if (row_left_ <= 0) {
        line_ += row_left_ + gap_;
        row_left_ = row_bytes_;
      }
    }
  }

 private:
  const char* line_;
  int64_t gap_;
  int64_t row_bytes_;
  int64_t row_left_;  // bytes of the row from line_ on; rows without gaps are one long row
};

// Rows that a block of registers holds at most; keys between two rounds of loading and storing O.
inline constexpr int kBlockRowsOfSplit = 4;
template <core::DType kType>
inline constexpr int kValueKeys = kType == core::DType::kF32 ? 4 : 8;

// Rows of q and of scores are this many floats apart: constants, so that one register addresses
// all rows of a block, and odd multiples of a cache line, so that rows do not share cache sets.
inline constexpr int64_t kSplitQueryStride = 512 + 16;
inline constexpr int64_t kSplitScoreStride = 512 + 16;

// Adds the products of kVectors vectors at `place` of kRows rows and of two keys.
template <class Arch, core::DType kType, int kRows, int kVectors>
TANDEM_ISA_INLINE void AddProducts(const float* q, const char* first, const char* second,
                                   Vector<Arch> (*sum)[2]) {
  using V = Vector<Arch>;
  V a[kVectors], b[kVectors];
  LoadColumns<Arch, kType, kVectors>(first, a);
  LoadColumns<Arch, kType, kVectors>(second, b);
#pragma GCC unroll 2
  for (int n = 0; n < kVectors; ++n) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      V query = V::load_aligned(q + r * kSplitQueryStride + n * kLanes<Arch>);
      // Loaded once: the compiler would load it for each of the two products.
      asm("" : "+v"(query.data));
      sum[r][0] = Fma(query, a[n], sum[r][0]);
      sum[r][1] = Fma(query, b[n], sum[r][1]);
    }
  }
}

// scores[r][j] = <q_r, k_j> for kRows rows and the first `keys` keys; where that is
// odd, the score after the last is overwritten. depth: whole vectors.
template <class Arch, core::DType kType, int kRows>
__attribute__((noinline)) void ScoreRows(const float* q, const TileRowsView& k, int64_t keys,
                                         int64_t depth, float* scores) {
  using V = Vector<Arch>;
  constexpr int64_t kStep = kPairLanes<Arch> * kElementSize<kType>;
  for (int64_t j = 0; j < keys; j += 2) {
    V sum[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = V(0.0f);
      sum[r][1] = V(0.0f);
    }
    const char* first = k.data + j * k.stride;
    const char* second = j + 1 < keys ? first + k.stride : first;
    RowsAhead ahead(k, j);
    int64_t d = 0;
    for (; d + kPairLanes<Arch> <= depth; d += kPairLanes<Arch>) {
      if (k.rows_ahead != 0) ahead.Ask<2 * kStep / 64>();
      AddProducts<Arch, kType, kRows, 2>(q + d, first, second, sum);
      first += kStep;
      second += kStep;
    }
    if (d < depth) AddProducts<Arch, kType, kRows, 1>(q + d, first, second, sum);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r += 2) {
      const int next = r + 1 < kRows ? r + 1 : r;
      const __m128 sums = Sum4(sum[r][0], sum[r][1], sum[next][0], sum[next][1]);
      _mm_storel_pi(reinterpret_cast<__m64*>(scores + r * kSplitScoreStride + j), sums);
      if (next > r) {
        _mm_storeh_pi(reinterpret_cast<__m64*>(scores + (r + 1) * kSplitScoreStride + j), sums);
      }
    }
  }
}

// Scores of `rows` rows with the first `keys` keys of a tile. Memory is asked for once.
template <class Arch, core::DType kType>
TANDEM_ISA_INLINE void ScoreTile(const float* q, int64_t rows, TileRowsView k, int64_t keys,
                                 int64_t depth, float* scores) {
  for (int64_t r = 0; r < rows; r += kBlockRowsOfSplit) {
    const float* block = q + r * kSplitQueryStride;
    float* to = scores + r * kSplitScoreStride;
    switch (rows - r) {
      case 1:
        ScoreRows<Arch, kType, 1>(block, k, keys, depth, to);
        break;
      case 2:
        ScoreRows<Arch, kType, 2>(block, k, keys, depth, to);
        break;
      case 3:
        ScoreRows<Arch, kType, 3>(block, k, keys, depth, to);
        break;
      default:
        ScoreRows<Arch, kType, 4>(block, k, keys, depth, to);
    }
    k.rows_ahead = 0;
  }
}

// o[r] += p[r][j] v[j] over kVectors vectors of columns, for kRows rows and kKeys keys: those of
// `list`, or where that is null the first.
template <class Arch, core::DType kType, int kRows, int kKeys, int kVectors>
TANDEM_ISA_INLINE void AddValues(const float* p, const char* v, int64_t v_stride,
                                 const uint8_t* list, float* o, int64_t o_stride) {
  using V = Vector<Arch>;
  V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      sum[r][n] = V::load_aligned(o + r * o_stride + n * kLanes<Arch>);
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < kKeys; ++key) {
    const int64_t j = list != nullptr ? list[key] : key;
    V value[kVectors];
    LoadColumns<Arch, kType, kVectors>(v + j * v_stride, value);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V probability(p[r * kSplitScoreStride + j]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] = Fma(probability, value[n], sum[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      sum[r][n].store_aligned(o + r * o_stride + n * kLanes<Arch>);
    }
  }
}

// The same over all columns.
template <class Arch, core::DType kType, int kRows, int kKeys>
TANDEM_ISA_INLINE void AddKeys(const float* p, const TileRowsView& v, int64_t first,
                               const uint8_t* list, int64_t columns, float* o, int64_t o_stride) {
  constexpr int64_t kStep = kPairLanes<Arch> * kElementSize<kType>;
  const char* data = v.data;
  if (list == nullptr) {
    data += first * v.stride;
    p += first;
  }
  RowsAhead ahead(v, first);
  int64_t c = 0;
  for (; c + kPairLanes<Arch> <= columns; c += kPairLanes<Arch>) {
    if (v.rows_ahead != 0 && kKeys > 1) ahead.Ask<kKeys * kStep / 64>();
    AddValues<Arch, kType, kRows, kKeys, 2>(p, data, v.stride, list, o + c, o_stride);
    data += kStep;
  }
  if (c < columns) {
    AddValues<Arch, kType, kRows, kKeys, 1>(p, data, v.stride, list, o + c, o_stride);
  }
}

template <class Arch, core::DType kType, int kRows>
__attribute__((noinline)) void ValueRows(const float* p, const TileRowsView& v, uint64_t word,
                                         int64_t columns, float* o, int64_t o_stride) {
  if (word == ~uint64_t{0}) {
    for (int64_t j = 0; j < core::kTile; j += kValueKeys<kType>) {
      AddKeys<Arch, kType, kRows, kValueKeys<kType>>(p, v, j, nullptr, columns, o, o_stride);
    }
    return;
  }
  uint8_t list[core::kTile];
  int count = 0;
  for (; word != 0; word &= word - 1) list[count++] = static_cast<uint8_t>(__builtin_ctzll(word));
  int n = 0;
  for (; n + kValueKeys<kType> <= count; n += kValueKeys<kType>) {
    AddKeys<Arch, kType, kRows, kValueKeys<kType>>(p, v, list[n], list + n, columns, o, o_stride);
  }
  for (; n < count; ++n) {
    AddKeys<Arch, kType, kRows, 1>(p, v, list[n], list + n, columns, o, o_stride);
  }
}

// O += P V for `rows` rows that all see the keys of `word`, in the order of the keys. columns:
// whole vectors. Memory is asked for once.
template <class Arch, core::DType kType>
TANDEM_ISA_INLINE void AddTileValues(const float* p, int64_t rows, TileRowsView v, uint64_t word,
                                     int64_t columns, float* o, int64_t o_stride) {
  for (int64_t r = 0; r < rows; r += kBlockRowsOfSplit) {
    const float* from = p + r * kSplitScoreStride;
    float* to = o + r * o_stride;
    switch (rows - r) {
      case 1:
        ValueRows<Arch, kType, 1>(from, v, word, columns, to, o_stride);
        break;
      case 2:
        ValueRows<Arch, kType, 2>(from, v, word, columns, to, o_stride);
        break;
      case 3:
        ValueRows<Arch, kType, 3>(from, v, word, columns, to, o_stride);
        break;
      default:
        ValueRows<Arch, kType, 4>(from, v, word, columns, to, o_stride);
    }
    v.rows_ahead = 0;
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_SPLIT_SPLIT_PRODUCTS_H_
