// The backward kernel of sm_90a with five products: two warpgroups keep 64 keys each and walk over
// the tiles of 64 queries that see them,
//     S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ += dS K.
// P^T and dS^T are fed to dV and dK from the registers. dS also goes through shared memory, from
// where each warpgroup makes one half of dQ's columns; they are added up in global memory, in the
// order in which the blocks come, and FinishQueriesKernel brings them into the tensor. The
// warpgroups take turns to start products, so that one evaluates while the other multiplies; dQ of
// a step is made during the next one, when both parts of dS are there.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_KERNEL_CUH_

#include "backend_cuda/hopper/backward_output.cuh"
#include "backend_cuda/hopper/fused_backward_instructions.cuh"
#include "backend_cuda/hopper/fused_backward_loading.cuh"
#include "core/gradient.h"

namespace tandem::cuda::hopper {

// A warpgroup with keys. This lane has keys 16 w + g and 16 w + g + 8 of the warpgroup's, r = 0 and
// 1; element 4 t + 2 r + e of scores is key r, query 8 t + 2 c + e of the step.
template <DType kDType, int kHeadDim>
class FusedGradientWarpgroup {
 public:
  using State = FusedState<kHeadDim>;
  static constexpr FusedPolicy kPolicy = State::kPolicy;

  __device__ FusedGradientWarpgroup(const FusedGradientParams& params, uint32_t shared,
                                    State& state, int warpgroup)
      : params_(params),
        base_(params.base),
        problem_(params.base.problem),
        shared_(shared),
        state_(state),
        warpgroup_(warpgroup),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(4 * warpgroup +
              __shfl_sync(~0u, static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize, 0)) {
    const uint32_t score_row = (16 * warp_ + (lane_ & 15)) * 128;
    const uint32_t score_column = ((lane_ >> 4) ^ (lane_ & 7)) << 4;
    places_ = (warp_ * kWarpSumBytes + lane_ * 16) << 16 | score_row | score_column;
    // Or the compiler would find it anew in each step.
    asm volatile("" : "+r"(places_));
  }

  __device__ __forceinline__ void Run() {
    if (warpgroup_ == 1) GiveTurn();
    for (uint32_t turn = 0;; ++turn) {
      block_ = &state_.blocks[turn % 2];
      Wait(SharedAddress(&state_.block_full[turn % 2]), turn / 2 & 1);
      if (block_->sequence.kv_rows == 0) break;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) key_sum_[i] = value_sum_[i] = 0.0f;
      Wait(SharedAddress(&state_.kept_full), turn & 1);
      Wait(SharedAddress(&state_.query_full[query_stage_]), query_parity_);
      const FusedStep step = Uniform(state_.steps[query_stage_]);
      if (step.tile.IsEnd()) {
        ReleaseStep(query_stage_);
        Release(state_.values_empty);
        AdvanceQueryStage();
        ++steps_;
        WriteKeyGradient(problem_.dv, problem_.v_dim, 1.0f, value_sum_);
      } else {
        VisitTiles(step);
      }
      Release(state_.keys_empty);
      WriteKeyGradient(problem_.dk, problem_.qk_dim, problem_.scale, key_sum_);
      Release(state_.block_empty[turn % 2]);
    }
    if (lane_ == 0) WaitReductions();
  }

 private:
  static constexpr int kTiles = kStepRows / 8;
  static constexpr int kBothThreads = 2 * kWarpgroupThreads;
  static constexpr int kSumElements = kStepRows * kHeadDim / kBothThreads;  // of dQ, of a lane
  static constexpr bool kHasRegisters = kHeadDim <= 64;                     // for dP beside dQ
  static constexpr int kWarpSumBytes = kPolicy.sum_bytes / kFusedKeyWarps;

  // ---- the loop ----

  // All tiles of a block; dV is written at the end, dK is not.
  __device__ __forceinline__ void VisitTiles(FusedStep step) {
    StartScores(__shfl_sync(~0u, query_stage_, 0));
    WaitForOutputs(tiles_);
    StartValueProducts(__shfl_sync(~0u, tiles_, 0) % 2);
    WaitProducts<0>(scores_);
    Pin(value_products_);
    LoadStatistics(__shfl_sync(~0u, query_stage_, 0), 0, lse_);
    if (step.tile.IsLast()) {
      Step<true, true>(step);
      return;
    }
    Step<true, false>(step);
    while (!step.tile.IsLast()) Step<false, false>(step);
    Step<false, true>(step);
  }

