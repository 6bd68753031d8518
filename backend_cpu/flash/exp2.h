// Vector exponential and hyperbolic tangent in f32. Both keep NaN.
#ifndef TANDEM_BACKEND_CPU_FLASH_EXP2_H_
#define TANDEM_BACKEND_CPU_FLASH_EXP2_H_

#include "backend_cpu/flash/simd.h"
#include "core/softmax.h"

namespace tandem::cpu {
namespace {

// 2^f for f in [-1/2, 1/2], exactly 1 for 0: minimax of degree 5, relative error 1.1e-7.
template <class Arch>
TANDEM_ISA_INLINE Vector<Arch> ExpPolynomial(Vector<Arch> f) {
  using V = Vector<Arch>;
  V y(1.326472731307149e-3f);
  y = Fma(y, f, V(9.671512991189957e-3f));
  y = Fma(y, f, V(5.550733581185341e-2f));
  y = Fma(y, f, V(2.4022242426872253e-1f));
  y = Fma(y, f, V(6.931470036506653e-1f));
  return Fma(y, f, V(1.0f));
}

// e^x for x <= 0: relative error below 2e-7; exactly 0 below -88 (where the true value is
// subnormal) and for -inf, exactly 1 for 0. 2^n * 2^f with n the nearest integer to x * log2(e).
template <class Arch>
TANDEM_ISA_INLINE Vector<Arch> ExpNonPositive(Vector<Arch> x) {
  using V = Vector<Arch>;
  // max and min return their second operand when either is NaN.
  x = xsimd::max(V(-88.1f), x);
  const V log2e(core::kLog2e);
  const V to_integer(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V biased = Fma(x, log2e, to_integer);
  const V f = Fma(x, log2e, to_integer - biased);
  return ExpPolynomial<Arch>(f) * PowerOfTwo(biased);
}

#if defined(__AVX512F__)
// The same polynomial between the instructions that round and that multiply by a power of 2.
template <>
TANDEM_ISA_INLINE Vector<Avx512> ExpNonPositive<Avx512>(Vector<Avx512> x) {
  using V = Vector<Avx512>;
  // Also true for NaN.
  const __mmask16 not_tiny = _mm512_cmp_ps_mask(x, V(-87.3f), _CMP_NLT_UQ);
  const V log2e(core::kLog2e);
  const V n = _mm512_roundscale_ps(x * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V f = _mm512_fmsub_ps(x, log2e, n);
  return _mm512_maskz_scalef_ps(not_tiny, ExpPolynomial<Avx512>(f), n);
}
#endif  // __AVX512F__

// 2^f for f in [0, 1), by minimax polynomials: relative error 7.5e-5 by degree 3, for results that
// are rounded to bf16, 2.7e-6 by degree 4, for f16, and 1.5e-7 by degree 5.
template <int kDegree, class Arch>
TANDEM_ISA_INLINE Vector<Arch> Exp2Polynomial(Vector<Arch> f) {
  using V = Vector<Arch>;
  static_assert(kDegree >= 3 && kDegree <= 5);
  if constexpr (kDegree == 3) {
    V y = Fma(V(0.0780245227f), f, V(0.226067155f));
    y = Fma(y, f, V(0.69583354f));
    return Fma(y, f, V(0.999925219f));
  } else if constexpr (kDegree == 4) {
    V y = Fma(V(0.0135341678f), f, V(0.0520114601f));
    y = Fma(y, f, V(0.241442755f));
    y = Fma(y, f, V(0.693003833f));
    return Fma(y, f, V(1.00000262f));
  } else {
    V y = Fma(V(0.0018775767f), f, V(0.00898934002f));
    y = Fma(y, f, V(0.0558263181f));
    y = Fma(y, f, V(0.240153617f));
    y = Fma(y, f, V(0.693153073f));
    return Fma(y, f, V(0.999999925f));
  }
}

// e^x for a score less its row's largest: x <= 0, but for the rounding error of the product that
// the largest is. Relative error below 2e-7; 0 for -inf, NaN kept. min returns its second operand
// when either is NaN.
template <class Arch>
TANDEM_ISA_INLINE Vector<Arch> ExpOfDifference(Vector<Arch> x) {
  return ExpNonPositive<Arch>(xsimd::min(Vector<Arch>(0.0f), x));
}

#if defined(__AVX512F__)
// 2^t = 2^floor(t) 2^(t - floor(t)), which AVX-512 has instructions for.
template <>
TANDEM_ISA_INLINE Vector<Avx512> ExpOfDifference<Avx512>(Vector<Avx512> x) {
  const Vector<Avx512> t = x * Vector<Avx512>(core::kLog2e);
  const Vector<Avx512> fraction(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  return _mm512_scalef_ps(Exp2Polynomial<5, Avx512>(fraction), t);
}
#endif  // __AVX512F__

// tanh(x), within a few ulp: Cephes' polynomial near 0, elsewhere (1 - e) / (1 + e) with e =
// exp(-2 |x|).
template <class Arch>
TANDEM_ISA_INLINE Vector<Arch> Tanh(Vector<Arch> x) {
  using V = Vector<Arch>;
  const V magnitude = xsimd::abs(x);
  const V e = ExpNonPositive<Arch>(magnitude * V(-2.0f));
  const V large = (V(1.0f) - e) / (V(1.0f) + e);
  const V square = x * x;
  V y(-5.70498872745e-3f);
  y = Fma(y, square, V(2.06390887954e-2f));
  y = Fma(y, square, V(-5.37397155531e-2f));
  y = Fma(y, square, V(1.33314422036e-1f));
  y = Fma(y, square, V(-3.33332819422e-1f));
  const V small = Fma(y * square, x, x);
  return xsimd::select(magnitude < V(0.625f), small, xsimd::copysign(large, x));
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_EXP2_H_
