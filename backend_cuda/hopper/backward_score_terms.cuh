// What the scores of the backward kernel go through beside a scale: a softcap and ALiBi, in line,
// since a call would serialise the products.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SCORE_TERMS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SCORE_TERMS_CUH_

#include "backend_cuda/hopper/backward_tiles.cuh"

namespace tandem::cuda::hopper {

// To some units of an f32's last place, without a branch: by its series near 0, where the
// difference of 1 and an exponential's part would have no bits left.
__device__ __forceinline__ float HyperbolicTangent(float x) {
  const float far = 1.0f - __fdividef(2.0f, 1.0f + Exp2Approximate(x * (2.0f * core::kLog2e)));
  const float square = x * x;
  float series = 62.0f / 2835.0f;
  series = fmaf(series, square, -17.0f / 315.0f);
  series = fmaf(series, square, 2.0f / 15.0f);
  series = fmaf(series, square, -1.0f / 3.0f);
  return fabsf(x) < 0.3f ? fmaf(x * square, series, x) : far;
}

// ALiBi of a lane's pairs of a step (GradientWarpgroup). Distances are exact up to 2^24.
template <bool kKeepsKeys>
struct AlibiPairs {
  float slope = 0.0f;
  float first = 0.0f;  // distance d - j of pair 0

  AlibiPairs() = default;
  // kept, other: the local rows of pair 0, of the side that is kept and of the other.
  __device__ __forceinline__ AlibiPairs(const Problem& p, const Sequence& s, int64_t head,
                                        int64_t kept, int64_t other)
      : slope(core::AlibiSlope(p, s, head)),
        first(static_cast<float>(s.q_offset + (kKeepsKeys ? other : kept) +
                                 core::DiagonalOffset(p.alibi_alignment, s) - s.kv_offset -
                                 (kKeepsKeys ? kept : other))) {}

  // |d - j| of element 4 t + i.
  __device__ __forceinline__ float Distance(int t, int i) const {
    const int kept = i / 2 * 8;
    const int other = 8 * t + i % 2;
    return fabsf(first + static_cast<float>(kKeepsKeys ? other - kept : kept - other));
  }
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_SCORE_TERMS_CUH_