  // Products are started in this order: dV and dK of this step with dQ of the one before between
  // them, S and dP of the one after. kFirst, kLast: there is none before, none after. Afterwards
  // `step` is the next one.
  template <bool kFirst, bool kLast>
  __device__ __forceinline__ void Step(FusedStep& step) {
    const int row = step.row;
    const uint32_t stage = query_stage_;
    const uint32_t turn = __shfl_sync(~0u, tiles_, 0) % 2;  // stage of dO and dS
    Evaluate(step, stage);
    if constexpr (kLast) Release(state_.values_empty);
    StoreScoreGradients(turn);
    TakeTurn();
    StartValueSums(turn);
    PublishScoreGradients(turn);
    // The turn says that the other warpgroup's part of dS is there.
    if constexpr (!kFirst) StartQuerySums(turn ^ 1);
    StartKeySums(stage);
    // P's registers are wanted.
    WaitProducts<kFirst ? 1 : 2>(value_sum_);
    Release(state_.output_empty[turn]);
    const uint32_t next_stage = NextQueryStage();
    if constexpr (!kLast) {
      Wait(SharedAddress(&state_.query_full[next_stage]), NextQueryParity());
      StartScores(next_stage);
      if constexpr (kHasRegisters) {
        WaitForOutputs(tiles_ + 1);
        StartValueProducts(turn ^ 1);
        GiveTurn();
      }
    }
    if constexpr (!kFirst) {
      WaitProducts<kLast ? 1 : kHasRegisters ? 3 : 2>(query_sums_);
      Release(state_.score_empty[turn ^ 1]);
      StoreQuerySums();
    }
    if constexpr (!kLast && !kHasRegisters) {
      WaitForOutputs(tiles_ + 1);
      StartValueProducts(turn ^ 1);
    }
    if constexpr (kLast || !kHasRegisters) GiveTurn();
    if constexpr (!kLast) {
      step = state_.steps[next_stage];
      LoadStatistics(next_stage, 0, lse_);
    }
    if constexpr (!kFirst) ReduceQuerySums(last_row_);
    last_row_ = row;
    ++steps_;
    ++tiles_;
    AdvanceQueryStage();
    if constexpr (!kLast) {
      step = Uniform(step);
      WaitProducts<1>(scores_);
      ReleaseStep(stage);
    } else {
      Wait(SharedAddress(&state_.score_full[turn]), (tiles_ - 1) / 2 & 1);
      StartQuerySums(turn);
      WriteKeyGradient(problem_.dv, problem_.v_dim, 1.0f, value_sum_);
      WaitProducts<0>(query_sums_);
      Pin(key_sum_);
      ReleaseStep(stage);
      Release(state_.score_empty[turn]);
      StoreQuerySums();
      ReduceQuerySums(row);
    }
  }

  // The last turn that is given is left unused.
  __device__ __forceinline__ void TakeTurn() const { SyncThreads(1 + warpgroup_, kBothThreads); }
  __device__ __forceinline__ void GiveTurn() const {
    ArriveThreads(1 + (warpgroup_ ^ 1), kBothThreads);
  }

  // Known to the compiler to be the same for all lanes.
  static __device__ __forceinline__ FusedStep Uniform(const FusedStep& step) {
    return {{__shfl_sync(~0u, step.tile.word, 0), step.tile.head}, __shfl_sync(~0u, step.row, 0)};
  }
  __device__ __forceinline__ uint32_t NextQueryParity() const {
    return query_parity_ ^ (query_stage_ == kPolicy.query_stages - 1 ? 1 : 0);
  }
  __device__ __forceinline__ void AdvanceQueryStage() {
    query_parity_ = NextQueryParity();
    query_stage_ = NextQueryStage();
  }
  __device__ __forceinline__ uint32_t NextQueryStage() const {
    return __shfl_sync(~0u, query_stage_ == kPolicy.query_stages - 1 ? 0 : query_stage_ + 1, 0);
  }
  __device__ __forceinline__ void WaitForOutputs(uint32_t tile) const {
    Wait(SharedAddress(&state_.output_full[tile % 2]), tile / 2 & 1);
  }
  static_assert(kPolicy.output_stages == 2 && kPolicy.score_stages == 2);
  // Counts this warp as done with what the barrier guards.
  __device__ __forceinline__ void Release(uint64_t& barrier) const {
    __syncwarp();
    if (lane_ == 0) Arrive(SharedAddress(&barrier));
  }
  // The tile of Q, and what warps have written beside it.
  __device__ __forceinline__ void ReleaseStep(uint32_t stage) const {
    Arrive(SharedAddress(&state_.query_empty[stage]));
  }

