// The backward kernel of sm_90a, written once for both sides as the portable one
// (backward_kernel.cuh), over the same planes: two warpgroups keep 64 rows each of Q and dO, or of
// K and V, and walk over the tiles of the other side that see them. With A and B for what is kept
// and what is walked over,
//     S = A1 B1^T,  dP = A2 B2^T,  sum1 += dS B1,  sum2 += P B2,
// all by wgmma; P and dS never leave the registers. Every gradient is summed by one warpgroup in a
// fixed order. The two take turns to start products, so that one evaluates while the other
// multiplies.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_KERNEL_CUH_

#include "backend_cuda/hopper/backward_loading.cuh"
#include "backend_cuda/hopper/backward_output.cuh"
#include "backend_cuda/hopper/backward_score_terms.cuh"
#include "core/gradient.h"

namespace tandem::cuda::hopper {

// Registers of either side. This lane has rows 16 w + g and 16 w + g + 8 of the warpgroup's, r = 0
// and 1; element 4 t + 2 r + e of scores is row r, row 8 t + 2 c + e of the step.
template <DType kDType, int kHeadDim, GradientSide kSide, GradientTerms kTerms>
class GradientWarpgroup {
 public:
  using State = GradientState<kHeadDim, kSide, kTerms>;
  static constexpr BackwardPolicy kPolicy = State::kPolicy;
  static constexpr bool kKeepsKeys = State::kKeepsKeys;
  static constexpr bool kHasBias = kTerms == GradientTerms::kBias;
  static constexpr bool kAllTerms = kTerms == GradientTerms::kAll;

  __device__ GradientWarpgroup(const GradientParams& params, uint32_t shared, State& state,
                               int warpgroup)
      : base_(params.base),
        problem_(params.base.problem),
        shared_(shared),
        state_(state),
        block_(state.block),
        warpgroup_(warpgroup),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_lane_row_(64 * warpgroup +
                        16 * (static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize) +
                        static_cast<int>(threadIdx.x) % kWarpSize / 4) {
    if constexpr (kHasBias) FindBias(params.bias.per_row != 0);
  }

