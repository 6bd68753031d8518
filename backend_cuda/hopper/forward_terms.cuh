// Softcap and dropout: what scores become, and which pairs' probabilities meet no value.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_TERMS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_TERMS_CUH_

#include "backend_cuda/hopper/forward_state.cuh"
#include "core/philox.h"

namespace tandem::cuda::hopper {

// Of a warp's 16 rows. One of the terms may be absent. Softcap is cap * tanh(s / cap) = cap - 2 cap
// / (exp(2 s / cap) + 1): by tanh.approx scores would have errors of 2^-11 of the cap.
template <int kBlockKeys>
class ScoreTerms {
 public:
  template <typename State>
  __device__ __forceinline__ ScoreTerms(const Params& params, State&, uint32_t, int first_row)
      : dropout_(params.problem.dropout),
        cap_(params.problem.softcap),
        unit_(2.0f * core::kLog2e * params.score_scale.scale / params.problem.softcap),
        first_row_(first_row) {}

  struct Pairs {};

  __device__ __forceinline__ bool HasSoftcap() const { return cap_ > 0.0f; }
  __device__ __forceinline__ bool HasDropout() const { return dropout_.enabled != 0; }

  __device__ __forceinline__ void BeginItem(const Problem& problem, const Item& item) {
    const Sequence& s = item.sequence;
    head_index_ = static_cast<uint32_t>(s.batch * problem.q_heads + item.head);
    row_ = static_cast<uint32_t>(s.q_offset + item.first_row) + first_row_;
    first_group_ = static_cast<uint32_t>(s.kv_offset >> 2);
  }
  // Draws which pairs of the tile are kept, where there is dropout. A draw decides four keys of a
  // row, which are those of two lanes: the even lane draws for row 0 of both, the odd one for
  // row 1.
  __device__ __forceinline__ void BeginTile(int first_key) {
    if (!HasDropout()) return;
    const uint32_t lane = threadIdx.x % kWarpSize;
    const bool is_odd = (lane & 1) != 0;
    const uint32_t row = row_ + lane / 4 + (is_odd ? 8 : 0);
    const uint32_t group = first_group_ + static_cast<uint32_t>(first_key) / 4 + (lane >> 1 & 1);
    uint32_t low = 0;  // of keys 0 and 1 of the four
    uint32_t high = 0;
#pragma unroll 1
    for (int first = kBlockKeys / 8 - kDraws; first >= 0; first -= kDraws) {
      uint32_t words[kDraws][4];
      Draw(group + 2 * first, row, words);
#pragma unroll
      for (int n = kDraws - 1; n >= 0; --n) {
        const auto add = [&](uint32_t& bits, int word) {
          bits = bits << 1 | static_cast<uint32_t>(words[n][word] >= dropout_.threshold);
        };
        add(low, 1);
        add(low, 0);
        add(high, 3);
        add(high, 2);
      }
    }
    const uint32_t other = __shfl_xor_sync(~0u, is_odd ? low : high, 1);
    kept_[0] = is_odd ? other : low;
    kept_[1] = is_odd ? high : other;
  }
  __device__ __forceinline__ void WaitFor(uint32_t, int) const {}
  __device__ __forceinline__ void Hide(uint32_t, uint32_t (&)[2]) const {}
  __device__ __forceinline__ void Load(uint32_t, int, Pairs&) const {}

  __device__ __forceinline__ float Score(const ScoreScale& scale, float product, const Pairs&, int,
                                         int) const {
    return HasSoftcap() ? fmaf(-2.0f * cap_, Part(product), cap_) : product * scale.scale;
  }
  // In units of base 2, less an offset, with softcap.
  __device__ __forceinline__ float Exponent(const ScoreScale&, float product, const Pairs&, int,
                                            int, float offset) const {
    return fmaf(-2.0f * core::kLog2e * cap_, Part(product), core::kLog2e * cap_ - offset);
  }

  // A probability of row r, or 0 where dropout takes the pair; bit: of the lane's bits of the row.
  __device__ __forceinline__ float Kept(float probability, int r, int bit) const {
    return (kept_[r] & 1u << bit) != 0 ? probability : 0.0f;
  }
  // Pairs that meet values.
  __device__ __forceinline__ uint32_t KeptBits(int r) const { return kept_[r]; }

 private:
  static constexpr int kDraws = 4;  // beside each other: each is a chain of 20 products

  // The words of core::DropoutWords for every second group of keys from `group` on.
  __device__ __forceinline__ void Draw(uint32_t group, uint32_t row,
                                       uint32_t (&words)[kDraws][4]) const {
    uint32_t k0 = static_cast<uint32_t>(dropout_.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout_.seed >> 32);
#pragma unroll
    for (int n = 0; n < kDraws; ++n) {
      words[n][0] = group + 2 * n;
      words[n][1] = row;
      words[n][2] = head_index_;
      words[n][3] = static_cast<uint32_t>(dropout_.offset);
    }
#pragma unroll
    for (int round = 0; round < 10; ++round) {
#pragma unroll
      for (int n = 0; n < kDraws; ++n) {
        uint32_t(&c)[4] = words[n];
        uint32_t low0, high0, low1, high1;
        MultiplyWide(c[0], 0xD2511F53u, low0, high0);
        MultiplyWide(c[2], 0xCD9E8D57u, low1, high1);
        c[0] = high1 ^ c[1] ^ k0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k1;
        c[3] = low0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
  // In PTX: of a product in C++ ptxas adds 0 to the high word.
  static __device__ __forceinline__ void MultiplyWide(uint32_t a, uint32_t b, uint32_t& low,
                                                      uint32_t& high) {
    asm("{\n\t.reg .b64 x;\n\tmul.wide.u32 x, %2, %3;\n\tmov.b64 {%0, %1}, x;\n\t}"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
  }

  __device__ __forceinline__ float Part(float product) const {
    const float sum = Exp2Approximate(product * unit_) + 1.0f;
    float part;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(sum));
    return part;
  }

  const core::Dropout& dropout_;
  const float cap_;
  const float unit_;
  const uint32_t first_row_;  // of the warp, in the block
  uint32_t head_index_;
  uint32_t row_;          // the warp's first
  uint32_t first_group_;  // of four keys
  uint32_t kept_[2] = {~0u, ~0u};
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_TERMS_CUH_
