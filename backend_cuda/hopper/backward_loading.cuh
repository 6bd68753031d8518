// The warpgroup that has the tiles loaded which a block of the backward pass visits (TMA), with the
// bits of what is visible in them.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_

#include "backend_cuda/hopper/backward_tiles.cuh"

namespace tandem::cuda::hopper {

// What dropout keeps, as GradientState::words.
template <int kStages>
struct KeptPairs {
  uint64_t kept[2 * kStages][kKeptRows];
};
struct NoKeptPairs {};

// What the warps of a block share, after the tiles.
template <int kHeadDim, GradientSide kSide, GradientTerms kTerms>
struct alignas(16) GradientState
    : std::conditional_t<kTerms == GradientTerms::kAll,
                         KeptPairs<MakeBackwardPolicy(kHeadDim, kTerms).stages>, NoKeptPairs> {
  static constexpr BackwardPolicy kPolicy = MakeBackwardPolicy(kHeadDim, kTerms);
  static constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  static constexpr int kBiasOffset =
      2 * kPolicy.kept_bytes + 2 * kPolicy.stages * kPolicy.step_bytes;
  static constexpr int kOffset = kBiasOffset + kPolicy.stages * kPolicy.bias_bytes;

  // Of the rows of a step, where those are of Q, at StatisticsPlace.
  float lse[kPolicy.stages][kKeepsKeys ? kStepRows : 4];
  float offset[kPolicy.stages][kKeepsKeys ? kStepRows : 4];
  // Of each row that is kept, what it shares with the rows of the step, in quad order
  // (core::BitOrder); kept up where pairs are hidden. Two turns of the stages, so that words are
  // made while a step waits for its stage.
  uint64_t words[2 * kPolicy.stages][kKeptRows];
  StepTile tiles[kPolicy.stages];
  uint64_t full[kPolicy.stages];
  uint64_t empty[kPolicy.stages];
  uint64_t kept_full;
  KeptBlock block;
};
template <int kHeadDim, GradientSide kSide, GradientTerms kTerms>
inline constexpr int kGradientSharedBytes =
    GradientState<kHeadDim, kSide, kTerms>::kOffset +
    static_cast<int>(sizeof(GradientState<kHeadDim, kSide, kTerms>));

// By each lane of a warp: racecheck takes ordinary stores and loads of a thread for ordered by its
// own arrival only. The full barriers: once the copies are begun, and by those who write words and
// statistics.
inline constexpr int kFullArrivals = 1 + kWarpSize;
inline constexpr int kEmptyArrivals = 8 * kWarpSize;  // warps with rows

template <int kHeadDim, GradientSide kSide, GradientTerms kTerms>
class GradientLoader : private GradientTiles<kSide, kTerms> {
 public:
  using Tiles = GradientTiles<kSide, kTerms>;
  using State = GradientState<kHeadDim, kSide, kTerms>;
  static constexpr BackwardPolicy kPolicy = State::kPolicy;
  static constexpr bool kKeepsKeys = State::kKeepsKeys;
  static constexpr bool kHasBias = kTerms == GradientTerms::kBias;

  __device__ GradientLoader(const GradientParams& params, uint32_t shared, State& state)
      : Tiles(params.base, state.block),
        params_(params),
        shared_(shared),
        state_(state),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize) {}

  __device__ void Run() {
    const int64_t head = state_.block.head;
    if (threadIdx.x == 0) {
      const uint32_t barrier = SharedAddress(&state_.kept_full);
      ArriveExpecting(barrier, 2 * kPolicy.kept_bytes);
      const int64_t row =
          kKeepsKeys ? KeyPlaneRow(base_, s_, head) : QueryPlaneRow(base_, s_, head);
#pragma unroll 1
      for (int half = 0; half < kKeptRows; half += kStepRows) {
        Load<kKeptRows>(shared_ + half * 128, kKeepsKeys ? params_.keys : params_.queries,
                        kPolicy.kept_bytes, barrier, static_cast<int>(row) + first_ + half);
      }
    }
    const int64_t group = base_.problem.group;
    const auto visit = [this](const StepTile& tile) {
      if (IsMine()) Announce(tile);
      ++steps_;
    };
    this->FindKeptFlags(head);
    if (kKeepsKeys) {
#pragma unroll 1
      for (int64_t n = 0; n < group; ++n) this->ListHead(head * group + n, head, visit);
    } else {
      this->ListHead(head, head / group, visit);
    }
    if (!IsMine()) return;
    const uint32_t full = WaitForStage();
    if (lane_ == 0) {
      state_.tiles[steps_ % kPolicy.stages] = {StepTile::kEnd, 0};
      Arrive(full);
    }
    Arrive(full);
  }

 private:
  // ---- one tile ----

  // Each warp serves the steps of its own, and so of one stage: the others' latencies hide its.
  __device__ __forceinline__ bool IsMine() const {
    return steps_ % kPolicy.stages == static_cast<uint32_t>(warp_);
  }
  static_assert(kPolicy.stages <= kWarpgroupThreads / kWarpSize);

  // Waits until the next step's stage is empty.
  __device__ __forceinline__ uint32_t WaitForStage() const {
    const uint32_t stage = steps_ % kPolicy.stages;
    Wait(SharedAddress(&state_.empty[stage]), (steps_ / kPolicy.stages & 1) ^ 1);
    return SharedAddress(&state_.full[stage]);
  }