  __device__ void Run() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) first_sum_[i] = 0.0f;
    if constexpr (kKeepsKeys) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) second_sum_[i] = 0.0f;
    }
    Wait(SharedAddress(&state_.kept_full), 0);
    if constexpr (!kKeepsKeys) {
      LoadFragments(first_kept_, shared_);
      LoadFragments(second_kept_, shared_ + kPolicy.kept_bytes);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowStatistics statistics =
            base_.statistics[QueryPlaneRow(base_, block_.sequence, block_.head) + block_.first_row +
                             first_lane_row_ + 8 * r];
        lse_[r] = statistics.lse;
        offset_[r] = statistics.offset;
      }
    }
    const StepTile tile = WaitForTile(0);
    if (!tile.IsEnd()) VisitTiles(tile);
    WriteGradients();
    if constexpr (kAllTerms && !kKeepsKeys) WriteDistanceSums();
  }

 private:
  static constexpr int kStages = kPolicy.stages;
  static constexpr int kTiles = kStepRows / 8;

  // ---- the loop ----

  __device__ __forceinline__ void VisitTiles(StepTile tile) {
    StartScores();
    StartValueProducts();
    WaitProducts<0>(scores_);
    Pin(value_products_);
    if (warpgroup_ == 1) GiveTurn();
    StepTile next = WaitForTile(1);
    if constexpr (!kAllTerms) LoadStatistics(state_.lse[0], lse_);
    while (!next.IsEnd()) {
      Evaluate(tile);
      TakeTurn();
      StartSums();
      // P's registers are wanted.
      if constexpr (kKeepsKeys) WaitProducts<1>(second_sum_);
      ++steps_;
      StartScores();
      StartValueProducts();
      GiveTurn();
      WaitProducts<2>(first_sum_);
      Release(steps_ - 1);
      tile = next;
      next = WaitForTile(steps_ + 1);
      if constexpr (!kAllTerms) LoadStatistics(state_.lse[Stage()], lse_);
      WaitProducts<1>(scores_);
    }
    Evaluate(tile);
    TakeTurn();
    StartSums();
    GiveTurn();
    WaitProducts<0>(first_sum_);
    if constexpr (kKeepsKeys) Pin(second_sum_);
  }

  // The last turn that is given is left unused.
  __device__ __forceinline__ void TakeTurn() const { SyncThreads(1 + warpgroup_, kBothThreads); }
  __device__ __forceinline__ void GiveTurn() const {
    ArriveThreads(1 + (warpgroup_ ^ 1), kBothThreads);
  }
  static constexpr int kBothThreads = 2 * kWarpgroupThreads;

  // Known to the compiler to be the same for all lanes.
  __device__ __forceinline__ StepTile WaitForTile(uint32_t step) const {
    const uint32_t stage = step % kStages;
    Wait(SharedAddress(&state_.full[stage]), step / kStages & 1);
    const StepTile tile = state_.tiles[stage];
    return {__shfl_sync(~0u, tile.word, 0), tile.head};
  }
  __device__ __forceinline__ void Release(uint32_t step) const {
    Arrive(SharedAddress(&state_.empty[step % kStages]));
  }
  __device__ __forceinline__ uint32_t Stage() const {
    return __shfl_sync(~0u, steps_, 0) % kStages;
  }

  // ---- products ----

  __device__ __forceinline__ void LoadFragments(uint32_t (&fragments)[kHeadDim / 16][4],
                                                uint32_t tile) const {
    const int row = first_lane_row_ - lane_ / 4 + (lane_ & 15);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = step % 4 * 2 + (lane_ >> 4);
      LoadMatrices(fragments[step],
                   tile + step / 4 * (kKeptRows * 128) + row * 128 + ((chunk ^ (row & 7)) << 4));
    }
  }

  __device__ __forceinline__ uint32_t StepAddress() const {
    return shared_ + 2 * kPolicy.kept_bytes + Stage() * (2 * kPolicy.step_bytes);
  }
  __device__ __forceinline__ void StartScores() {
    StartProduct(scores_, first_kept_, shared_, StepAddress());
  }
  __device__ __forceinline__ void StartValueProducts() {
    StartProduct(value_products_, second_kept_, shared_ + kPolicy.kept_bytes,
                 StepAddress() + kPolicy.step_bytes);
  }

  // A of the queries is in registers, A of the keys in shared memory: their sums leave no room.
  struct NoFragments {};
  using Fragments =
      std::conditional_t<kKeepsKeys, NoFragments, uint32_t[kKeepsKeys ? 1 : kHeadDim / 16][4]>;

  __device__ __forceinline__ void StartProduct(float (&product)[kStepRows / 2],
                                               const Fragments& fragments, uint32_t kept,
                                               uint32_t step) {
    const uint32_t b = KeyTile(step);
    FenceProducts();
    if constexpr (kKeepsKeys) {
      const uint32_t a = KeyTile(kept + warpgroup_ * (64 * 128));
      BeginScores<kDType>(product, a, b);
#pragma unroll
      for (int k = 1; k < kHeadDim / 16; ++k) {
        AddScores<kDType>(product, a + k / 4 * (kKeptRows * 128 >> 4) + k % 4 * 2,
                          b + k / 4 * (kStepRows * 128 >> 4) + k % 4 * 2);
      }
    } else {
      BeginScores<kDType>(product, fragments[0], b);
#pragma unroll
      for (int k = 1; k < kHeadDim / 16; ++k) {
        AddScores<kDType>(product, fragments[k], b + k / 4 * (kStepRows * 128 >> 4) + k % 4 * 2);
      }
    }
    CommitProducts();
  }

  __device__ __forceinline__ void StartSums() {
    const uint32_t first = ValueTile(StepAddress(), kStepRows);
    if constexpr (kKeepsKeys) {
      Pin(second_sum_);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < kStepRows / 16; ++k) {
        AddValues<kDType>(second_sum_, probabilities_[k],
                          first + (kPolicy.step_bytes >> 4) + k * (16 * 128 >> 4));
      }
      CommitProducts();
    }
    Pin(first_sum_);
    FenceProducts();
