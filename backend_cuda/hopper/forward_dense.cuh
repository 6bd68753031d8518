// What a dense term says of a tile, on its way to the lanes that hold the scores.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_DENSE_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_DENSE_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

namespace tandem::cuda::hopper {

// What the two rows of a lane, 8 apart, see of a tile: halves by a dense term, 64 keys each, and
// all of it by other terms.
struct Halves {
  uint32_t low[2];
  uint32_t high[2];
  uint32_t words[2];
};

// From the rows that DenseWarp copied. rows: from the lane's first on.
template <int kBlockKeys>
static __device__ __forceinline__ void ReadDense(const DenseRow<kBlockKeys>* rows, int lane,
                                                 Halves& halves) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto* const bits = reinterpret_cast<const uint16_t*>(rows + 8 * r) + (lane & 3);
    halves.low[r] = bits[0];
    halves.high[r] = kBlockKeys > 64 ? bits[4] : 0;
  }
}

// From where they are. views: from the lane's first row on.
template <int kBlockKeys>
static __device__ __forceinline__ void LoadDense(const core::DenseBits& dense, const Item& item,
                                                 const RowView* views,
                                                 const KeysInStage<kBlockKeys>& tile, int lane,
                                                 Halves& halves) {
  // In units of the 16 bits that a lane reads of a word.
  const int stride = static_cast<int>(dense.word_stride) * 4;
  const int first = tile.Index() * (kBlockKeys / 64) * stride;
  const bool has_second =
      kBlockKeys > 64 && item.sequence.kv_offset + tile.FirstKey() + 64 < dense.kv_extent;
  const int second = first + (has_second ? stride : 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto* const words = reinterpret_cast<const uint16_t*>(views[8 * r].words) + (lane & 3);
    halves.low[r] = __ldg(words + first);
    halves.high[r] = kBlockKeys > 64 ? __ldg(words + second) : 0;
  }
}

// The warp that copies the dense bits of tiles (HasDenseRows).
template <int kHeadDim, Variant kVariant>
class DenseWarp : LoadingWarp<kHeadDim, kVariant> {
 public:
  using LoadingWarp<kHeadDim, kVariant>::LoadingWarp;

  __device__ void Run() {
    uint32_t tiles = 0;
    for (uint32_t n = 0;; ++n) {
      Wait(Barrier(state_.item_full[n % kItems]), n / kItems & 1);
      const Item& item = state_.items[n % kItems];
      if (item.is_end != 0) return;
      if (item.has_tiles == 0) continue;
      for (bool is_last = false; !is_last; ++tiles) {
        const int stage = tiles % kPolicy.stages;
        Wait(Barrier(state_.tile_known[stage]), tiles / kPolicy.stages & 1);
        const Tile tile = state_.tiles[stage];
        if (tile.HasDensePart()) Copy(item, state_.views[n % kItems], tile, stage);
        ArriveAfterCopies(Barrier(state_.key_full[stage]));
        is_last = tile.IsLast();
      }
    }
  }

 private:
  using Base = LoadingWarp<kHeadDim, kVariant>;
  using Base::kBlockKeys;
  using typename Base::Tile;

  __device__ __forceinline__ void Copy(const Item& item, const RowView* views, const Tile& tile,
                                       int stage) const {
    const core::DenseBits& dense = problem_.mask.dense;
    const int64_t first = int64_t{tile.Index()} * (kBlockKeys / 64) * dense.word_stride;
    // Keys beyond the mask are none of the sequence's: any bits do.
    [[maybe_unused]] const bool has_second =
        item.sequence.kv_offset + tile.FirstKey() + 64 < dense.kv_extent;
    [[maybe_unused]] const int64_t second = has_second ? dense.word_stride : 0;
#pragma unroll
    for (int n = 0; n < kPolicy.block_rows / kWarpSize; ++n) {
      const int row = kWarpSize * n + lane_;
      const uint64_t* const words = views[row].words + first;
      const uint32_t target = SharedAddress(&state_.dense[stage][row]);
      CopyWord(target, words);
      if constexpr (kBlockKeys > 64) CopyWord(target + 8, words + second);
    }
  }

  using Base::kPolicy;
  using Base::lane_;
  using Base::problem_;
  using Base::state_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_DENSE_CUH_
