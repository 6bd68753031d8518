// The tiles of AMX, and the vector operations of AVX-512 around them.
//
// Tile instructions are inline assembly: their operands are register numbers, which GCC 12's
// intrinsics take as literals only, and the memory operands tell the compiler exactly what is read
// and written. They are volatile: the order in which tile_products.h writes them between vector
// instructions is the order in which they are issued.
#ifndef TANDEM_BACKEND_CPU_TILES_AMX_LEAF_H_
#define TANDEM_BACKEND_CPU_TILES_AMX_LEAF_H_

#include "backend_cpu/tiles/parts.h"

namespace tandem::cpu {
namespace {

struct AmxLeaf {
  using Arch = Avx512;
  using V = Vector<Arch>;

  // The eight tile registers of this thread, each 16 rows of 64 bytes. Configured while this object
  // lives, so that a thread switch saves no tiles afterwards.
  class Tiles {
   public:
    TANDEM_ISA_INLINE Tiles() {
      alignas(64) Configuration configuration = {};
      configuration.palette = 1;
      for (int t = 0; t < 8; ++t) {
        configuration.row_bytes[t] = 64;
        configuration.rows[t] = 16;
      }
      __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
    }
    TANDEM_ISA_INLINE ~Tiles() { __asm__ volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int kTile>
    TANDEM_ISA_INLINE void Zero() {
      __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    // kReadsOnce: what is not soon read again.
    template <int kTile, bool kReadsOnce = false>
    TANDEM_ISA_INLINE void Load(const void* from) {
      if constexpr (kReadsOnce) {
        __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from),
                         "r"(int64_t{64}), "m"(*static_cast<const Bytes*>(from)));
      } else {
        __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(int64_t{64}),
                         "m"(*static_cast<const Bytes*>(from)));
      }
    }
    // To rows kStride floats apart; what lies between them stays.
    template <int kTile, int kStride = 16>
    TANDEM_ISA_INLINE void Store(float* to) {
      typedef char Span[4 * (15 * kStride + 16)];
      __asm__ volatile("tilestored %%tmm%c1, (%2,%3,1)"
                       : "+m"(*reinterpret_cast<Span*>(to))
                       : "i"(kTile), "r"(to), "r"(int64_t{4 * kStride}));
    }
    // C += A B: A is 16 rows of 32 numbers, B has two rows of 16 numbers interleaved in each of its
    // 16.
    template <int kC, int kA, int kB>
    TANDEM_ISA_INLINE void Multiply() {
      __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }

   private:
    struct Configuration {
      uint8_t palette;
      uint8_t start_row;
      uint8_t reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    typedef char Bytes[1024];
  };

  // 2^x; exactly 0 for -inf, NaN kept. p(f) 2^floor(x) with f = x - floor(x).
  template <int kDegree>
  TANDEM_ISA_INLINE static V Exp2(V x) {
    return _mm512_scalef_ps(Polynomial<kDegree>(x), x);
  }
  // The same, and 0 in lanes whose bit is not set.
  template <int kDegree>
  TANDEM_ISA_INLINE static V Exp2Visible(uint64_t bits, V x) {
    return _mm512_maskz_scalef_ps(static_cast<__mmask16>(bits), Polynomial<kDegree>(x), x);
  }

  // The larger of each lane, `largest` where x is NaN.
  TANDEM_ISA_INLINE static V Larger(V x, V largest) { return _mm512_max_ps(x, largest); }
  TANDEM_ISA_INLINE static V LargerVisible(uint64_t bits, V x, V largest) {
    return _mm512_mask_max_ps(largest, static_cast<__mmask16>(bits), x, largest);
  }
  // Whether some lane of a is above that of b, or NaN.
  TANDEM_ISA_INLINE static bool AnyAbove(V a, V b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0;
  }

  // To the nearest of 8 significant bits, halves away from 0.
  TANDEM_ISA_INLINE static V RoundToBf16(V x) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(
        _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  // Towards 0.
  TANDEM_ISA_INLINE static V CutToBf16(V x) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  TANDEM_ISA_INLINE static void Store32(const V (&x)[2], uint16_t* to) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(x[1], x[0]);
    _mm512_storeu_si512(to, reinterpret_cast<const __m512i&>(halves));
  }

  // 32 bf16 numbers: each vector is one permutation, whose even halves are zeros.
  TANDEM_ISA_INLINE static void Load32Bf16(const uint16_t* from, V (&x)[2]) {
    alignas(64) static constexpr uint16_t kPlaces[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                                         5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                                         0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i low = _mm512_load_si512(kPlaces);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i halves = _mm512_loadu_si512(from);
    x[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, low, halves));
    x[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, high, halves));
  }

  // Whether all of `count` elements, a multiple of 16, are in range.
  TANDEM_ISA_INLINE static bool AllInRange(const PartRange& range, const float* x, int64_t count) {
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(range.lowest));
    const __m512i size = _mm512_set1_epi32(static_cast<int>(range.end - range.lowest));
    unsigned outside = 0;
    for (int64_t n = 0; n < count; n += 16) {
      const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + n), sign);
      outside |= _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(bits, bits),
                                              _mm512_sub_epi32(bits, lowest), size);
    }
    return outside == 0;
  }

  // Copies 32 bf16 numbers. Returns whether all are in range.
  TANDEM_ISA_INLINE static bool Copy32Bf16(const PartRange& range, const uint16_t* from,
                                           uint16_t* to) {
    const Bf16Range halves = HalfRange(range);
    const __m512i x = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, x);
    const __m512i bits = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    const __m512i above = _mm512_sub_epi16(bits, _mm512_set1_epi16(halves.lowest));
    return _mm512_mask_cmpge_epu16_mask(_mm512_test_epi16_mask(bits, bits), above,
                                        _mm512_set1_epi16(halves.size)) == 0;
  }

  // to[2 n] = even[n] and to[2 n + 1] = odd[n] for 16 halves.
  TANDEM_ISA_INLINE static void Interleave16(const uint16_t* even, const uint16_t* odd,
                                             uint16_t* to) {
    const __m512i low =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

 private:
  template <int kDegree>
  TANDEM_ISA_INLINE static V Polynomial(V x) {
    const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return Exp2Polynomial<kDegree, Arch>(f);
  }
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_AMX_LEAF_H_