#pragma unroll
    for (int k = 0; k < kStepRows / 16; ++k) {
      AddValues<kDType>(first_sum_, gradients_[k], first + k * (16 * 128 >> 4));
    }
    CommitProducts();
  }

  // ---- pairs ----

  // Scores to P, and products with values, when they are there, to dS.
  __device__ __forceinline__ void Evaluate(const StepTile& tile) {
    const uint32_t stage = Stage();
    uint32_t bits = ~0u;
    bool is_hidden = tile.IsHidden();
    if (is_hidden) bits = LoadBits(state_.words);
    if constexpr (kAllTerms) {
      EvaluateTerms(tile, bits);
      return;
    }
    if constexpr (kHasBias) is_hidden = HideByBias(bits) || is_hidden;
    if (tile.IsFlagged()) PatchScores(tile);
    if (is_hidden) {
      Probabilities<true>(bits);
    } else {
      Probabilities<false>(bits);
    }
    LoadStatistics(state_.offset[stage], offset_);
    WaitProducts<0>(value_products_);
    if (tile.IsFlagged()) PatchValueProducts(tile);
    if (is_hidden) {
      Gradients<true>(bits);
    } else {
      Gradients<false>(bits);
    }
  }

  // Bit 16 r + 2 t + e: the pair is visible.
  __device__ __forceinline__ uint32_t
  LoadBits(const uint64_t (&of_steps)[2 * kStages][kKeptRows]) const {
    const uint16_t* const words =
        reinterpret_cast<const uint16_t*>(&of_steps[steps_ % (2 * kStages)][first_lane_row_]) +
        (lane_ & 3);
    return words[0] | uint32_t{words[8 * 4]} << 16;
  }

  // Of the lane's rows of the step, or of those it keeps.
  using Statistics = float[kKeepsKeys ? kStepRows / 4 : 2];
  __device__ __forceinline__ void LoadStatistics(
      const float (&of_stage)[kKeepsKeys ? kStepRows : 4], Statistics& statistics) const {
    if constexpr (kKeepsKeys) {
#pragma unroll
      for (int n = 0; n < kStepRows / 4; n += 4) {
        LoadShared(SharedAddress(&of_stage[4 * (n + (lane_ & 3))]), &statistics[n]);
      }
    }
  }
  static __device__ __forceinline__ void LoadShared(uint32_t address, float* x) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(address));
  }
  // Element 4 t + i of scores.
  static __device__ __forceinline__ float Of(const Statistics& statistics, int t, int i) {
    return statistics[kKeepsKeys ? 2 * t + i % 2 : i / 2];
  }

  template <bool kHidden>
  __device__ __forceinline__ void Probabilities(uint32_t bits) {
    BiasPairs pairs[2];
    if constexpr (kHasBias) LoadBias(0, pairs[0]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (kHasBias) {
        if (t % 2 == 0 && t + 2 < kTiles) LoadBias(t / 2 + 1, pairs[(t / 2 + 1) % 2]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float lse = Of(lse_, t, i);
        float& score = scores_[4 * t + i];
        float x;
        if constexpr (kHasBias) {
          x = fmaf(score, problem_.scale, BiasOf(pairs[t / 2 % 2], t, i)) - lse;
        } else {
          x = fmaf(score, base_.unit, -lse);
        }
        x = MinKeepNan(x, 0.0f);
        if (kHidden) {
          x = (bits & 1u << (16 * (i / 2) + 2 * t + i % 2)) != 0 ? x : core::NegativeInfinity();
        }
        score = Exp2Approximate(kHasBias ? x * core::kLog2e : x);
      }
    }
    if constexpr (kKeepsKeys) Pack(scores_, probabilities_);
  }

  template <bool kHidden>
  __device__ __forceinline__ void Gradients(uint32_t bits) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float offset = Of(offset_, t, i);
        float& product = value_products_[4 * t + i];
        product = core::ScoreGradient(scores_[4 * t + i], product, offset);
        if (kHidden) {
          product = (bits & 1u << (16 * (i / 2) + 2 * t + i % 2)) != 0 ? product : 0.0f;
        }
      }
    }
    Pack(value_products_, gradients_);
  }

  // An accumulator of 64 x 64 is A of the next product.
  static __device__ __forceinline__ void Pack(const float (&x)[kStepRows / 2],
                                              uint32_t (&packed)[kStepRows / 16][4]) {
#pragma unroll
    for (int i = 0; i < kStepRows / 4; ++i) {
      packed[i / 4][i % 4] = PackPair<kDType>(x[2 * i], x[2 * i + 1]);
    }
  }

  // ---- all terms ----

  // Scores and products with values to P, with dropout's factor, and dS: by the product where there
  // is a softcap, unless what dALiBi needs is summed.
  __device__ __forceinline__ void EvaluateTerms(const StepTile& tile, uint32_t visible) {
    const uint32_t stage = Stage();
    const float softcap = problem_.softcap;
    uint32_t kept = ~0u;
    float keep_scale = 1.0f;
    if (problem_.dropout.enabled != 0) {
      if constexpr (kAllTerms) kept = LoadBits(state_.kept);
      keep_scale = problem_.dropout.keep_scale;
    }
    WaitProducts<0>(value_products_);
    if (tile.IsFlagged()) {
      PatchScores(tile);
      PatchValueProducts(tile);
    }
    LoadStatistics(state_.offset[stage], offset_);
    ForEachPair([&](int t, int i, uint32_t bit) {
      float& product = value_products_[4 * t + i];
      product = ((kept & bit) != 0 ? product * keep_scale : 0.0f) - Of(offset_, t, i);
      scores_[4 * t + i] *= problem_.scale;
    });
    if (softcap > 0.0f) {
      const float inverse = 1.0f / softcap;
      const bool has_slope = base_.row_sums == nullptr;
      ForEachPair([&](int t, int i, uint32_t) {
        float& score = scores_[4 * t + i];
        const float tangent = HyperbolicTangent(score * inverse);
        score = softcap * tangent;
        if (has_slope) value_products_[4 * t + i] *= fmaf(-tangent, tangent, 1.0f);
      });
    }
    AlibiPairs<kKeepsKeys> alibi;
    const bool has_slopes = problem_.alibi_slopes != nullptr;
    if (has_slopes) {
      alibi = AlibiPairs<kKeepsKeys>(problem_, block_.sequence, tile.head,
                                     block_.first_row + first_lane_row_,
                                     tile.FirstRow() + 2 * (lane_ & 3));
      ForEachPair([&](int t, int i, uint32_t) {
        float& score = scores_[4 * t + i];
        score = fmaf(-alibi.slope, alibi.Distance(t, i), score);
      });
    }
    LoadStatistics(state_.lse[stage], lse_);
    ForEachPair([&](int t, int i, uint32_t bit) {
      float& score = scores_[4 * t + i];
      float& product = value_products_[4 * t + i];
      const float lse = Of(lse_, t, i);
      const float p = Exp2Approximate(MinKeepNan(score - lse, 0.0f) * core::kLog2e);
      // Empty rows have an LSE of +inf here, and may hold anything.
      const bool is_visible = (visible & bit) != 0 && lse != core::BitsToFloat(0x7f800000u);
      score = is_visible && (kept & bit) != 0 ? p * keep_scale : 0.0f;
      product = is_visible ? p * product : 0.0f;
    });
    if constexpr (!kKeepsKeys) {
      if (base_.row_sums != nullptr) {
        ForEachPair([&](int t, int i, uint32_t) {
          distance_sums_[i / 2] =
              fmaf(value_products_[4 * t + i], alibi.Distance(t, i), distance_sums_[i / 2]);
        });
      }
    }
    if constexpr (kKeepsKeys) Pack(scores_, probabilities_);
    Pack(value_products_, gradients_);
  }
  template <typename Visit>
  static __device__ __forceinline__ void ForEachPair(const Visit& visit) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(t, i, 1u << (16 * (i / 2) + 2 * t + i % 2));
    }
  }

  // Of all rows of the block, as the portable kernels; what is not asked for with ALiBi is not
  // read.
  __device__ __forceinline__ void WriteDistanceSums() const {
    if (base_.row_sums == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = distance_sums_[r];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if ((lane_ & 3) != 0) continue;
      base_.row_sums[2 * (QueryPlaneRow(base_, block_.sequence, block_.head) + block_.first_row +
                          first_lane_row_ + 8 * r) +
                     1] = sum;
    }
  }

  // ---- a bias ----

  // Of 16 rows of the step: word 2 t + r is row r's, rows 2 c and 2 c + 1 of the t-th eight.
  struct NoPairs {};
  using BiasPairs = std::conditional_t<kHasBias, uint32_t[4], NoPairs>;

  __device__ __forceinline__ void FindBias(bool is_per_row) {
    const int low = lane_ & 7;
    const int middle = lane_ >> 3 & 1;
    const int high = lane_ >> 4;
    const int first_warp_row = first_lane_row_ - lane_ / 4;
    int row;
    int chunk;
    if constexpr (kKeepsKeys) {
      row = low + 8 * high;
      chunk = first_warp_row % 64 / 8 + middle;
    } else {
      row = first_warp_row + low + 8 * middle;
      chunk = high;
    }
    if (!is_per_row) row = 0;
    bias_ = shared_ + State::kBiasOffset + row * 128 + ((chunk ^ (row & 7)) << 4);
    if constexpr (kKeepsKeys) {
      bias_ += warpgroup_ * (kPolicy.bias_bytes / 2);
      bias_row_bytes_ = is_per_row ? 128 : 0;
    }
  }
  __device__ __forceinline__ void LoadBias(int n, BiasPairs& pairs) const {
    const uint32_t address = bias_ + Stage() * kPolicy.bias_bytes;
    if constexpr (kKeepsKeys) {
      LoadMatricesTransposed(pairs, address + 16 * n * bias_row_bytes_);
    } else {
      LoadMatrices(pairs, address ^ n << 5);
    }
  }
  // Of element 4 t + i of scores.
  static __device__ __forceinline__ float BiasOf(const BiasPairs& pairs, int t, int i) {
    const uint32_t word = pairs[t % 2 * 2 + i / 2];
    return i % 2 == 0 ? UnpackLow<kDType>(word) : UnpackHigh<kDType>(word);
  }

  // Clears the bits of pairs that a bias of -inf hides; false where this warp has none.
  __device__ __forceinline__ bool HideByBias(uint32_t& bits) const {
    constexpr uint32_t kHidden = kDType == DType::kF16 ? 0xfc00u : 0xff80u;
    uint32_t least = 0;
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      BiasPairs pairs;
      LoadBias(n, pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) least = LesserPair(least, pairs[i]);
    }
    const bool has_hidden = (least & 0xffffu) == kHidden || least >> 16 == kHidden;
    if (__any_sync(~0u, has_hidden) == 0) return false;
    uint32_t hidden = 0;
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      BiasPairs pairs;
      LoadBias(n, pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int bit = 16 * (i % 2) + 2 * (2 * n + i / 2);
        if ((pairs[i] & 0xffffu) == kHidden) hidden |= 1u << bit;
        if (pairs[i] >> 16 == kHidden) hidden |= 2u << bit;
      }
    }
    bits &= ~hidden;
    return true;
  }
  // Of each half the lesser one, numbers before NaN.
  static __device__ __forceinline__ uint32_t LesserPair(uint32_t a, uint32_t b) {
    uint32_t least;
    if constexpr (kDType == DType::kF16) {
      asm("min.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
    } else {
      asm("min.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
    }
    return least;
  }

  // ---- elements that the products cannot serve, as PatchPair of backward_terms.cuh ----

  static __device__ __forceinline__ float NaN() { return core::BitsToFloat(0x7fffffffu); }

  __device__ __forceinline__ int64_t KvHead(const StepTile& tile) const {
    return kKeepsKeys ? block_.head : tile.head / problem_.group;
  }
  // The flags of keys: of this lane's rows that are kept in bits 8 r of the result, or of the
  // step's keys from this lane's first on.
  __device__ __forceinline__ uint64_t KeyFlags(const uint64_t* flags, const StepTile& tile) const {
    const Sequence& s = block_.sequence;
    const int64_t key = kKeepsKeys ? block_.first_row + 64 * warpgroup_ : tile.FirstRow();
    const uint64_t word = flags[KeyFlagWord(base_, s, KvHead(tile), key)];
    return word >> (kKeepsKeys ? first_lane_row_ % 64 : 2 * (lane_ & 3));
  }
  static __device__ __forceinline__ bool IsKeyFlagged(uint64_t flags, int index) {
    const int bit = kKeepsKeys ? 8 * (index / 2 % 2) : 8 * (index / 4) + index % 2;
    return (flags >> bit & 1) != 0;
  }

  __device__ __forceinline__ void PatchScores(const StepTile& tile) {
    const uint64_t key_flags = KeyFlags(base_.keys.first_flags, tile);
    const Sequence& s = block_.sequence;
    const int64_t query = kKeepsKeys ? tile.FirstRow() : block_.first_row + 64 * warpgroup_;
    const uint64_t query_flags =
        base_.queries.first_flags[QueryFlagWord(base_, s, tile.head, query)];
    const float* const lse = base_.lse + QueryPlaneRow(base_, s, tile.head) + query;
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) {
      if (IsKeyFlagged(key_flags, i)) scores_[i] = NaN();
      const int row = kKeepsKeys ? 8 * (i / 4) + 2 * (lane_ & 3) + i % 2
                                 : first_lane_row_ % 64 + 8 * (i / 2 % 2);
      // An LSE too large for base 2 stands as 0: next to it only scores as large count.
      if (!kHasBias && !kAllTerms && (query_flags >> row & 1) != 0 && core::IsFinite(lse[row]) &&
          !core::IsNan(scores_[i])) {
        const bool is_below = scores_[i] * problem_.scale < lse[row];
        scores_[i] =
            core::BitsToFloat(is_below != (problem_.scale < 0.0f) ? 0xff800000u : 0x7f800000u);
      }
    }
  }

  __device__ __forceinline__ void PatchValueProducts(const StepTile& tile) {
    const uint64_t flags = KeyFlags(base_.keys.second_flags, tile);
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) {
      if (IsKeyFlagged(flags, i)) value_products_[i] = NaN();
    }
  }

  // ---- results ----

  __device__ __forceinline__ void WriteGradients() {
    if constexpr (kKeepsKeys) {
      WriteKeyGradient(problem_.dk, problem_.qk_dim, problem_.scale, first_sum_);
      WriteKeyGradient(problem_.dv, problem_.v_dim, 1.0f, second_sum_);
    } else if (problem_.dq.data != nullptr) {
      const int64_t row = block_.first_row + first_lane_row_;
      WriteGradientRows<kDType>(
          problem_.dq, core::QueryOffset(problem_.dq, block_.sequence, block_.head, row),
          block_.sequence.q_rows - row, problem_.qk_dim, problem_.scale, first_sum_);
    }
  }

  __device__ __forceinline__ void WriteKeyGradient(const core::Array4& gradient, int64_t dim,
                                                   float factor,
                                                   const float (&sum)[kHeadDim / 2]) const {
    if (gradient.data == nullptr) return;
    const int64_t row = block_.first_row + first_lane_row_;
    WriteGradientRows<kDType>(gradient,
                              core::KeyOffset(gradient, block_.sequence, block_.head, row),
                              block_.sequence.kv_rows - row, dim, factor, sum);
  }

  const BackwardParams& base_;
  const Problem& problem_;
  const uint32_t shared_;  // address of the tiles
  State& state_;
  const KeptBlock& block_;
  const int warpgroup_;
  const int lane_;
  const int first_lane_row_;  // of the block's
  uint32_t steps_ = 0;        // that this warpgroup has done with
  uint32_t bias_ = 0;         // address of what this lane loads of stage 0
  uint32_t bias_row_bytes_ = 0;

  Fragments first_kept_;
  Fragments second_kept_;
  Statistics lse_;
  Statistics offset_;
  float scores_[kStepRows / 2];
  float value_products_[kStepRows / 2];
  uint32_t probabilities_[kStepRows / 16][4];
  uint32_t gradients_[kStepRows / 16][4];
  float first_sum_[kHeadDim / 2];                    // dQ or dK
  float second_sum_[kKeepsKeys ? kHeadDim / 2 : 1];  // dV
  float distance_sums_[2] = {};                      // of dS times ALiBi's distance
};

