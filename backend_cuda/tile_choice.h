// Choices that several launchers make from a problem.
#ifndef TANDEM_BACKEND_CUDA_TILE_CHOICE_H_
#define TANDEM_BACKEND_CUDA_TILE_CHOICE_H_

#include "core/problem.h"

namespace tandem::cuda {

inline constexpr int64_t kSectionBytes = int64_t{24} << 20;  // of about 50 MB of L2

// Of `heads`, those whose blocks are served together, so that what they walk over stays in the L2
// cache: `head_bytes`, shared by `group` of them. Where blocks differ in length, all of them: a
// long block of a last section would begin when the others have ended.
inline int64_t SectionHeads(const core::Problem& p, int64_t heads, int64_t head_bytes,
                            int64_t group) {
  if (p.mask.band_count > 0 || core::IsPacked(p)) return heads;
  return core::Clamp<int64_t>(kSectionBytes / core::Max<int64_t>(head_bytes, 1) * group, 1, heads);
}

// Whether the scale neither overflows nor vanishes in the exponential.
inline bool HasOrdinaryScale(const core::Problem& p) {
  const float magnitude = p.scale < 0.0f ? -p.scale : p.scale;
  return magnitude > 1e-30f && magnitude < 1e30f;
}
// Whether scores are products by such a scale, and nothing but a bias comes on top.
inline bool HasOrdinaryScores(const core::Problem& p) {
  return p.alibi_slopes == nullptr && p.softcap <= 0.0f && p.dropout.enabled == 0 &&
         HasOrdinaryScale(p);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_TILE_CHOICE_H_
