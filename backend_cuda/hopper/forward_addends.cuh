// What is added to scaled products: a bias or ALiBi, for each lane in the order of its scores.
//
// The bias of a tile is where the tensor memory accelerator left it in shared memory: stages of
// kBiasKeys columns and the rows of the block, 128 bytes a row, whose 16-byte chunks are permuted
// by the low bits of the row.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_ADDENDS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_ADDENDS_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

namespace tandem::cuda::hopper {

// What the exponentials of a row are measured from.
struct Origin {
  float offset;   // in units of base 2
  float natural;  // in units of scores
  bool is_extreme;
};

// Where nothing is.
struct NoAddends {
  struct Pairs {};
  template <typename State>
  __device__ __forceinline__ NoAddends(const Params&, State&, uint32_t, int) {}
};

// A bias, of a warp's 16 rows.
template <DType kDType, int kHeadDim, Variant kVariant>
class BiasRows {
 public:
  using State = BlockState<kHeadDim, kVariant>;

  // first_row: of the warp, in the block.
  __device__ __forceinline__ BiasRows(const Params& params, State& state, uint32_t shared,
                                      int first_row)
      : state_(state) {
    const int lane = threadIdx.x % kWarpSize;
    // A bias that is broadcast over rows has one.
    const int row = params.bias.per_row != 0 ? first_row + (lane & 15) : 0;
    address_ = shared + State::kBiasOffset + row * 128 + ((lane >> 4 ^ (row & 7)) << 4);
  }

  // Of 16 keys: pair 2 t + r is of row r and the lane's keys in the t-th eight of them.
  struct Pairs {
    uint32_t word[4];
  };

  __device__ __forceinline__ void BeginItem(const Problem&, const Item&) {}
  __device__ __forceinline__ void BeginTile(int) {}

  // Until a part of the bias of tile `step` (counted over row blocks), kBiasKeys columns, is there.
  __device__ __forceinline__ void WaitFor(uint32_t step, int part) const {
    const uint32_t n = kParts * step + part;
    Wait(Barrier(state_.bias_full[n % kStages]), n / kStages & 1);
  }
  // By one lane, when its warp has read all parts.
  __device__ __forceinline__ void Release(uint32_t step) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Arrive(Barrier(state_.bias_empty[(kParts * step + part) % kStages]));
    }
  }
  // Those of keys 16 n to 16 n + 15 of the tile.
  __device__ __forceinline__ void Load(uint32_t step, int n, Pairs& pairs) const {
    const uint32_t stage = (kParts * step + n / 4) % kStages;
    LoadMatrices(pairs.word, (address_ + stage * kBytes) ^ n % 4 << 5);
  }
  __device__ __forceinline__ float Score(const ScoreScale& scale, float product, const Pairs& pairs,
                                         int pair, int e) const {
    return fmaf(product, scale.scale, Value(pairs, pair, e));
  }
  // In units of base 2, less an offset.
  __device__ __forceinline__ float Exponent(const ScoreScale& scale, float product,
                                            const Pairs& pairs, int pair, int e,
                                            float offset) const {
    return fmaf(product, scale.log2_scale, fmaf(Value(pairs, pair, e), core::kLog2e, -offset));
  }

  // Clears the bits of pairs that a bias of -inf hides.
  __device__ __forceinline__ void Hide(uint32_t step, uint32_t (&bits)[2]) const {
    constexpr uint32_t kHidden = kDType == DType::kF16 ? 0xfc00u : 0xff80u;
#pragma unroll
    for (int part = 0; part < kParts; ++part) WaitFor(step, part);
#pragma unroll
    for (int n = 0; n < kParts * kBiasKeys / 16; ++n) {
      Pairs pairs;
      Load(step, n, pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int bit = 4 * n + i / 2 * 2;
        if ((pairs.word[i] & 0xffffu) == kHidden) bits[i % 2] &= ~(1u << bit);
        if (pairs.word[i] >> 16 == kHidden) bits[i % 2] &= ~(2u << bit);
      }
    }
  }

 private:
  __device__ __forceinline__ float Value(const Pairs& pairs, int pair, int e) const {
    return e == 0 ? UnpackLow<kDType>(pairs.word[pair]) : UnpackHigh<kDType>(pairs.word[pair]);
  }

  static constexpr int kStages = State::kPolicy.bias_stages;
  static constexpr uint32_t kBytes = State::kPolicy.bias_bytes;
  static constexpr int kParts = State::kPolicy.bias_parts;

  State& state_;
  uint32_t address_;  // of this lane's row of the fragments, in stage 0
};

