// The warpgroup of the fused backward kernel that has the steps' tiles loaded (TMA), with the
// statistics of their rows and the bits of what is visible in them.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LOADING_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LOADING_CUH_

#include "backend_cuda/hopper/backward_tiles.cuh"
#include "backend_cuda/hopper/fused_backward_params.h"

namespace tandem::cuda::hopper {

// Warps that load queries, one to a stage: two that waited for the same stage could take one phase
// of its barrier for another. The fourth loads what blocks keep.
inline constexpr int kFusedLoadingWarps = 3;
inline constexpr int kFusedKeyWarps = 8;

// What there is to know of a step. row: of the planes of Q.
struct alignas(16) FusedStep {
  StepTile tile;
  int32_t row;
};

// What the warps of a block share, after the tiles.
template <int kHeadDim>
struct alignas(16) FusedState {
  static constexpr FusedPolicy kPolicy = MakeFusedPolicy(kHeadDim);
  // The tiles: K, V, Q, dO, dS, dQ.
  static constexpr int kQueries = 2 * kPolicy.kept_bytes;
  static constexpr int kOutputs = kQueries + kPolicy.query_stages * kPolicy.step_bytes;
  static constexpr int kScores = kOutputs + kPolicy.output_stages * kPolicy.step_bytes;
  static constexpr int kSums = kScores + kPolicy.score_stages * kPolicy.score_bytes;
  static constexpr int kOffset = kSums + kPolicy.sum_bytes;
  static_assert(kPolicy.query_stages == kFusedLoadingWarps);
  static constexpr int kWordStages = 2 * kFusedLoadingWarps;

  // Of the rows of a step, at StatisticsPlace.
  float lse[kPolicy.query_stages][kStepRows];
  float offset[kPolicy.query_stages][kStepRows];
  // Of each key, the rows of the step that see it, in quad order (core::BitOrder); kept up where
  // pairs are hidden. Two turns of the warps that make them, so that words are made while a step
  // waits for its stage.
  uint64_t words[kWordStages][kKeptRows];
  FusedStep steps[kPolicy.query_stages];
  uint64_t query_full[kPolicy.query_stages];
  uint64_t query_empty[kPolicy.query_stages];
  uint64_t output_full[kPolicy.output_stages];
  uint64_t output_empty[kPolicy.output_stages];
  uint64_t score_full[kPolicy.score_stages];
  uint64_t score_empty[kPolicy.score_stages];
  uint64_t kept_full;
  uint64_t keys_empty;
  uint64_t values_empty;  // earlier: the last products that K is for are those of dQ
  // Blocks that this one serves one after the other, in turn: what follows is known before the last
  // one is written. No rows: there is none.
  KeptBlock blocks[2];
  uint64_t block_full[2];
  uint64_t block_empty[2];

  // By one thread, before the others use them.
  __device__ void InitBarriers() {
    for (int stage = 0; stage < kPolicy.query_stages; ++stage) {
      // Once the copy is begun, and by each lane of the warp that writes all else of the step but
      // dO: racecheck takes a thread's ordinary stores and loads for ordered by its own arrival
      // only.
      InitBarrier(SharedAddress(&query_full[stage]), 1 + kWarpSize);
      InitBarrier(SharedAddress(&query_empty[stage]), kFusedKeyWarps * kWarpSize);
    }
    for (int stage = 0; stage < kPolicy.output_stages; ++stage) {
      InitBarrier(SharedAddress(&output_full[stage]), 1);
      InitBarrier(SharedAddress(&output_empty[stage]), kFusedKeyWarps);
    }
    for (int stage = 0; stage < kPolicy.score_stages; ++stage) {
      InitBarrier(SharedAddress(&score_full[stage]), kFusedKeyWarps);
      InitBarrier(SharedAddress(&score_empty[stage]), kFusedKeyWarps);
    }
    InitBarrier(SharedAddress(&kept_full), 1);
    InitBarrier(SharedAddress(&keys_empty), kFusedKeyWarps);
    InitBarrier(SharedAddress(&values_empty), kFusedKeyWarps);
    for (int slot = 0; slot < 2; ++slot) {
      InitBarrier(SharedAddress(&block_full[slot]), 1);
      InitBarrier(SharedAddress(&block_empty[slot]), kFusedKeyWarps + kFusedLoadingWarps + 1);
    }
    PublishBarriers();
  }
};
template <int kHeadDim>
inline constexpr int kFusedSharedBytes = FusedState<kHeadDim>::kOffset +
                                         static_cast<int>(sizeof(FusedState<kHeadDim>));

// The tiles of one block, whose steps follow those of the blocks before.
template <int kHeadDim>
class FusedLoader : private GradientTiles<GradientSide::kKeys> {
 public:
  using State = FusedState<kHeadDim>;
  static constexpr FusedPolicy kPolicy = State::kPolicy;