  // ---- products ----

  __device__ __forceinline__ void StartScores(uint32_t stage) {
    StartProduct(scores_, shared_, shared_ + State::kQueries + stage * kPolicy.step_bytes);
  }
  __device__ __forceinline__ void StartValueProducts(uint32_t stage) {
    StartProduct(value_products_, shared_ + kPolicy.kept_bytes,
                 shared_ + State::kOutputs + stage * kPolicy.step_bytes);
  }
  __device__ __forceinline__ void StartProduct(float (&product)[kStepRows / 2], uint32_t kept,
                                               uint32_t step) {
    const uint32_t a = KeyTile(kept + warpgroup_ * (64 * 128));
    const uint32_t b = KeyTile(step);
    Pin(product);
    FenceProducts();
    BeginScores<kDType>(product, a, b);
#pragma unroll
    for (int k = 1; k < kHeadDim / 16; ++k) {
      AddScores<kDType>(product, a + k / 4 * (kKeptRows * 128 >> 4) + k % 4 * 2,
                        b + k / 4 * (kStepRows * 128 >> 4) + k % 4 * 2);
    }
    CommitProducts();
  }

  __device__ __forceinline__ void StartValueSums(uint32_t stage) {
    Pin(value_sum_);
    Pin(key_sum_);
    FenceProducts();
    AddSums(value_sum_, probabilities_, shared_ + State::kOutputs + stage * kPolicy.step_bytes);
  }
  __device__ __forceinline__ void StartKeySums(uint32_t stage) {
    Pin(key_sum_);
    FenceProducts();
    AddSums(key_sum_, gradients_, shared_ + State::kQueries + stage * kPolicy.step_bytes);
  }
  __device__ __forceinline__ void AddSums(float (&sum)[kHeadDim / 2],
                                          const uint32_t (&a)[kStepRows / 16][4], uint32_t step) {
    const uint32_t b = ValueTile(step, kStepRows);
#pragma unroll
    for (int k = 0; k < kStepRows / 16; ++k) {
      AddValues<kDType>(sum, a[k], b + k * (16 * 128 >> 4));
    }
    CommitProducts();
  }

  // ---- dS in shared memory: a row of 64 queries for each key ----

  __device__ __forceinline__ void StoreScoreGradients(uint32_t stage) {
    // It has been read by both warpgroups two steps ago.
    Wait(SharedAddress(&state_.score_empty[stage]), (tiles_ / 2 & 1) ^ 1);
    const uint32_t row =
        (places_ & 0xffff) + (shared_ + State::kScores + stage * kPolicy.score_bytes);
#pragma unroll
    for (int k = 0; k < kStepRows / 16; ++k) StoreMatrices(row ^ k << 5, gradients_[k]);
  }
  __device__ __forceinline__ void PublishScoreGradients(uint32_t stage) const {
    PublishSharedWrites();
    Release(state_.score_full[stage]);
  }

  // ---- dQ of a step: 64 queries by half of the columns ----

  __device__ __forceinline__ void StartQuerySums(uint32_t stage) {
    const uint32_t a = KeyTile(shared_ + State::kScores + stage * kPolicy.score_bytes);
    const uint32_t b =
        KeyTile(shared_ + warpgroup_ * (kHeadDim == 128 ? kKeptRows * 128 : kHeadDim));
    Pin(key_sum_);
    FenceProducts();
    BeginTransposed<kDType>(query_sums_, a, b);
#pragma unroll
    for (int k = 1; k < kKeptRows / 16; ++k) {
      AddTransposed<kDType>(query_sums_, a + k * (16 * 128 >> 4), b + k * (16 * 128 >> 4));
    }
    CommitProducts();
  }

