// dBias on sm_90a where the bias has rows and keys of its own. A block takes tiles of 128 rows and
// 64 keys of it and, for each, the sequences and heads that share it, in their order: S and dP of
// every one by wgmma, and dS added up in registers. So nothing of the size of all pairs is ever in
// memory but the gradient itself, which is written once.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_BIAS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_BIAS_CUH_

#include "backend_cuda/hopper/backward_kernel.cuh"

namespace tandem::cuda::hopper {

// The tiles of dBias and their numbers.
struct BiasTiles {
  int64_t count;
  int32_t rows;  // tiles along the rows, and along the keys
  int32_t keys;
};

// A tile's operands for one sequence and head take two stages, for S and for dP.
struct BiasGradientPolicy {
  int stages;
  int stage_bytes;
  int bias_bytes;
  int threads;
};
constexpr BiasGradientPolicy MakeBiasGradientPolicy(int head_dim) {
  BiasGradientPolicy policy = {};
  policy.stages = 4;
  policy.stage_bytes = (kKeptRows + kStepRows) * head_dim * 2;
  policy.bias_bytes = kKeptRows * kStepRows * 2;
  policy.threads = 3 * kWarpgroupThreads;
  return policy;
}

// One sequence and head of a tile.
struct BiasStep {
  uint32_t properties;  // StepTile's, and those below
  int32_t tile;
  int64_t key_flags;  // word of the keys' flags

  static constexpr uint32_t kFirst = 1u << StepTile::kPropertyBits;  // of its tile
  static constexpr uint32_t kIdle = kFirst << 1;                     // nothing of it is visible
};

template <int kHeadDim>
struct alignas(16) BiasGradientState {
  static constexpr BiasGradientPolicy kPolicy = MakeBiasGradientPolicy(kHeadDim);
  static constexpr int kSteps = kPolicy.stages / 2;  // under way
  static constexpr int kBiasOffset = kPolicy.stages * kPolicy.stage_bytes;
  static constexpr int kOffset = kBiasOffset + kPolicy.bias_bytes;

  RowStatistics statistics[kSteps][kKeptRows];
  uint64_t words[kSteps][kKeptRows];  // as GradientState's, of the queries' side
  BiasStep steps[kSteps];
  uint64_t full[kPolicy.stages];
  uint64_t empty[kPolicy.stages];
  uint64_t bias_full;
  uint64_t bias_empty;
};
template <int kHeadDim>
inline constexpr int kBiasGradientSharedBytes =
    BiasGradientState<kHeadDim>::kOffset + static_cast<int>(sizeof(BiasGradientState<kHeadDim>));

// Where a tile is, and who shares it.
struct BiasTile {
  int first_query;
  int first_key;
  int batch_begin;
  int head_begin;
  int heads;  // of each sequence
  int count;  // of sequences times heads

  __device__ __forceinline__ BiasTile(const Problem& p, const BiasTiles& tiles, int64_t index) {
    const bool is_per_batch = p.dbias.batch_stride != 0;
    const bool is_per_head = p.dbias.head_stride != 0;
    first_key = static_cast<int>(index % tiles.keys) * kStepRows;
    first_query = static_cast<int>(index / tiles.keys % tiles.rows) * kKeptRows;
    const int plane = static_cast<int>(index / tiles.keys / tiles.rows);
    const int planes_of_batch = is_per_head ? static_cast<int>(p.q_heads) : 1;
    batch_begin = is_per_batch ? plane / planes_of_batch : 0;
    head_begin = is_per_head ? plane % planes_of_batch : 0;
    heads = is_per_head ? 1 : static_cast<int>(p.q_heads);
    count = is_per_batch ? heads : static_cast<int>(p.batch) * heads;
  }
};

// The warpgroup that loads. Its warps list all steps; each of the first ones serves its own.
template <int kHeadDim>
class BiasGradientLoader {
 public:
  using State = BiasGradientState<kHeadDim>;
  static constexpr BiasGradientPolicy kPolicy = State::kPolicy;

  __device__ BiasGradientLoader(const GradientParams& params, const BiasTiles& tiles,
                                uint32_t shared, State& state)
      : params_(params),
        base_(params.base),
        problem_(params.base.problem),
        tiles_(tiles),
        shared_(shared),
        state_(state),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {}

