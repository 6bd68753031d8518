// Safe softmax: the one rule for empty rows, NaN and infinity (docs/semantics.md section 2).
//
// A kernel keeps, per row, the running maximum m of its visible scores (-inf while there is none)
// and the running sum l of exp(s - m). These functions are the only place that says what m = -inf
// means.
#ifndef TANDEM_CORE_SOFTMAX_H_
#define TANDEM_CORE_SOFTMAX_H_

#include <math.h>

#include "core/element.h"
#include "core/macros.h"

namespace tandem::core {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr double kLog2eDouble = 1.44269504088896340736;
inline constexpr float kLn2 = 0.69314718055994530942f;

TANDEM_HD float NegativeInfinity() { return BitsToFloat(0xff800000u); }

// max that keeps NaN from either side.
TANDEM_HD float MaxKeepNan(float a, float b) {
  if (IsNan(a)) return a;
  return (b > a || IsNan(b)) ? b : a;
}

// What scores are measured from: exp(s - Reference(m)). An empty row measures from 0, so that
// exp(-inf - 0) = 0.
TANDEM_HD float SoftmaxReference(float m) { return m == NegativeInfinity() ? 0.0f : m; }

// exp(old_m - new_m), the factor of everything summed so far when the maximum rises; 0 while there
// was nothing, NaN kept.
TANDEM_HD float SoftmaxRescale(float old_m, float new_m) {
  if (old_m == NegativeInfinity()) return 0.0f;
  return old_m == new_m ? 1.0f : expf(old_m - new_m);
}

// Nothing visible, or every visible score -inf. NaN makes l NaN, and a row with NaN is not empty.
TANDEM_HD bool SoftmaxRowIsEmpty(float m, float l) { return m == NegativeInfinity() && l == 0.0f; }

// The factor of the unnormalised output; 0 for an empty row (whose accumulator is exactly 0).
TANDEM_HD float SoftmaxInverse(float l) { return l == 0.0f ? 0.0f : 1.0f / l; }

TANDEM_HD float SoftmaxLse(float m, float l) {
  return l == 0.0f ? NegativeInfinity() : m + logf(l);
}

// A sink is one more visible score with a zero value vector: it enters m and l only.
TANDEM_HD void SoftmaxAddSink(float sink, float* m, float* l, float* rescale) {
  const float new_m = MaxKeepNan(*m, sink);
  *rescale = SoftmaxRescale(*m, new_m);
  const float old_sum = *m == NegativeInfinity() && *l == 0.0f ? 0.0f : *l * *rescale;
  *l = old_sum + expf(sink - SoftmaxReference(new_m));
  *m = new_m;
}

// Merging of normalised partial results over disjoint keys: weights for (o_a, lse_a) and (o_b,
// lse_b). merge(empty, x) = x bit for bit (weight exactly 1, and the other operand is not used: see
// `use_a`, `use_b`).
struct MergeWeights {
  float weight_a;
  float weight_b;
  float lse;
  bool use_a;
  bool use_b;
};

TANDEM_HD MergeWeights MergePartials(float lse_a, float lse_b) {
  MergeWeights w;
  w.use_a = lse_a != NegativeInfinity();
  w.use_b = lse_b != NegativeInfinity();
  if (!w.use_a || !w.use_b) {
    w.weight_a = w.use_a ? 1.0f : 0.0f;
    w.weight_b = w.use_b ? 1.0f : 0.0f;
    w.lse = w.use_a ? lse_a : lse_b;
    return w;
  }
  const float m = MaxKeepNan(lse_a, lse_b);
  const float a = expf(lse_a - m);
  const float b = expf(lse_b - m);
  const float sum = a + b;
  w.weight_a = a / sum;
  w.weight_b = b / sum;
  w.lse = m + logf(sum);
  return w;
}

TANDEM_HD float MergeValue(const MergeWeights& w, float value_a, float value_b) {
  if (!w.use_b) return w.use_a ? value_a : 0.0f;
  if (!w.use_a) return value_b;
  return w.weight_a * value_a + w.weight_b * value_b;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_SOFTMAX_H_