  // turn: blocks before. steps, tiles: announced before, with and without the ends of blocks.
  __device__ FusedLoader(const FusedGradientParams& params, uint32_t shared, State& state,
                         uint32_t turn, uint32_t& steps, uint32_t& tiles)
      : GradientTiles(params.base, state.blocks[turn % 2]),
        params_(params),
        shared_(shared),
        state_(state),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        turn_(turn),
        steps_(steps),
        tiles_(tiles) {}

  __device__ __forceinline__ void Run() {
    const int64_t head = state_.blocks[turn_ % 2].head;
    if (warp_ == kFusedLoadingWarps) {
      if (lane_ == 0) LoadKept(head);
      __syncwarp();
      return;
    }
    FindKeptFlags(head);
    const uint8_t* const notes = base_.keys.notes + KeyFlagWord(base_, s_, head, first_);
    key_notes_ = static_cast<uint8_t>(notes[0] | notes[1]);
    // A tile is announced when it is known whether another one follows.
    StepTile tile = {StepTile::kEnd, 0};
#pragma unroll 1
    for (int64_t n = 0; n < problem_.group; ++n) {
      ListHead(head * problem_.group + n, head, [&](const StepTile& next) {
        if (!tile.IsEnd()) Announce(tile);
        tile = next;
      });
    }
    if (!tile.IsEnd()) {
      tile.word |= StepTile::kLast;
      Announce(tile);
      return;
    }
    if (IsMine()) {
      const uint32_t full = WaitForQueryStage();
      if (lane_ == 0) {
        state_.steps[steps_ % kPolicy.query_stages] = {tile, 0};
        Arrive(full);
      }
      Arrive(full);
      __syncwarp();
    }
    ++steps_;
  }

 private:
  __device__ __forceinline__ void LoadKept(int64_t head) const {
    const uint32_t barrier = SharedAddress(&state_.kept_full);
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {  // values first
      const bool is_keys = n != 0;
      Wait(SharedAddress(is_keys ? &state_.keys_empty : &state_.values_empty), turn_ % 2 ^ 1);
      if (!is_keys) ArriveExpecting(barrier, 2 * kPolicy.kept_bytes);
#pragma unroll 1
      for (int half = 0; half < kKeptRows; half += kStepRows) {
        const int key = first_ + half;
        const bool is_copied =
            (base_.keys.notes[KeyFlagWord(base_, s_, head, key)] & kInPlanes) != 0;
        const Place place =
            is_copied ? Place{static_cast<int>(KeyPlaneRow(base_, s_, head)) + key, 0, 0}
                      : Place{static_cast<int>(s_.kv_start) + key, static_cast<int>(head), Batch()};
        const PlaneMaps& maps = is_copied ? params_.keys : params_.key_tensors;
        Load<kKeptRows>(shared_ + (is_keys ? 0 : kPolicy.kept_bytes) + half * 128,
                        is_keys ? &maps.first : &maps.second, barrier, place);
      }
    }
  }

  // Each warp serves the steps of its own, and so of one stage: the others' latencies hide its.
  __device__ __forceinline__ bool IsMine() const {
    return steps_ % kFusedLoadingWarps == static_cast<uint32_t>(warp_);
  }

  // Waits until the next step's stage is empty.
  __device__ __forceinline__ uint32_t WaitForQueryStage() const {
    const uint32_t stage = steps_ % kPolicy.query_stages;
    Wait(SharedAddress(&state_.query_empty[stage]), (steps_ / kPolicy.query_stages & 1) ^ 1);
    return SharedAddress(&state_.query_full[stage]);
  }