  // Four elements of each lane after those of the lanes before.
  __device__ __forceinline__ void StoreQuerySums() {
    if (lane_ == 0) WaitReductionSources();
    __syncwarp();
    const uint32_t sums = (places_ >> 16) + (shared_ + State::kSums);
#pragma unroll
    for (int i = 0; i < kSumElements; i += 4) {
      StoreShared(sums + i * (kWarpSize * 4), &query_sums_[i]);
    }
  }
  // row: of the planes.
  __device__ __forceinline__ void ReduceQuerySums(int row) const {
    PublishSharedWrites();
    __syncwarp();
    if (lane_ == 0) {
      StartReduction(params_.query_sums + int64_t{row} * kHeadDim + warp_ * (kWarpSumBytes / 4),
                     shared_ + State::kSums + warp_ * kWarpSumBytes, kWarpSumBytes);
    }
  }

  // ---- pairs ----

  // Scores to P, and products with values, when they are there, to dS.
  __device__ __forceinline__ void Evaluate(const FusedStep& step, uint32_t stage) {
    const StepTile& tile = step.tile;
    if (tile.IsFlagged()) {
      const uint32_t bits = tile.IsHidden() ? LoadBits() : ~0u;
      PatchScores(step);
      EvaluatePairs<true, true>(stage, bits);
    } else if (tile.IsHidden()) {
      EvaluatePairs<true, false>(stage, LoadBits());
    } else {
      EvaluatePairs<false, false>(stage, ~0u);
    }
  }

  // The products are waited for half way, so that exponentials and what follows them mix.
  template <bool kHidden, bool kFlagged>
  __device__ __forceinline__ void EvaluatePairs(uint32_t stage, uint32_t bits) {
    float offset[kStepRows / 4];
    Probabilities<kHidden, kFlagged>(bits, 0);
    LoadStatistics(stage, sizeof(state_.lse), offset);
    WaitProducts<0>(value_products_);
    if (kFlagged) PatchValueProducts();
    Probabilities<kHidden, kFlagged>(bits, kTiles / 2);
    Gradients<kFlagged>(offset, bits);
    Pack(scores_, probabilities_);
    Pack(value_products_, gradients_);
  }

  // Bit 16 r + 2 t + e: the pair is visible.
  __device__ __forceinline__ uint32_t LoadBits() const {
    const uint16_t* const words =
        reinterpret_cast<const uint16_t*>(
            &state_.words[steps_ % State::kWordStages][16 * warp_ + lane_ / 4]) +
        (lane_ & 3);
    return words[0] | uint32_t{words[8 * 4]} << 16;
  }

  // Of the lane's queries, `offset` bytes behind lse.
  __device__ __forceinline__ void LoadStatistics(uint32_t stage, uint32_t offset,
                                                 float (&statistics)[kStepRows / 4]) const {
    const uint32_t from = (places_ >> 16 & 0x30) + (SharedAddress(state_.lse[stage]) + offset);
#pragma unroll
    for (int n = 0; n < kStepRows / 4; n += 4) LoadShared(from + 16 * n, &statistics[n]);
  }

  static __device__ __forceinline__ bool IsVisible(uint32_t bits, int t, int i) {
    return (bits & 1u << (16 * (i / 2) + 2 * t + i % 2)) != 0;
  }

