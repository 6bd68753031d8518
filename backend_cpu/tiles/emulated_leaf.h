// The tiles of amx_leaf.h in AVX2: the same products in the same order, subnormal numbers taken for
// 0, so that any machine can test the algorithm over them.
#ifndef TANDEM_BACKEND_CPU_TILES_EMULATED_LEAF_H_
#define TANDEM_BACKEND_CPU_TILES_EMULATED_LEAF_H_

#include <cstring>

#include "backend_cpu/flash/output.h"
#include "backend_cpu/tiles/parts.h"

namespace tandem::cpu {
namespace {

struct EmulatedLeaf {
  using Arch = Avx2;
  using V = Vector<Arch>;

  // A register: 16 rows of 16 words, each two bf16 numbers or one f32 number.
  struct alignas(64) Register {
    uint32_t word[16][16];
  };

  class Tiles {
   public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int kTile>
    void Zero() {
      std::memset(&register_[kTile], 0, sizeof(Register));
    }
    template <int kTile, bool /*kReadsOnce*/ = false>
    void Load(const void* from) {
      std::memcpy(&register_[kTile], from, sizeof(Register));
    }
    template <int kTile, int kStride = 16>
    void Store(float* to) {
      for (int n = 0; n < 16; ++n) {
        std::memcpy(to + n * kStride, register_[kTile].word[n], sizeof(register_[kTile].word[n]));
      }
    }
    template <int kC, int kA, int kB>
    void Multiply() {
      MultiplyRegisters(register_[kA], register_[kB], &register_[kC]);
    }

   private:
    Register register_[8];
  };

  template <int kDegree>
  TANDEM_ISA_INLINE static V Exp2(V x) {
    // max and min return their second operand when either is NaN. 2^128 is infinity.
    x = xsimd::min(V(128.0f), xsimd::max(V(-127.0f), x));
    const V floor = _mm256_floor_ps(x);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
    const V power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return Exp2Polynomial<kDegree, Arch>(x - floor) * power;
  }
  template <int kDegree>
  TANDEM_ISA_INLINE static V Exp2Visible(uint64_t bits, V x) {
    return SelectBits(bits, Exp2<kDegree>(x), V(0.0f));
  }

  TANDEM_ISA_INLINE static V Larger(V x, V largest) { return xsimd::max(x, largest); }
  TANDEM_ISA_INLINE static V LargerVisible(uint64_t bits, V x, V largest) {
    return SelectBits(bits, xsimd::max(x, largest), largest);
  }
  TANDEM_ISA_INLINE static bool AnyAbove(V a, V b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
  }

  TANDEM_ISA_INLINE static V RoundToBf16(V x) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000));
    return _mm256_castsi256_ps(
        _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  TANDEM_ISA_INLINE static V CutToBf16(V x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  TANDEM_ISA_INLINE static void Store32(const V (&x)[4], uint16_t* to) {
    for (int v = 0; v < 4; ++v) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * v), ToBf16(x[v]));
    }
  }

  TANDEM_ISA_INLINE static void Load32Bf16(const uint16_t* from, V (&x)[4]) {
    for (int v = 0; v < 4; ++v) x[v] = LoadBf16(from + 8 * v, Arch{});
  }

  TANDEM_ISA_INLINE static bool AllInRange(const PartRange& range, const float* x, int64_t count) {
    const __m256i sign = _mm256_set1_epi32(0x7fffffff);
    const __m256i last = _mm256_set1_epi32(static_cast<int>(range.end - 1));
    const __m256i lowest = _mm256_set1_epi32(static_cast<int>(range.lowest));
    const __m256i zero = _mm256_setzero_si256();
    __m256i outside = zero;
    for (int64_t n = 0; n < count; n += 8) {
      const __m256i bits =
          _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + n)), sign);
      const __m256i small =
          _mm256_and_si256(_mm256_cmpgt_epi32(lowest, bits), _mm256_cmpgt_epi32(bits, zero));
      outside = _mm256_or_si256(outside, _mm256_or_si256(small, _mm256_cmpgt_epi32(bits, last)));
    }
    return _mm256_testz_si256(outside, outside) != 0;
  }

  TANDEM_ISA_INLINE static bool Copy32Bf16(const PartRange& range, const uint16_t* from,
                                           uint16_t* to) {
    const Bf16Range halves = HalfRange(range);
    __m256i outside = _mm256_setzero_si256();
    for (int n = 0; n < 32; n += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + n));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n), x);
      const __m256i bits = _mm256_and_si256(x, _mm256_set1_epi16(0x7fff));
      const __m256i above = _mm256_sub_epi16(bits, _mm256_set1_epi16(halves.lowest));
      const __m256i is_above =
          _mm256_cmpeq_epi16(_mm256_max_epu16(above, _mm256_set1_epi16(halves.size)), above);
      outside = _mm256_or_si256(
          outside, _mm256_andnot_si256(_mm256_cmpeq_epi16(bits, _mm256_setzero_si256()), is_above));
    }
    return _mm256_testz_si256(outside, outside) != 0;
  }

  TANDEM_ISA_INLINE static void Interleave16(const uint16_t* even, const uint16_t* odd,
                                             uint16_t* to) {
    for (int n = 0; n < 16; n += 8) {
      const __m256i low =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(even + n)));
      const __m256i high =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(odd + n)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * n),
                          _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
    }
  }

 private:
  TANDEM_ISA_INLINE static __m256 First(__m256i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  TANDEM_ISA_INLINE static __m256 Second(__m256i words) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  // As TDPBF16PS: the first numbers of the pairs are one chain of 16 products, the second another,
  // and their sum is added to C; subnormal operands and results are 0. AddressSanitizer's checks of
  // registers, which have no neighbours to be mistaken for, would be most of its time: the loads
  // and stores of tiles are checked.
  __attribute__((noinline, no_sanitize("address"))) static void MultiplyRegisters(const Register& a,
                                                                                  const Register& b,
                                                                                  Register* c) {
    constexpr unsigned kFlushSubnormals = 0x8040;
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | kFlushSubnormals);
    __asm__ volatile("" ::: "memory");  // the arithmetic stays between the two changes of mode
    __m256 first[16][2], second[16][2];
    for (int n = 0; n < 16; ++n) {
      for (int h = 0; h < 2; ++h) {
        const __m256i words =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(b.word[n] + 8 * h));
        first[n][h] = First(words);
        second[n][h] = Second(words);
      }
    }
    for (int m = 0; m < 16; ++m) {
      __m256 sum[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()},
                          {_mm256_setzero_ps(), _mm256_setzero_ps()}};
      for (int n = 0; n < 16; ++n) {
        const __m256i words = _mm256_set1_epi32(static_cast<int>(a.word[m][n]));
        const __m256 a_first = First(words), a_second = Second(words);
        for (int h = 0; h < 2; ++h) {
          sum[0][h] = _mm256_fmadd_ps(a_first, first[n][h], sum[0][h]);
          sum[1][h] = _mm256_fmadd_ps(a_second, second[n][h], sum[1][h]);
        }
      }
      for (int h = 0; h < 2; ++h) {
        float* to = reinterpret_cast<float*>(c->word[m] + 8 * h);
        _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(sum[0][h], sum[1][h])));
      }
    }
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(mode);
  }
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_EMULATED_LEAF_H_
