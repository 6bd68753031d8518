// Rows of f32 to the output's type, rounded to nearest even as core/element.h does.
#ifndef TANDEM_BACKEND_CPU_FLASH_OUTPUT_H_
#define TANDEM_BACKEND_CPU_FLASH_OUTPUT_H_

#include "backend_cpu/flash/simd.h"

namespace tandem::cpu {
namespace {

TANDEM_ISA_INLINE __m128i ToF16(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

TANDEM_ISA_INLINE __m128i ToBf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet_nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

#if defined(__AVX512F__)
TANDEM_ISA_INLINE __m256i ToF16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Not the conversion of AVX512_BF16, which takes subnormals for 0.
TANDEM_ISA_INLINE __m256i ToBf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
}
#endif

// Writes `count` elements from element `offset` on, `stride` apart.
TANDEM_ISA_INLINE void StoreRow(void* data, core::DType dtype, int64_t offset, int64_t stride,
                                int64_t count, const float* row) {
  int64_t j = 0;
  if (stride == 1) {
    char* base = static_cast<char*>(data) + offset * core::ElementSize(dtype);
#if defined(__AVX512F__)
    for (; j + 16 <= count; j += 16) {
      const __m512 x = _mm512_loadu_ps(row + j);
      if (dtype == core::DType::kF32) {
        _mm512_storeu_ps(reinterpret_cast<float*>(base) + j, x);
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(base + 2 * j),
                            dtype == core::DType::kF16 ? ToF16(x) : ToBf16(x));
      }
    }
#endif
    for (; j + 8 <= count; j += 8) {
      const __m256 x = _mm256_loadu_ps(row + j);
      if (dtype == core::DType::kF32) {
        _mm256_storeu_ps(reinterpret_cast<float*>(base) + j, x);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(base + 2 * j),
                         dtype == core::DType::kF16 ? ToF16(x) : ToBf16(x));
      }
    }
  }
  for (; j < count; ++j) core::StoreFloat(data, dtype, offset + j * stride, row[j]);
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_OUTPUT_H_