  // kFlagged: scores are anything, also far above the row's LSE.
  template <bool kHidden, bool kFlagged>
  __device__ __forceinline__ void Probabilities(uint32_t bits, int first) {
#pragma unroll
    for (int t = first; t < first + kTiles / 2; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores_[4 * t + i];
        float x = fmaf(score, base_.unit, -lse_[2 * t + i % 2]);
        if (kFlagged) x = MinKeepNan(x, 0.0f);
        if (kHidden) x = IsVisible(bits, t, i) ? x : core::NegativeInfinity();
        score = Exp2Approximate(x);
      }
    }
  }

  // kFlagged: products are anything, also at hidden pairs; else P, which is 0 there, suffices.
  template <bool kFlagged>
  __device__ __forceinline__ void Gradients(const float (&offset)[kStepRows / 4], uint32_t bits) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& product = value_products_[4 * t + i];
        product = core::ScoreGradient(scores_[4 * t + i], product, offset[2 * t + i % 2]);
        if (kFlagged) product = IsVisible(bits, t, i) ? product : 0.0f;
      }
    }
  }

  // An accumulator of 64 x 64 is A of the next product.
  static __device__ __forceinline__ void Pack(const float (&x)[kStepRows / 2],
                                              uint32_t (&packed)[kStepRows / 16][4]) {
#pragma unroll
    for (int i = 0; i < kStepRows / 4; ++i) {
      packed[i / 4][i % 4] = PackPair<kDType>(x[2 * i], x[2 * i + 1]);
    }
  }

  // ---- elements that the products cannot serve, as PatchPair of backward_terms.cuh ----

  static __device__ __forceinline__ float NaN() { return core::BitsToFloat(0x7fffffffu); }

  // The flags of this lane's keys, in bits 0 and 8.
  __device__ __forceinline__ uint32_t KeyFlags(const uint64_t* flags) const {
    const int64_t key = block_->first_row + 64 * warpgroup_;
    const uint64_t word = flags[KeyFlagWord(base_, block_->sequence, block_->head, key)];
    return static_cast<uint32_t>(word >> (16 * (warp_ & 3) + lane_ / 4));
  }

  __device__ __forceinline__ void PatchScores(const FusedStep& step) {
    const StepTile& tile = step.tile;
    const uint32_t key_flags = KeyFlags(base_.keys.first_flags);
    const Sequence& s = block_->sequence;
    const uint64_t query_flags =
        base_.queries.first_flags[QueryFlagWord(base_, s, tile.head, tile.FirstRow())];
    const float* const lse = base_.lse + step.row;
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) {
      if ((key_flags >> (8 * (i / 2 % 2)) & 1) != 0) scores_[i] = NaN();
      const int row = 8 * (i / 4) + 2 * (lane_ & 3) + i % 2;
      // An LSE too large for base 2 stands as 0: next to it only scores as large count.
      if ((query_flags >> row & 1) != 0 && core::IsFinite(lse[row]) && !core::IsNan(scores_[i])) {
        const bool is_below = scores_[i] * problem_.scale < lse[row];
        scores_[i] =
            core::BitsToFloat(is_below != (problem_.scale < 0.0f) ? 0xff800000u : 0x7f800000u);
      }
    }
  }

  __device__ __forceinline__ void PatchValueProducts() {
    const uint32_t flags = KeyFlags(base_.keys.second_flags);
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) {
      if ((flags >> (8 * (i / 2 % 2)) & 1) != 0) value_products_[i] = NaN();
    }
  }

  // ---- results ----

  __device__ __forceinline__ void WriteKeyGradient(const core::Array4& gradient, int64_t dim,
                                                   float factor,
                                                   const float (&sum)[kHeadDim / 2]) const {
    if (gradient.data == nullptr) return;
    const Sequence& s = block_->sequence;
    const int64_t row = block_->first_row + 16 * warp_ + lane_ / 4;
    WriteGradientRows<kDType>(gradient, core::KeyOffset(gradient, s, block_->head, row),
                              s.kv_rows - row, dim, factor, sum);
  }

  const FusedGradientParams& params_;
  const BackwardParams& base_;
  const Problem& problem_;
  const uint32_t shared_;  // address of the tiles
  State& state_;
  const int warpgroup_;
  const int lane_;
  const int warp_;  // of those with keys
  const KeptBlock* block_ = nullptr;
  uint32_t steps_ = 0;         // that this warpgroup has done with, ends of blocks among them
  uint32_t tiles_ = 0;         // without those
  uint32_t query_stage_ = 0;   // of the step
  uint32_t query_parity_ = 0;  // of its barrier
  int last_row_ = 0;           // of the planes, of the step before
  // Where this lane stores, from the beginning of a stage: dS in the low half, dQ in the high one.
  uint32_t places_;

  float lse_[kStepRows / 4];
  float scores_[kStepRows / 2];
  float value_products_[kStepRows / 2];
  uint32_t probabilities_[kStepRows / 16][4];
  uint32_t gradients_[kStepRows / 16][4];
  float query_sums_[kSumElements];
  float key_sum_[kHeadDim / 2];    // dK
  float value_sum_[kHeadDim / 2];  // dV
};

