// Choices that the launchers of both families make from a problem.
#ifndef TANDEM_BACKEND_CUDA_TILE_CHOICE_H_
#define TANDEM_BACKEND_CUDA_TILE_CHOICE_H_

#include "core/problem.h"

namespace tandem::cuda {

// Whether scores are products by an ordinary scale, and nothing but a bias comes on top: a scale
// that neither overflows nor vanishes in the exponential.
inline bool HasOrdinaryScores(const core::Problem& p) {
  const float magnitude = p.scale < 0.0f ? -p.scale : p.scale;
  return p.alibi_slopes == nullptr && p.softcap <= 0.0f && p.dropout.enabled == 0 &&
         magnitude > 1e-30f && magnitude < 1e30f;
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_TILE_CHOICE_H_
