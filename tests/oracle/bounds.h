// The error bounds of docs/semantics.md section 7, written down once, with their derivation.
//
// Notation. u32 = 2^-24 is the unit roundoff of f32. u is the relative error unit of the type in
// which the probabilities P are multiplied with V, w that of one accumulation step, and
// gamma(k) = k * w. For one row, over its n visible keys:
//     s_j    the score in exact arithmetic,  p_j = exp(s_j - LSE),  O_d = sum p_j v_jd,
//     A_d    sum p_j |v_jd|.
//
// 1. Score. A dot product of D terms accumulated in any order, one multiplication by the scale and
// a
//    few roundings: |error| <= gamma(D + 8) |scale| sum |q||k|. Softcap is a contraction (its slope
//    is at most 1), so it passes that error on and adds a few roundings of its result; adding the
//    bias and ALiBi rounds at the size of their operands. Subtracting the maximum and folding
//    log2(e) rounds at the size of the score. Together
//        e_j = gamma(D + 8) |scale| sum |q||k| + 4 u32 (|s_j| + |bias_j| + |alibi_j|).
//
// 2. Probability. An error of at most e in every score changes each exp(s_j) by a factor within
//    exp(+-e), hence each quotient p_j by a factor within exp(+-2e): expm1(2e) relative.
//    The exponential itself, the sum of n of them and the division cost gamma(n + 8).
//
// 3. Product. Rounding P to its type costs 2u per term (half an ulp is 2^-8 for bf16 and 2^-11 for
//    f16; u is 2^-9 and 2^-12). Summing n products is in gamma(n + 8) too. All of this is relative
//    to |p_j v_jd|, so it is at most (...) * A_d. The final rounding is u_out |O_d|, and what
//    underflows is in eta:
//        bound_O = (2u + gamma(n + 8) + expm1(2e)) A_d + u_out |O_d| + eta.
//
// 4. LSE = m + log(l): errors e of the scores shift it by at most e each way (2e with the error of
//    m), gamma(n + 8) of the sum becomes absolute under the logarithm, and the last operations
//    round at the size of the result:
//        bound_LSE = 2e + gamma(n + 8) + 4 u32 (1 + |LSE|)   (+ u where P is rounded before the
//        sum).
//
// e is the largest e_j among the keys that can contribute. A key whose score, with its error, lies
// so far below the maximum that its p underflows to 0 in f32 either way cannot, whatever its own
// e_j; without this, one bias of finfo.min in a row would make the row's bound infinite.
//
// Backward. The gradients are those of docs/semantics.md section 6 for the O and LSE that are
// given, so errors of the forward pass are not counted. For a visible pair, with keep' = keep / (1
// - rate),
//     P = min(1, exp(s - LSE)),  D = sum dO O,  dP = keep' sum dO v,  dS = P (dP - D + dLSE),
//     dX = dS (1 - tanh^2) where there is a softcap, else dS.
//
// 5. P. There is no sum to share the error with: e = e_j + 4 u32 |LSE| (s - LSE rounds at the size
//    of its operands), and |error| <= P (expm1(e) + 8 u32), never more than 1, since P and what a
//    kernel makes of it lie in [0, 1].
//
// 6. dS. e_dP = gamma(Dv + 8) keep' sum |dO||v|; e_D = (gamma(Dv + 8) + u_out) sum |dO||O|, u_out
//    for a kernel that takes D from sums of its own. A product's error is
//        e_dS = e_P |dP - D + dLSE| + (P + e_P) (e_dP + e_D + 4 u32 (|dP| + |D| + |dLSE|)).
//    Softcap: t = tanh is off by e_t = gamma(Dqk + 8) |scale| sum |q||k| / cap + 4 u32, so 1 - t^2
//    by e_c = 2 |t| e_t + e_t^2 + 4 u32, and e_dX = e_dS (1 - t^2) + (|dS| + e_dS) e_c.
//
// 7. Sums of n products. dQ = scale sum dX k; rounding dX to its type is 2u as for P, and the sum
//    gamma(n + 8), both relative to |dX k|:
//        bound = |factor| (sum e_dX |k| + (2u + gamma(n + 8)) sum |dX k| + eta sum |k|) +
//                u_out |dQ| + eta_out.
//    The same with q for dK (factor scale), and with dO and P keep' for dV (factor 1). dBias, dSink
//    and dALiBi are sums of dS, in f32, with the same bound (u = 0 for them: dS is not rounded).
#ifndef TANDEM_TESTS_ORACLE_BOUNDS_H_
#define TANDEM_TESTS_ORACLE_BOUNDS_H_

#include <cmath>
#include <cstdint>

#include "tandem/tandem.h"