  __device__ void Run() {
    if (warp_ >= State::kSteps) return;
    uint32_t turn = 0;
    for (int64_t index = blockIdx.x; index < tiles_.count; index += gridDim.x, ++turn) {
      const BiasTile tile(problem_, tiles_, index);
      if (threadIdx.x == 0) LoadBias(tile, turn);
      ListTile(tile, static_cast<int>(index));
    }
    if (IsMine()) {
      const uint32_t full = WaitForStage(0);
      if (lane_ == 0) {
        state_.steps[Slot()] = {StepTile::kEnd, 0, 0};
        Arrive(full);
      }
      Arrive(full);
    }
  }

 private:
  __device__ __forceinline__ bool IsMine() const { return Slot() == static_cast<uint32_t>(warp_); }
  __device__ __forceinline__ uint32_t Slot() const { return steps_ % State::kSteps; }
  // Waits until a stage of the next step is empty.
  __device__ __forceinline__ uint32_t WaitForStage(uint32_t part) const {
    const uint32_t stage = 2 * Slot() + part;
    Wait(SharedAddress(&state_.empty[stage]), (steps_ / State::kSteps & 1) ^ 1);
    return SharedAddress(&state_.full[stage]);
  }

  __device__ __forceinline__ void LoadBias(const BiasTile& tile, uint32_t turn) const {
    const BiasSource& bias = params_.bias;
    const uint32_t full = SharedAddress(&state_.bias_full);
    Wait(SharedAddress(&state_.bias_empty), (turn & 1) ^ 1);
    const int boxes = bias.per_row != 0 ? 2 : 1;
    ArriveExpecting(full, bias.per_row != 0 ? kPolicy.bias_bytes : kStepRows * 2);
    const int row = static_cast<int>(problem_.q_offset) + tile.first_query;
    for (int n = 0; n < boxes; ++n) {
      CopyBox(shared_ + State::kBiasOffset + n * (kPolicy.bias_bytes / 2), &bias.map, full,
              static_cast<int>(problem_.kv_offset) + tile.first_key,
              bias.per_row != 0 ? row + 64 * n : 0, bias.per_head != 0 ? tile.head_begin : 0,
              bias.per_batch != 0 ? tile.batch_begin : 0);
    }
  }

  __device__ __forceinline__ void ListTile(const BiasTile& tile, int index) {
    uint32_t first = BiasStep::kFirst;
#pragma unroll 1
    for (int begin = 0; begin < tile.count; begin += kWarpSize) {
      const int n = begin + lane_;
      const uint32_t mine = n < tile.count ? Properties(tile, n) : kNoTile;
#pragma unroll 1
      for (uint32_t left = __ballot_sync(~0u, mine != kNoTile); left != 0; left &= left - 1) {
        const int item = __ffs(static_cast<int>(left)) - 1;
        const uint32_t properties = __shfl_sync(~0u, mine, item) | first;
        if (IsMine()) Announce(tile, index, begin + item, properties);
        first = 0;
        ++steps_;
      }
    }
    if (first == 0) return;
    if (IsMine()) {
      const uint32_t full = WaitForStage(0);
      const uint32_t second_full = WaitForStage(1);
      if (lane_ == 0) {
        state_.steps[Slot()] = {first | BiasStep::kIdle, index, 0};
        Arrive(full);
        Arrive(second_full);
      }
      Arrive(full);
    }
    ++steps_;
  }

  struct Owner {
    Sequence sequence;
    int head;
  };
  __device__ __forceinline__ Owner OwnerOf(const BiasTile& tile, int item) const {
    int32_t status = 0;
    return {core::ResolveSequence(problem_, tile.batch_begin + item / tile.heads, &status),
            tile.head_begin + item % tile.heads};
  }
  __device__ __forceinline__ HeadRows RowsOf(const Owner& owner) const {
    return {owner.sequence, owner.head,
            static_cast<int>(QueryPlaneRow(base_, owner.sequence, owner.head)),
            ExistingRows(owner.sequence)};
  }