// ALiBi. Distances are exact up to 2^24.
class AlibiRows {
 public:
  template <typename State>
  __device__ __forceinline__ AlibiRows(const Params&, State&, uint32_t, int first_row)
      : first_lane_row_(first_row + static_cast<int>(threadIdx.x % kWarpSize / 4)) {}

  struct Pairs {
    float first;  // distance of row 0 from the first of the 16 keys that is this lane's
  };

  __device__ __forceinline__ void BeginItem(const Problem& problem, const Item& item) {
    const Sequence& s = item.sequence;
    const int64_t row = s.q_offset + item.first_row + first_lane_row_;
    slope_ = core::AlibiSlope(problem, s, item.head);
    position_ = static_cast<int>(row + core::DiagonalOffset(problem.alibi_alignment, s) -
                                 s.kv_offset - 2 * static_cast<int>(threadIdx.x & 3));
  }
  __device__ __forceinline__ void BeginTile(int first_key) {
    distance_ = static_cast<float>(position_ - first_key);
  }
  __device__ __forceinline__ void WaitFor(uint32_t, int) const {}
  __device__ __forceinline__ void Hide(uint32_t, uint32_t (&)[2]) const {}

  __device__ __forceinline__ void Load(uint32_t, int n, Pairs& pairs) const {
    pairs.first = distance_ - static_cast<float>(16 * n);
    // Opaque, so that distances are not kept from one use of them to the next.
    asm volatile("" : "+f"(pairs.first));
  }
  __device__ __forceinline__ float Score(const ScoreScale& scale, float product, const Pairs& pairs,
                                         int pair, int e) const {
    return fmaf(product, scale.scale, -slope_ * fabsf(Distance(pairs, pair, e)));
  }
  __device__ __forceinline__ float Exponent(const ScoreScale& scale, float product,
                                            const Pairs& pairs, int pair, int e,
                                            float offset) const {
    const float distance = fabsf(Distance(pairs, pair, e));
    return fmaf(product, scale.log2_scale, fmaf(distance, -slope_ * core::kLog2e, -offset));
  }

 private:
  static __device__ __forceinline__ float Distance(const Pairs& pairs, int pair, int e) {
    return pairs.first + static_cast<float>(8 * (pair % 2) - 8 * (pair / 2) - e);
  }

  const int first_lane_row_;
  int position_;  // of row 0 on the axis of keys, from the lane's first key on
  float slope_;
  float distance_;  // from the tile
};

// Exponentials of a lane's products of a tile (counted over row blocks), in their place, and the
// sums of both rows. first: of the first 16 keys. kIsSlow: some origins are extreme.
template <bool kIsPartial, bool kIsSlow, int kScores, typename Addends>
__device__ __forceinline__ void AddendExponentials(const Addends& addends,
                                                   const typename Addends::Pairs& first,
                                                   uint32_t step, const ScoreScale& scale,
                                                   const Origin (&origins)[2],
                                                   const uint32_t (&bits)[2],
                                                   float (&scores)[kScores], float (&row_sums)[2]) {
  constexpr int kSteps = kScores / 8;  // of 16 keys
  float sums[2][2] = {};
  typename Addends::Pairs pairs = first;
#pragma unroll
  for (int n = 0; n < kSteps; ++n) {
    typename Addends::Pairs next;
    if (n + 1 < kSteps) {
      if ((n + 1) % 4 == 0) addends.WaitFor(step, (n + 1) / 4);
      addends.Load(step, n + 1, next);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int t = 2 * n + i / 2;
        float& score = scores[4 * t + 2 * r + e];
        float x = addends.Exponent(scale, score, pairs, i, e, origins[r].offset);
        if constexpr (kIsSlow) {
          const float whole = addends.Score(scale, score, pairs, i, e);
          if (origins[r].is_extreme) x = (whole - origins[r].natural) * core::kLog2e;
        }
        if constexpr (kIsPartial) {
          const bool is_visible = (bits[r] & 1u << (2 * t + e)) != 0;
          x = is_visible ? x : core::NegativeInfinity();
        }
        score = Exp2Approximate(x);
        sums[r][e] += score;
      }
    }
    pairs = next;
  }
  row_sums[0] = sums[0][0] + sums[0][1];
  row_sums[1] = sums[1][0] + sums[1][1];
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_ADDENDS_CUH_
