// How a warpgroup of the forward kernel goes through the tiles of its items: it waits for them,
// passes those that are not its own, and takes turns with the others.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STEPS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STEPS_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

namespace tandem::cuda::hopper {

template <int kHeadDim, Variant kVariant>
class WarpgroupSteps {
 protected:
  static constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim, kVariant);
  using State = BlockState<kHeadDim, kVariant>;
  using Tile = typename State::Tile;
  static constexpr bool kIsCareful = IsCareful(kVariant);
  static constexpr int kStages = kPolicy.stages;
  static constexpr int kValueStages = kPolicy.value_stages;
  // The softmax of a step runs under the product with V of the step before.
  static constexpr bool kHasOverlap = !kIsCareful;
  // Beyond head dimension 128 exponentials are a quarter of the work, and turns gain nothing.
  static constexpr bool kTakesTurns = kHasOverlap && kHeadDim <= 128;
  // Tiles of a block may be none of some warpgroup's: where it has more rows than they have keys,
  // that is worth a look.
  static constexpr bool kHasLongBlocks = kPolicy.block_rows > kPolicy.block_keys;
  static constexpr bool kMaySkip =
      kHasLongBlocks && (kVariant == Variant::kBands || kVariant == Variant::kMasked ||
                         kVariant == Variant::kCareful);
  static constexpr bool kMayBeIdle =
      kHasLongBlocks &&
      (kVariant == Variant::kPlain || kVariant == Variant::kBands || kVariant == Variant::kMasked);
  // Barriers of threads, one for each warpgroup; the careful kernels have the one before them.
  static constexpr int kTurnBarrier = 2;
  static constexpr int kSignBarrier = kTurnBarrier + kMostWarpgroups;

  __device__ WarpgroupSteps(State& state, int warpgroup)
      : state_(state), warpgroup_(warpgroup), lane_(threadIdx.x % kWarpSize) {}

  // A lane and its first row in the row block, found anew where they are not asked for often: kept,
  // they would be spilled, and to get that back takes longer.
  struct Place {
    int lane;
    int row;
  };
  static __device__ __forceinline__ Place PlaceOf() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return {thread % kWarpSize,
            16 * ((thread - kWarpgroupThreads) / kWarpSize) + thread % kWarpSize / 4};
  }

  // ---- tiles ----

  __device__ __forceinline__ void WaitForKeys(uint32_t step) const {
    Wait(Barrier(state_.key_full[step % kStages]), step / kStages & 1);
  }
  // Known to the compiler to be the same for all lanes, so that descriptors and loops are uniform.
  __device__ __forceinline__ Tile TileOf(uint32_t step) const {
    return {__shfl_sync(~0u, state_.tiles[step % kStages].word, 0)};
  }
  __device__ __forceinline__ void WaitForValues(uint32_t step) {
    Wait(Barrier(state_.value_full[step % kValueStages]), step / kValueStages & 1);
  }

  // The tile after this one, if it is not the last.
  __device__ __forceinline__ Tile WaitForNext(const Tile& tile) const {
    if (tile.IsLast()) return {};
    WaitForKeys(steps_ + 1);
    return TileOf(steps_ + 1);
  }

  __device__ __forceinline__ uint32_t UniformStage() const {
    return __shfl_sync(~0u, steps_, 0) % kStages;
  }
  // Of the values of the tile `before` the one at work.
  __device__ __forceinline__ uint32_t UniformValueStage(uint32_t before) const {
    return (__shfl_sync(~0u, steps_, 0) - before) % kValueStages;
  }

  // This warp has read what the barrier guards.
  __device__ __forceinline__ void Release(const uint64_t& barrier) {
    __syncwarp();
    if constexpr (kHeadDim <= 128) {
      ArriveOnce(Barrier(barrier));
    } else if (lane_ == 0) {  // without a branch ptxas serialises the products (C7515)
      Arrive(Barrier(barrier));
    }
  }

  // ---- turns ----

  // Warpgroups begin their products in order, a turn for each tile of an item but the first:
  // without that all of them would multiply at the same time, and then all wait for the unit that
  // exponentiates.
  __device__ __forceinline__ void TakeTurn() const {
    if constexpr (kTakesTurns) SyncThreads(kTurnBarrier + warpgroup_, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void GiveTurn() const {
    if constexpr (kTakesTurns) {
      const int next = warpgroup_ == kPolicy.warpgroups - 1 ? 0 : warpgroup_ + 1;
      ArriveThreads(kTurnBarrier + next, 2 * kWarpgroupThreads);
    }
  }
  __device__ __forceinline__ void ReleaseLastValues() {
    Release(state_.value_empty[(steps_ - 1 - skipped_) % kValueStages]);
  }

  // ---- tiles that are not this warpgroup's ----

  // Whether there are tiles for this warpgroup.
  __device__ __forceinline__ bool HasWork(const Item& item) const {
    return item.has_tiles != 0 && !IsIdle(item);
  }
  // No row of this warpgroup exists. The careful kernels look for non-finite values together.
  __device__ __forceinline__ bool IsIdle(const Item& item) const {
    return kMayBeIdle && item.existing_rows <= 64 * warpgroup_;
  }
  // Goes past the tiles of an item.
  __device__ __forceinline__ void PassTiles() {
    for (bool is_first = true, is_last = false; !is_last; is_first = false) {
      WaitForKeys(steps_);
      is_last = TileOf(steps_).IsLast();
      Release(state_.key_empty[steps_ % kStages]);
      PassValues(steps_, !is_first);
      ++steps_;
    }
  }
  // Goes past the keys of the first tiles, those from `end` on; their values come later.
  __device__ __forceinline__ void SkipTiles(int end) {
    while (TileOf(steps_).Index() >= end) {
      Release(state_.key_empty[steps_ % kStages]);
      ++steps_;
      ++skipped_;
      WaitForKeys(steps_);
    }
  }
  // The values of a tile that was passed; with the turn that was for it.
  __device__ __forceinline__ void PassValues(uint32_t step, bool has_turn) {
    WaitForValues(step);
    Release(state_.value_empty[step % kValueStages]);
    if (!has_turn) return;
    TakeTurn();
    GiveTurn();
  }

  State& state_;
  const int warpgroup_;
  const int lane_;
  uint32_t steps_ = 0;    // tiles that this warpgroup has done with
  uint32_t skipped_ = 0;  // the last of them whose values it still has to pass
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STEPS_CUH_