  __device__ __forceinline__ void Announce(const StepTile& tile) {
    // The step that had these words is done with: the wait of this warp's last step says so.
    if (tile.IsHidden()) this->MakeWords(tile, state_.words[steps_ % (2 * kPolicy.stages)]);
    if constexpr (kTerms == GradientTerms::kAll) {
      if (base_.problem.dropout.enabled != 0) {
        this->MakeWords(tile, state_.kept[steps_ % (2 * kPolicy.stages)],
                        [&](int query, int key) { return KeptWord(tile, query, key); });
      }
    }
    const uint32_t stage = steps_ % kPolicy.stages;
    const uint32_t full = WaitForStage();
    const int row = (kKeepsKeys ? this->query_row_ : this->key_row_) + tile.FirstRow();
    if (lane_ == 0) {
      state_.tiles[stage] = tile;
      ArriveExpecting(full, 2 * kPolicy.step_bytes + (kHasBias ? BiasBytes() : 0));
      if constexpr (kHasBias) LoadBias(tile, stage, full);
      Load<kStepRows>(shared_ + 2 * kPolicy.kept_bytes + stage * 2 * kPolicy.step_bytes,
                      kKeepsKeys ? params_.queries : params_.keys, kPolicy.step_bytes, full, row);
    }
    if (kKeepsKeys) {
#pragma unroll
      for (int n = 0; n < kStepRows; n += kWarpSize) {
        const RowStatistics statistics = base_.statistics[row + n + lane_];
        state_.lse[stage][StatisticsPlace(n + lane_)] = statistics.lse;
        state_.offset[stage][StatisticsPlace(n + lane_)] = statistics.offset;
      }
    }
    Arrive(full);
  }

  // The keys from local key `key` on that dropout keeps for a row, in quad order.
  __device__ __forceinline__ uint64_t KeptWord(const StepTile& tile, int row, int key) const {
    const core::Dropout& dropout = base_.problem.dropout;
    const int64_t head_index = s_.batch * base_.problem.q_heads + tile.head;
    const int64_t i = s_.q_offset + row;
    const int64_t j = s_.kv_offset + key;
    uint64_t kept = 0;
    if ((j & 3) == 0) {
      // At D64 the registers are there for draws that do not wait for each other.
#pragma unroll kHeadDim <= 64 ? 4 : 1
      for (int n = 0; n < core::kTile; n += 4) {
        const core::Philox4 drawn = core::DropoutWords(dropout, head_index, i, j + n);
        uint32_t four = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          four |= static_cast<uint32_t>(drawn.word[e] >= dropout.threshold) << e;
        }
        kept |= uint64_t{four} << n;
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < core::kTile; ++n) {
        kept |= static_cast<uint64_t>(core::DropoutKeeps(dropout, head_index, i, j + n)) << n;
      }
    }
    return core::ToQuadOrder(kept);
  }

  // 64 rows of both tensors of a side, into tiles of `kTileRows` rows.
  template <int kTileRows>
  __device__ __forceinline__ void Load(uint32_t target, const PlaneMaps& maps, int second_offset,
                                       uint32_t barrier, int row) const {
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target + part * kTileRows * 128, &maps.first, barrier, 64 * part, row, 0, 0);
    }
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target + second_offset + part * kTileRows * 128, &maps.second, barrier, 64 * part,
              row, 0, 0);
    }
  }

  // 128 columns of 64 rows where keys are kept, else 64 columns of 128 rows, as two boxes; one row
  // of those columns where the bias is broadcast over rows.
  __device__ __forceinline__ int BiasBoxes() const {
    return kKeepsKeys || params_.bias.per_row != 0 ? 2 : 1;
  }
  __device__ __forceinline__ int BiasBytes() const {
    return params_.bias.per_row != 0 ? kPolicy.bias_bytes : BiasBoxes() * kStepRows * 2;
  }
  __device__ __forceinline__ void LoadBias(const StepTile& tile, uint32_t stage,
                                           uint32_t barrier) const {
    const BiasSource& bias = params_.bias;
    int key = static_cast<int>(s_.kv_offset) + (kKeepsKeys ? first_ : tile.FirstRow());
    int row = static_cast<int>(s_.q_offset) + (kKeepsKeys ? tile.FirstRow() : first_);
    if (bias.per_row == 0) row = 0;
    const int head = bias.per_head != 0 ? static_cast<int>(tile.head) : 0;
    const int batch = bias.per_batch != 0 ? static_cast<int>(s_.batch) : 0;
    uint32_t target = shared_ + State::kBiasOffset + stage * kPolicy.bias_bytes;
#pragma unroll 1
    for (int n = 0; n < BiasBoxes(); ++n) {
      CopyBox(target, &bias.map, barrier, key, row, head, batch);
      target += kPolicy.bias_bytes / 2;
      (kKeepsKeys ? key : row) += 64;
    }
  }

  using Tiles::base_;
  using Tiles::first_;
  using Tiles::lane_;
  using Tiles::s_;

  const GradientParams& params_;
  const uint32_t shared_;
  State& state_;
  const int warp_;
  uint32_t steps_ = 0;  // announced
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_
