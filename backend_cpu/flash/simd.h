// The vectors of the flash kernel: f32 batches of xsimd 8.1, and what xsimd 8.1 lacks (a fused
// multiply-add on AVX-512, lanes selected by bits, conversions of f16 and bf16).
//
// Only for ISA files. Everything of the flash kernel that they include is in an anonymous
// namespace: a function compiled for a newer instruction set must not become a weak symbol that
// the linker could hand to a baseline caller.
#ifndef TANDEM_BACKEND_CPU_FLASH_SIMD_H_
#define TANDEM_BACKEND_CPU_FLASH_SIMD_H_

#include <immintrin.h>

#include <xsimd/xsimd.hpp>

#include "core/element.h"

#define TANDEM_ISA_INLINE inline __attribute__((always_inline))

namespace tandem::cpu {
namespace {

using Avx2 = xsimd::fma3<xsimd::avx2>;

template <class Arch>
using Vector = xsimd::batch<float, Arch>;

template <class Arch>
constexpr int kLanes = static_cast<int>(Vector<Arch>::size);

TANDEM_ISA_INLINE Vector<Avx2> Fma(Vector<Avx2> a, Vector<Avx2> b, Vector<Avx2> c) {
  return xsimd::fma(a, b, c);
}

// Lane t is a where bit t is set, else b.
TANDEM_ISA_INLINE Vector<Avx2> SelectBits(uint64_t bits, Vector<Avx2> a, Vector<Avx2> b) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i word = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(word, lane_bit), lane_bit);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
}

// Bit t: lane t of a equals that of b (NaN equals nothing).
TANDEM_ISA_INLINE uint64_t EqualBits(Vector<Avx2> a, Vector<Avx2> b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}

// 2^n, where n + 1.5 * 2^23 is given and n is in [-127, 127]; 0 for n = -127.
TANDEM_ISA_INLINE Vector<Avx2> PowerOfTwo(Vector<Avx2> biased) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)));
}

TANDEM_ISA_INLINE float Sum(Vector<Avx2> x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The sums of four vectors.
TANDEM_ISA_INLINE __m128 Sum4(Vector<Avx2> a, Vector<Avx2> b, Vector<Avx2> c, Vector<Avx2> d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 sum =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

// The largest lane of a vector without NaN.
TANDEM_ISA_INLINE float Largest(Vector<Avx2> x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

TANDEM_ISA_INLINE Vector<Avx2> LoadF16(const uint16_t* p, Avx2) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TANDEM_ISA_INLINE Vector<Avx2> LoadBf16(const uint16_t* p, Avx2) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

#if defined(__AVX512F__)
using Avx512 = xsimd::avx512bw;

TANDEM_ISA_INLINE Vector<Avx512> Fma(Vector<Avx512> a, Vector<Avx512> b, Vector<Avx512> c) {
  return _mm512_fmadd_ps(a, b, c);
}

TANDEM_ISA_INLINE Vector<Avx512> SelectBits(uint64_t bits, Vector<Avx512> a, Vector<Avx512> b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a);
}

TANDEM_ISA_INLINE uint64_t EqualBits(Vector<Avx512> a, Vector<Avx512> b) {
  return _cvtmask16_u32(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ));
}

TANDEM_ISA_INLINE Vector<Avx512> PowerOfTwo(Vector<Avx512> biased) {
  const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23)));
}

TANDEM_ISA_INLINE Vector<Avx2> AddHalves(Vector<Avx512> x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

TANDEM_ISA_INLINE float Sum(Vector<Avx512> x) { return Sum(AddHalves(x)); }

TANDEM_ISA_INLINE __m128 Sum4(Vector<Avx512> a, Vector<Avx512> b, Vector<Avx512> c,
                              Vector<Avx512> d) {
  return Sum4(AddHalves(a), AddHalves(b), AddHalves(c), AddHalves(d));
}

TANDEM_ISA_INLINE float Largest(Vector<Avx512> x) {
  return Largest(
      Vector<Avx2>(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))));
}

TANDEM_ISA_INLINE Vector<Avx512> LoadF16(const uint16_t* p, Avx512) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TANDEM_ISA_INLINE Vector<Avx512> LoadBf16(const uint16_t* p, Avx512) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif  // __AVX512F__

// `count` elements from element `offset` on, `stride` apart, as f32. Reads nothing else: the last
// elements of a row may be the last of a page.
template <class Arch>
TANDEM_ISA_INLINE void LoadRow(const void* data, core::DType dtype, int64_t offset, int64_t stride,
                               int64_t count, float* row) {
  int64_t j = 0;
  if (stride == 1) {
    const char* base = static_cast<const char*>(data) + offset * core::ElementSize(dtype);
    const auto* halves = reinterpret_cast<const uint16_t*>(base);
    const int64_t whole = count - count % kLanes<Arch>;
    if (dtype == core::DType::kF32) {
      for (; j < whole; j += kLanes<Arch>) {
        Vector<Arch>::load_unaligned(reinterpret_cast<const float*>(base) + j)
            .store_unaligned(row + j);
      }
    } else if (dtype == core::DType::kF16) {
      for (; j < whole; j += kLanes<Arch>) LoadF16(halves + j, Arch{}).store_unaligned(row + j);
    } else {
      for (; j < whole; j += kLanes<Arch>) LoadBf16(halves + j, Arch{}).store_unaligned(row + j);
    }
  }
  for (; j < count; ++j) row[j] = core::LoadFloat(data, dtype, offset + j * stride);
}

// to[d][key] = from[key][d] for 8 keys and 8 d.
TANDEM_ISA_INLINE void Transpose8x8(const float* from, int64_t from_stride, float* to,
                                    int64_t to_stride) {
  __m256 row[8], pair[8], quad[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_SIMD_H_