  __device__ __forceinline__ uint32_t Properties(const BiasTile& tile, int item) const {
    const Owner owner = OwnerOf(tile, item);
    const HeadRows rows = RowsOf(owner);
    if (tile.first_query >= rows.existing || tile.first_key >= core::LocalKeys(owner.sequence)) {
      return kNoTile;
    }
    uint32_t properties =
        HidingParts<false>(base_, rows, tile.first_query, kKeptRows, tile.first_key, kStepRows);
    if (properties == kNoTile) return kNoTile;
    // The bias of rows that are not there may be anything.
    if (tile.first_query + kKeptRows > rows.existing) properties |= StepTile::kStructuredPart;
    const int64_t word =
        KeyFlagWord(base_, owner.sequence, owner.head / problem_.group, tile.first_key);
    if ((base_.keys.first_flags[word] | base_.keys.second_flags[word]) != 0) {
      properties |= StepTile::kFlagged;
    }
    return properties;
  }

  __device__ __forceinline__ void Announce(const BiasTile& tile, int index, int item,
                                           uint32_t properties) const {
    const Owner owner = OwnerOf(tile, item);
    const HeadRows rows = RowsOf(owner);
    const int64_t kv_head = owner.head / problem_.group;
    const int query = rows.query_row + tile.first_query;
    const int key = static_cast<int>(KeyPlaneRow(base_, owner.sequence, kv_head)) + tile.first_key;
    const uint32_t slot = Slot();
    const uint32_t full = WaitForStage(0);
    if (lane_ == 0) {
      state_.steps[slot] = {properties, index,
                            KeyFlagWord(base_, owner.sequence, kv_head, tile.first_key)};
      Load(2 * slot, full, params_.queries.first, params_.keys.first, query, key);
      Load(2 * slot + 1, WaitForStage(1), params_.queries.second, params_.keys.second, query, key);
    }
    __syncwarp();
#pragma unroll
    for (int n = lane_; n < kKeptRows; n += kWarpSize) {
      state_.statistics[slot][n] = base_.statistics[query + n];
    }
    if ((properties & (StepTile::kStructuredPart | StepTile::kDensePart)) != 0) {
#pragma unroll 2
      for (int n = lane_; n < kKeptRows; n += kWarpSize) {
        state_.words[slot][n] =
            RowWord<false>(base_, rows, properties, tile.first_query + n, tile.first_key);
      }
    }
    Arrive(full);
  }

  // Rows of Q or dO, then of K or V.
  __device__ __forceinline__ void Load(uint32_t stage, uint32_t full, const CUtensorMap& queries,
                                       const CUtensorMap& keys, int query, int key) const {
    ArriveExpecting(full, kPolicy.stage_bytes);
    uint32_t target = shared_ + stage * kPolicy.stage_bytes;
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target, &queries, full, 64 * part, query, 0, 0);
      CopyBox(target + 64 * 128, &queries, full, 64 * part, query + 64, 0, 0);
      target += kKeptRows * 128;
    }
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target, &keys, full, 64 * part, key, 0, 0);
      target += kStepRows * 128;
    }
  }

  const GradientParams& params_;
  const BackwardParams& base_;
  const Problem& problem_;
  const BiasTiles& tiles_;
  const uint32_t shared_;
  State& state_;
  const int warp_;
  const int lane_;
  uint32_t steps_ = 0;  // listed
};

// 64 rows of the tiles. Registers are as those of GradientWarpgroup where queries are kept.
template <DType kDType, int kHeadDim>
class BiasGradientWarpgroup {
 public:
  using State = BiasGradientState<kHeadDim>;
  static constexpr BiasGradientPolicy kPolicy = State::kPolicy;

  __device__ BiasGradientWarpgroup(const GradientParams& params, const BiasTiles& tiles,
                                   uint32_t shared, State& state, int warpgroup)
      : params_(params),
        base_(params.base),
        problem_(params.base.problem),
        tiles_(tiles),
        shared_(shared),
        state_(state),
        warpgroup_(warpgroup),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_lane_row_(64 * warpgroup +
                        16 * (static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize) +
                        static_cast<int>(threadIdx.x) % kWarpSize / 4) {}