  __device__ __forceinline__ void Announce(const StepTile& tile) {
    if (IsMine()) {
      // The tiles of the next head may be on the list by now.
      const int listed = query_row_;
      query_row_ = static_cast<int>(QueryPlaneRow(base_, s_, tile.head));
      LoadStep(tile);
      query_row_ = listed;
    }
    ++steps_;
    ++tiles_;
  }

  __device__ __forceinline__ void LoadStep(StepTile tile) {
    // The step that had these words is done with: the wait of this warp's last step says so.
    if (tile.IsHidden()) MakeWords(tile, state_.words[steps_ % State::kWordStages]);
    const int row = query_row_ + tile.FirstRow();
    RowStatistics statistics[kStepRows / kWarpSize];
#pragma unroll
    for (int n = 0; n < kStepRows / kWarpSize; ++n) {
      statistics[n] = base_.statistics[row + n * kWarpSize + lane_];
    }
    const uint8_t notes = base_.queries.notes[QueryFlagWord(base_, s_, tile.head, tile.FirstRow())];
    const bool is_copied = (notes & kInPlanes) != 0;
    const Place place = is_copied ? Place{row, 0, 0}
                                  : Place{static_cast<int>(s_.q_start) + tile.FirstRow(),
                                          static_cast<int>(tile.head), Batch()};
    const PlaneMaps& maps = is_copied ? params_.queries : params_.query_tensors;
    const uint32_t full = WaitForQueryStage();
    const uint32_t stage = steps_ % kPolicy.query_stages;
    if (lane_ == 0) {
      ArriveExpecting(full, kPolicy.step_bytes);
      Load<kStepRows>(shared_ + State::kQueries + stage * kPolicy.step_bytes, &maps.first, full,
                      place);
    }
    bool is_ordinary = ((notes | key_notes_) & kHasLarge) == 0;
#pragma unroll
    for (int n = 0; n < kStepRows / kWarpSize; ++n) {
      const int place = StatisticsPlace(n * kWarpSize + lane_);
      state_.lse[stage][place] = statistics[n].lse;
      state_.offset[stage][place] = statistics[n].offset;
      is_ordinary = is_ordinary && IsOrdinary(statistics[n]);
    }
    if (!__all_sync(~0u, is_ordinary)) tile.word |= StepTile::kFlagged;
    if (lane_ == 0) state_.steps[stage] = {tile, row};
    Arrive(full);
    if (lane_ == 0) {
      const uint32_t output_stage = tiles_ % kPolicy.output_stages;
      Wait(SharedAddress(&state_.output_empty[output_stage]),
           (tiles_ / kPolicy.output_stages & 1) ^ 1);
      const uint32_t output_full = SharedAddress(&state_.output_full[output_stage]);
      ArriveExpecting(output_full, kPolicy.step_bytes);
      Load<kStepRows>(shared_ + State::kOutputs + output_stage * kPolicy.step_bytes, &maps.second,
                      output_full, place);
    }
    __syncwarp();
  }

  // Whether P of the row's pairs needs no clamp to 1 and dS of hidden ones is 0 since P is: scores
  // of up to 2^13 are rounded by less than 2^-10, and products of what is not large are finite.
  static __device__ __forceinline__ bool IsOrdinary(const RowStatistics& statistics) {
    return fabsf(statistics.offset) < 0x1p120f &&
           (fabsf(statistics.lse) < 8192.0f || statistics.lse == core::BitsToFloat(0x7f800000u));
  }

  // Of a row in the planes, or in a tensor.
  struct Place {
    int row;
    int head;
    int batch;
  };
  __device__ __forceinline__ int Batch() const {
    return core::IsPacked(problem_) ? 0 : static_cast<int>(s_.batch);
  }

  // 64 rows of one tensor, into a tile of `kTileRows` rows.
  template <int kTileRows>
  __device__ __forceinline__ void Load(uint32_t target, const CUtensorMap* map, uint32_t barrier,
                                       const Place& place) const {
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target + part * kTileRows * 128, map, barrier, 64 * part, place.row, place.head,
              place.batch);
    }
  }

  const FusedGradientParams& params_;
  const uint32_t shared_;
  State& state_;
  const int warp_;
  const uint32_t turn_;
  uint32_t& steps_;
  uint32_t& tiles_;
  uint8_t key_notes_ = 0;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LOADING_CUH_