template <DType kDType, int kHeadDim, GradientSide kSide, GradientTerms kTerms>
__global__ void __launch_bounds__(MakeBackwardPolicy(kHeadDim).threads, 1)
    HopperGradientKernel(const __grid_constant__ GradientParams params) {
  using State = GradientState<kHeadDim, kSide, kTerms>;
  constexpr BackwardPolicy kPolicy = State::kPolicy;
  constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t address = SharedAddress(shared);
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  // In shared memory, since the loop has no registers for it.
  const KeptBlock block = MakeKeptBlock<kSide, kKeptRows>(params.base);
  // The second of the two launches fills the multiprocessors that the first one leaves. They have
  // nothing in common, but what follows waits for the second alone.
  AllowDependentLaunch();
  if (block.first_row >= (kKeepsKeys ? block.sequence.kv_rows : block.sequence.q_rows)) {
    if (blockIdx.x == 0) WaitForEarlierLaunch();
    return;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kPolicy.stages; ++stage) {
      InitBarrier(SharedAddress(&state.full[stage]), kFullArrivals);
      InitBarrier(SharedAddress(&state.empty[stage]), kEmptyArrivals);
    }
    InitBarrier(SharedAddress(&state.kept_full), 1);
    PublishBarriers();
    state.block = block;
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<kPolicy.loading_registers>();
    GradientLoader<kHeadDim, kSide, kTerms>(params, address, state).Run();
    if (blockIdx.x == 0) WaitForEarlierLaunch();
  } else {
    TakeRegisters<kPolicy.registers>();
    GradientWarpgroup<kDType, kHeadDim, kSide, kTerms>(params, address, state, warpgroup - 1).Run();
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_KERNEL_CUH_
