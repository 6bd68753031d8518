// The backward pass: the one definition of what a pair, a row and a sink contribute
// (docs/semantics.md section 6), from the LSE of the forward pass.
//
// For a visible pair of a row that is not empty, with D = <dO, O> and dP = <dO, v> (0 where dropout
// dropped the pair, else times its factor):
//     dS = P (dP - (D - dLSE)),
// and dS goes to dQ, dK, dBias and dALiBi, P (times dropout's factor) to dV. A pair that is not
// visible adds nothing anywhere: kernels select, they do not multiply by 0.
#ifndef TANDEM_CORE_GRADIENT_H_
#define TANDEM_CORE_GRADIENT_H_

#include <math.h>

#include "core/softmax.h"

namespace tandem::core {

// A row with this LSE is empty: none of its pairs counts, whatever the row holds. (A row that sees
// nothing is empty whatever its LSE; its pairs are not visible.)
TANDEM_HD bool GradientRowIsEmpty(float lse) { return lse == NegativeInfinity(); }

// P of a visible pair. At most 1, so that no rounding of huge scores makes it overflow; NaN kept.
TANDEM_HD float ProbabilityFromLse(float score, float lse) {
  const float x = score - lse;
  return expf(x > 0.0f ? 0.0f : x);
}

// dS; `offset` is D - dLSE of the row.
TANDEM_HD float ScoreGradient(float p, float dp, float offset) { return p * (dp - offset); }

// d capped / d score, where capped = softcap * tanh(score / softcap).
TANDEM_HD float SoftcapSlope(float capped, float softcap) {
  const float t = capped / softcap;
  return 1.0f - t * t;
}

// What a row that exists adds to the gradient of its head's sink: a visible pair with v = 0.
TANDEM_HD float SinkGradient(float sink, float lse, float offset) {
  if (GradientRowIsEmpty(lse)) return 0.0f;
  return ScoreGradient(ProbabilityFromLse(sink, lse), 0.0f, offset);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_GRADIENT_H_