  __device__ void Run() {
    uint32_t turn = 0;
    int tile = -1;
    for (uint32_t step = 0;; ++step) {
      const uint32_t slot = step % State::kSteps;
      Wait(SharedAddress(&state_.full[2 * slot]), step / State::kSteps & 1);
      const BiasStep here = state_.steps[slot];
      const uint32_t properties = __shfl_sync(~0u, here.properties, 0);
      if ((properties & (BiasStep::kFirst | StepTile::kEnd)) != 0) {
        if (tile >= 0) Write(tile);
        if ((properties & StepTile::kEnd) != 0) return;
        tile = here.tile;
        BeginTile(turn++);
      }
      if ((properties & BiasStep::kIdle) == 0) {
        AddStep(step, properties, here.key_flags);
      } else {
        Release(2 * slot);
        Release(2 * slot + 1);
      }
    }
  }

 private:
  static constexpr int kTiles = kStepRows / 8;

  __device__ __forceinline__ void Release(uint32_t stage) const {
    Arrive(SharedAddress(&state_.empty[stage]));
  }

  // The bias stays in registers; bits of the pairs that it hides are clear.
  __device__ __forceinline__ void BeginTile(uint32_t turn) {
    Wait(SharedAddress(&state_.bias_full), turn & 1);
    const int warp_row = params_.bias.per_row != 0 ? first_lane_row_ - lane_ / 4 + (lane_ & 15) : 0;
    const uint32_t address =
        shared_ + State::kBiasOffset + warp_row * 128 + ((lane_ >> 4 ^ (warp_row & 7)) << 4);
    constexpr uint32_t kHidden = kDType == DType::kF16 ? 0xfc00u : 0xff80u;
    bits_ = ~0u;
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      LoadMatrices(bias_[n], address ^ n << 5);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int bit = 16 * (i % 2) + 2 * (2 * n + i / 2);
        if ((bias_[n][i] & 0xffffu) == kHidden) bits_ &= ~(1u << bit);
        if (bias_[n][i] >> 16 == kHidden) bits_ &= ~(2u << bit);
      }
    }
    Arrive(SharedAddress(&state_.bias_empty));
    has_hidden_ = __any_sync(~0u, bits_ != ~0u) != 0;
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) sum_[i] = 0.0f;
  }

  __device__ __forceinline__ void StartProduct(float (&product)[kStepRows / 2], uint32_t stage) {
    const uint32_t address = shared_ + stage * kPolicy.stage_bytes;
    const uint32_t a = KeyTile(address + warpgroup_ * (64 * 128));
    const uint32_t b = KeyTile(address + kKeptRows * kHeadDim * 2);
    FenceProducts();
    BeginScores<kDType>(product, a, b);
#pragma unroll
    for (int k = 1; k < kHeadDim / 16; ++k) {
      AddScores<kDType>(product, a + k / 4 * (kKeptRows * 128 >> 4) + k % 4 * 2,
                        b + k / 4 * (kStepRows * 128 >> 4) + k % 4 * 2);
    }
    CommitProducts();
  }

  __device__ __forceinline__ void AddStep(uint32_t step, uint32_t properties, int64_t key_flags) {
    const uint32_t slot = step % State::kSteps;
    StartProduct(scores_, 2 * slot);
    Wait(SharedAddress(&state_.full[2 * slot + 1]), step / State::kSteps & 1);
    StartProduct(value_products_, 2 * slot + 1);
    RowStatistics statistics[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      statistics[r] = state_.statistics[slot][first_lane_row_ + 8 * r];
    }
    uint32_t bits = bits_;
    bool is_hidden = has_hidden_;
    if ((properties & (StepTile::kStructuredPart | StepTile::kDensePart)) != 0) {
      const uint16_t* const words =
          reinterpret_cast<const uint16_t*>(&state_.words[slot][first_lane_row_]) + (lane_ & 3);
      bits &= words[0] | uint32_t{words[8 * 4]} << 16;
      is_hidden = true;
    }
    WaitProducts<1>(scores_);
    const bool is_flagged = (properties & StepTile::kFlagged) != 0;
    if (is_flagged) Patch(scores_, base_.keys.first_flags[key_flags]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores_[4 * t + i];
        const uint32_t word = bias_[t / 2][t % 2 * 2 + i / 2];
        const float bias = i % 2 == 0 ? UnpackLow<kDType>(word) : UnpackHigh<kDType>(word);
        const float x = fmaf(score, problem_.scale, bias) - statistics[i / 2].lse;
        score = Exp2Approximate(MinKeepNan(x, 0.0f) * core::kLog2e);
      }
    }
    WaitProducts<0>(value_products_);
    Release(2 * slot);
    Release(2 * slot + 1);
    if (is_flagged) Patch(value_products_, base_.keys.second_flags[key_flags]);
    if (is_hidden) {
      Add<true>(bits, statistics);
    } else {
      Add<false>(bits, statistics);
    }
  }

  template <bool kHidden>
  __device__ __forceinline__ void Add(uint32_t bits, const RowStatistics (&statistics)[2]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 4 * t + i;
        float gradient =
            core::ScoreGradient(scores_[n], value_products_[n], statistics[i / 2].offset);
        if (kHidden) {
          gradient = (bits & 1u << (16 * (i / 2) + 2 * t + i % 2)) != 0 ? gradient : 0.0f;
        }
        sum_[n] += gradient;
      }
    }
  }

  // Keys with elements that products cannot serve.
  __device__ __forceinline__ void Patch(float (&products)[kStepRows / 2], uint64_t flags) const {
    flags >>= 2 * (lane_ & 3);
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) {
      if ((flags >> (8 * (i / 4) + i % 2) & 1) != 0) products[i] = core::BitsToFloat(0x7fffffffu);
    }
  }

  // + 0 turns -0 into +0.
  __device__ __forceinline__ void Write(int index) const {
    const BiasTile tile(problem_, tiles_, index);
    const core::Array4& dbias = problem_.dbias;
    const int64_t row = tile.first_query + first_lane_row_;
    const int64_t key = tile.first_key + 2 * (lane_ & 3);
    float* const to = static_cast<float*>(dbias.data) + tile.batch_begin * dbias.batch_stride +
                      tile.head_begin * dbias.head_stride +
                      (problem_.q_offset + row) * dbias.row_stride +
                      (problem_.kv_offset + key) * dbias.column_stride;
    const bool has_pairs = dbias.column_stride == 1 && dbias.row_stride % 2 == 0 &&
                           reinterpret_cast<uintptr_t>(to) % 8 == 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= problem_.q_rows) continue;
        float* const pair = to + 8 * r * dbias.row_stride + 8 * t * dbias.column_stride;
        const float x = sum_[4 * t + 2 * r] + 0.0f;
        const float y = sum_[4 * t + 2 * r + 1] + 0.0f;
        if (has_pairs && key + 8 * t + 1 < problem_.kv_rows) {
          *reinterpret_cast<float2*>(pair) = make_float2(x, y);
        } else {
          if (key + 8 * t < problem_.kv_rows) pair[0] = x;
          if (key + 8 * t + 1 < problem_.kv_rows) pair[dbias.column_stride] = y;
        }
      }
    }
  }

  const GradientParams& params_;
  const BackwardParams& base_;
  const Problem& problem_;
  const BiasTiles& tiles_;
  const uint32_t shared_;
  State& state_;
  const int warpgroup_;
  const int lane_;
  const int first_lane_row_;  // of the tile's
  bool has_hidden_ = false;
  uint32_t bits_;
  uint32_t bias_[kTiles / 2][4];  // as BiasPairs
  float scores_[kStepRows / 2];
  float value_products_[kStepRows / 2];
  float sum_[kStepRows / 2];
};

template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(MakeBiasGradientPolicy(kHeadDim).threads, 1)
    HopperBiasGradientKernel(const __grid_constant__ GradientParams params,
                             const __grid_constant__ BiasTiles tiles) {
  using State = BiasGradientState<kHeadDim>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t address = SharedAddress(shared);
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < State::kPolicy.stages; ++stage) {
      // The first of two stages brings the statistics and words of its step.
      InitBarrier(SharedAddress(&state.full[stage]), stage % 2 == 0 ? kFullArrivals : 1);
      InitBarrier(SharedAddress(&state.empty[stage]), kEmptyArrivals);
    }
    InitBarrier(SharedAddress(&state.bias_full), 1);
    InitBarrier(SharedAddress(&state.bias_empty), kEmptyArrivals);
    PublishBarriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    BiasGradientLoader<kHeadDim>(params, tiles, address, state).Run();
  } else {
    BiasGradientWarpgroup<kDType, kHeadDim>(params, tiles, address, state, warpgroup - 1).Run();
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_BIAS_CUH_