// The block of an index: heads in sections whose rows stay in the L2 cache, the longest blocks
// first in each; the last section is one of enough blocks for all multiprocessors to end together.
// False where its sequence has no such keys.
__device__ __forceinline__ bool ResolveBlock(const FusedGradientParams& params, uint32_t index,
                                             KeptBlock* block) {
  const Problem& p = params.base.problem;
  const auto blocks = static_cast<uint32_t>(params.base.blocks);
  const auto heads = static_cast<uint32_t>(p.kv_heads);
  auto section = static_cast<uint32_t>(params.base.section_heads);
  uint32_t first_head = index / (section * blocks) * section;
  if (first_head >= params.last_section) {
    first_head = params.last_section;
    section = static_cast<uint32_t>(p.batch) * heads - first_head;
  }
  const uint32_t rest = index - first_head * blocks;
  const uint32_t head = first_head + rest % section;
  int32_t status = 0;
  block->sequence = core::ResolveSequence(p, head / heads, &status);
  block->head = head % heads;
  block->first_row = int64_t{rest / section} * kKeptRows;
  return block->first_row < block->sequence.kv_rows;
}

template <int kHeadDim>
__device__ __forceinline__ void LoadBlocks(const FusedGradientParams& params, uint32_t address,
                                           FusedState<kHeadDim>& state) {
  uint32_t steps = 0;
  uint32_t tiles = 0;
#pragma unroll 1
  for (uint32_t turn = 0;; ++turn) {
    const uint32_t slot = turn % 2;
    if (threadIdx.x == kFusedLoadingWarps * kWarpSize) {
      Wait(SharedAddress(&state.block_empty[slot]), (turn / 2 & 1) ^ 1);
      KeptBlock block = {};
      for (uint32_t index = turn == 0 ? blockIdx.x : gridDim.x + atomicAdd(params.next_block, 1);;
           index = gridDim.x + atomicAdd(params.next_block, 1)) {
        if (index >= params.block_count) {
          block.sequence.kv_rows = 0;
          break;
        }
        if (ResolveBlock(params, index, &block)) break;
      }
      state.blocks[slot] = block;
      Arrive(SharedAddress(&state.block_full[slot]));
    }
    __syncwarp();
    Wait(SharedAddress(&state.block_full[slot]), turn / 2 & 1);
    if (state.blocks[slot].sequence.kv_rows == 0) return;
    FusedLoader<kHeadDim>(params, address, state, turn, steps, tiles).Run();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) Arrive(SharedAddress(&state.block_empty[slot]));
  }
}

template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(MakeFusedPolicy(kHeadDim).threads, 1)
    FusedGradientKernel(const __grid_constant__ FusedGradientParams params) {
  using State = FusedState<kHeadDim>;
  constexpr FusedPolicy kPolicy = State::kPolicy;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t address = SharedAddress(shared);
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  if (threadIdx.x == 0) state.InitBarriers();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<kPolicy.loading_registers>();
    LoadBlocks<kHeadDim>(params, address, state);
  } else {
    TakeRegisters<kPolicy.registers>();
    FusedGradientWarpgroup<kDType, kHeadDim>(params, address, state, warpgroup - 1).Run();
  }
}

// The sums of dQ into the tensor: a block for 64 rows of a head, whose warps have what those of
// FusedGradientWarpgroup left.
template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(kFusedKeyWarps* kWarpSize)
    FinishQueriesKernel(const __grid_constant__ FusedGradientParams params) {
  constexpr int kElements = kStepRows * kHeadDim / (kFusedKeyWarps * kWarpSize);
  const Problem& p = params.base.problem;
  const auto tiles = static_cast<uint32_t>(params.base.blocks);
  const auto heads = static_cast<uint32_t>(p.q_heads);
  const int64_t first_row = int64_t{blockIdx.x % tiles} * kStepRows;
  const uint32_t head = blockIdx.x / tiles % heads;
  int32_t status = 0;
  const Sequence s = core::ResolveSequence(p, blockIdx.x / tiles / heads, &status);
  if (first_row >= s.q_rows) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float4* const from = reinterpret_cast<const float4*>(
      params.query_sums + (QueryPlaneRow(params.base, s, head) + first_row) * kHeadDim +
      warp * (kWarpSize * kElements) + lane * 4);
  float sum[kElements];
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float4 x = __ldcs(from + i / 4 * kWarpSize);
    sum[i] = x.x;
    sum[i + 1] = x.y;
    sum[i + 2] = x.z;
    sum[i + 3] = x.w;
  }
  const int64_t row = first_row + 16 * (warp % 4) + lane / 4;
  WriteGradientRows<kDType>(p.dq, core::QueryOffset(p.dq, s, head, row), s.q_rows - row, p.qk_dim,
                            p.scale, sum, warp / 4 * (kHeadDim / 2));
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_KERNEL_CUH_