namespace tandem::oracle {

inline constexpr double kUnitF32 = 0x1p-24;
inline constexpr double kUnitF16 = 0x1p-12;
inline constexpr double kUnitBf16 = 0x1p-9;
// Tensor cores accumulate with truncation in blocks.
inline constexpr double kTensorCoreAccumulationUnit = 0x1p-22;
// exp(-kUnderflowGap) is far below the smallest f32.
inline constexpr double kUnderflowGap = 200.0;

// How a kernel computes: what the bounds depend on beside the data.
struct Arithmetic {
  double product_unit = kUnitF32;       // u
  double accumulation_unit = kUnitF32;  // w
  // Half the smallest subnormal of the type in which P is multiplied, or the smallest normal where
  // subnormals may be flushed.
  double product_underflow = 0x1p-126;
};

// P stays in f32.
inline Arithmetic F32Arithmetic() { return {}; }

// P may be rounded to `dtype` before its product; `on_tensor_cores` for CUDA.
inline Arithmetic ArithmeticFor(tandem_dtype dtype, bool on_tensor_cores) {
  Arithmetic a;
  if (dtype == TANDEM_DTYPE_F16) {
    a.product_unit = kUnitF16;
    a.product_underflow = 0x1p-25;
  } else if (dtype == TANDEM_DTYPE_BF16) {
    a.product_unit = kUnitBf16;
  }
  if (on_tensor_cores) a.accumulation_unit = kTensorCoreAccumulationUnit;
  return a;
}

// The largest relative error of rounding to the output type: half an ulp.
inline double OutputUnit(tandem_dtype dtype) {
  if (dtype == TANDEM_DTYPE_F16) return 0x1p-11;
  if (dtype == TANDEM_DTYPE_BF16) return 0x1p-8;
  return kUnitF32;
}
inline double OutputUnderflow(tandem_dtype dtype) {
  return dtype == TANDEM_DTYPE_F16 ? 0x1p-25 : 0x1p-126;
}
inline double LargestFinite(tandem_dtype dtype) {
  if (dtype == TANDEM_DTYPE_F16) return 65504.0;
  if (dtype == TANDEM_DTYPE_BF16) return 0x1.fep+127;
  return 0x1.fffffep+127;
}

inline double Gamma(const Arithmetic& a, int64_t operations) {
  return static_cast<double>(operations) * a.accumulation_unit;
}

// e_j. magnitude = |scale| sum |q||k|.
inline double ScoreError(const Arithmetic& a, int64_t qk_dim, double magnitude, double score,
                         double bias, double alibi) {
  return Gamma(a, qk_dim + 8) * magnitude +
         4 * kUnitF32 * (std::fabs(score) + std::fabs(bias) + std::fabs(alibi));
}

// weighted = A_d; value_sum = sum |v_jd| over the visible keys, with dropout's factor.
inline double OutputBound(const Arithmetic& a, tandem_dtype out_dtype, int64_t visible_keys,
                          double score_error, double weighted, double value_sum, double out) {
  const double relative =
      2 * a.product_unit + Gamma(a, visible_keys + 8) + std::expm1(2 * score_error);
  const double eta = a.product_underflow * value_sum + OutputUnderflow(out_dtype);
  // 0 * infinity: no value, no error.
  const double products = weighted == 0.0 ? 0.0 : relative * weighted;
  return products + OutputUnit(out_dtype) * std::fabs(out) + eta;
}

inline double LseBound(const Arithmetic& a, int64_t visible_keys, double score_error, double lse) {
  const double rounded_sum = a.product_unit > kUnitF32 ? a.product_unit : 0.0;
  return 2 * score_error + Gamma(a, visible_keys + 8) + 4 * kUnitF32 * (1 + std::fabs(lse)) +
         rounded_sum;
}

// Of P.
inline double ProbabilityBound(double score_error, double lse, double p) {
  const double error = p * (std::expm1(score_error + 4 * kUnitF32 * std::fabs(lse)) + 8 * kUnitF32);
  return std::fmin(p == 0.0 ? 0.0 : error, 1.0) + 0x1p-125;
}

// Of a sum of products over n pairs: `error` is the sum of the factors' errors times the other
// operands, `magnitude` that of the products, `operands` that of the other operands.
inline double SumBound(const Arithmetic& a, tandem_dtype out_dtype, int64_t n, double factor,
                       double error, double magnitude, double operands, double value) {
  const double relative = 2 * a.product_unit + Gamma(a, n + 8);
  return std::fabs(factor) * (error + relative * magnitude + a.product_underflow * operands) +
         OutputUnit(out_dtype) * std::fabs(value) + OutputUnderflow(out_dtype);
}

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_BOUNDS_H_
