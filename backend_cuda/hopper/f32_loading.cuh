// The warp that walks over the row blocks of its block of threads, finds out which key tiles they
// see, and has the planes of those loaded.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_F32_LOADING_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_F32_LOADING_CUH_

#include "backend_cuda/hopper/f32_params.h"
#include "backend_cuda/hopper/instructions.cuh"
#include "backend_cuda/tensor_core.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda::hopper {

using core::Problem;
using core::Sequence;

// A row block of a head. Rows are counted from its first.
struct F32Item {
  Sequence sequence;
  int64_t head;
  int64_t first_row;
  int32_t first_written_row;  // those before it are not this kernel's
  int32_t rows;               // of the tensor
  int32_t existing_rows;      // in the sequence
  int32_t has_tiles;
  int32_t is_end;  // there is no item, nor another one
};

// A tile of keys whose first plane waits in a slot.
struct F32Tile {
  uint32_t word;

  static constexpr uint32_t kLast = 1;            // of the row block
  static constexpr uint32_t kStructuredPart = 2;  // lengths and bands hide pairs
  static constexpr uint32_t kDensePart = 4;
  static constexpr uint32_t kFlaggedKeys = 8;  // what the planes cannot serve
  static constexpr uint32_t kFlaggedValues = 16;
  static constexpr int kPropertyBits = 5;

  __device__ __forceinline__ int Index() const { return static_cast<int>(word >> kPropertyBits); }
  __device__ __forceinline__ int FirstKey() const { return Index() * kF32BlockKeys; }
  __device__ __forceinline__ bool Has(uint32_t property) const { return (word & property) != 0; }
};

inline constexpr int kF32Items = 4;  // announced or at work

// Begins at a multiple of 1024 bytes, after the tiles.
template <int kHeadDim>
struct F32State {
  static constexpr int kSlots = F32Slots(kHeadDim);
  static constexpr int kPlaneBytes = F32PlaneBytes(kHeadDim);

  // Each has two phases a turn of its buffer: full; empty, by every warp that read it.
  uint64_t item_full[kF32Items];
  uint64_t item_empty[kF32Items];
  uint64_t plane_full[kSlots];
  uint64_t plane_empty[kSlots];
  F32Item items[kF32Items];
  F32Tile tiles[kSlots];
  uint64_t query_flags[kF32Warpgroups];  // rows that the split products cannot serve

  static constexpr int kQueryBytes = kF32Warpgroups * kF32Planes * kPlaneBytes;
  static constexpr int kOffset = kQueryBytes + kSlots * kPlaneBytes;
};

template <int kHeadDim>
inline constexpr int kF32SharedBytes = F32State<kHeadDim>::kOffset +
                                       static_cast<int>(sizeof(F32State<kHeadDim>));

template <int kHeadDim>
class F32LoadingWarp {
 public:
  using State = F32State<kHeadDim>;

  __device__ F32LoadingWarp(const F32Params& params, uint32_t shared, State& state)
      : params_(params),
        problem_(params.problem),
        slots_(shared + State::kQueryBytes),
        state_(state),
        lane_(threadIdx.x % kWarpSize) {}

  // Units in order, so that neighbours read the same keys at about the same time.
  __device__ void Run() {
    const uint32_t units_of_head = static_cast<uint32_t>(params_.units_of_head);
    const uint32_t last = static_cast<uint32_t>(params_.row_blocks) - 1;
    for (int64_t unit = blockIdx.x; unit < params_.units; unit += gridDim.x) {
      const uint32_t head = static_cast<uint32_t>(unit) / units_of_head;
      const uint32_t n = static_cast<uint32_t>(unit) % units_of_head;
      Serve(head, last - n);
      if (units_of_head <= last && n != last - n) Serve(head, n);
    }
    F32Item end = {};
    end.is_end = 1;
    Announce(end);
  }

 private:
  __device__ __forceinline__ void Serve(uint32_t head, uint32_t row_block) {
    const uint32_t q_heads = static_cast<uint32_t>(problem_.q_heads);
    F32Item item = {};
    int32_t status = 0;
    item.sequence = core::ResolveSequence(problem_, head / q_heads, &status);
    item.head = head % q_heads;
    item.first_row = int64_t{row_block} * kF32BlockRows;
    if (status != 0 && lane_ == 0 && row_block == 0 && item.head == 0 &&
        problem_.device_status != nullptr) {
      atomicOr(problem_.device_status, status);
    }
    const Sequence& s = item.sequence;
    if (item.first_row >= s.q_rows) return;
    const auto rows_before = [&](int64_t row) {
      return static_cast<int32_t>(core::Clamp<int64_t>(row - item.first_row, 0, kF32BlockRows));
    };
    item.rows = rows_before(s.q_rows);
    item.existing_rows = rows_before(ExistingRows(s));
    int begin = 0;
    int end = 0;
    if (IsShort(problem_, s)) {
      item.first_written_row = rows_before(MaxShortRows(problem_.group));
    } else if (item.existing_rows > 0) {
      const core::Interval first = core::VisibleKeys(problem_.mask, s, item.head, item.first_row);
      const core::Interval last =
          core::VisibleKeys(problem_.mask, s, item.head, item.first_row + item.existing_rows - 1);
      begin = static_cast<int>(first.begin / kF32BlockKeys);
      end = static_cast<int>(core::CeilDiv<int64_t>(last.end, kF32BlockKeys));
      full_begin_ = static_cast<int>(core::CeilDiv<int64_t>(last.begin, kF32BlockKeys));
      full_end_ = static_cast<int>(first.end / kF32BlockKeys);
      item.has_tiles = end > begin;
      // A dense term may hide all of them.
      if (problem_.mask.dense.words != nullptr) {
        bool has_any = false;
        for (int start = begin; start < end && !has_any; start += kWarpSize) {
          const int tile = start + lane_;
          has_any =
              __any_sync(~0u, tile < end && DenseClass(item, tile) != core::TileClass::kEmpty);
        }
        item.has_tiles = has_any;
      }
    }
    Announce(item);
    if (item.has_tiles != 0) ListTiles(item, begin, end);
  }

  __device__ __forceinline__ core::TileClass DenseClass(const F32Item& item, int tile) const {
    const core::DenseBits& dense = problem_.mask.dense;
    if (dense.words == nullptr) return core::TileClass::kFull;
    const Sequence& s = item.sequence;
    const int64_t row = s.q_offset + item.first_row;
    const int64_t key = s.kv_offset + int64_t{tile} * kF32BlockKeys;
    const int64_t keys_end = s.kv_offset + core::LocalKeys(s);
    return core::ClassifyDense(dense, s, item.head, row, row + item.existing_rows, key,
                               core::Min<int64_t>(key + kF32BlockKeys, keys_end));
  }

  __device__ __forceinline__ void Announce(const F32Item& item) {
    const int stage = items_ % kF32Items;
    Wait(SharedAddress(&state_.item_empty[stage]), (items_ / kF32Items & 1) ^ 1);
    if (lane_ == 0) {
      state_.items[stage] = item;
      Arrive(SharedAddress(&state_.item_full[stage]));
    }
    ++items_;
    __syncwarp();
  }

  // 32 tiles at a time, one a lane, and then one after the other. Whether one is the last is known
  // when the next comes.
  __device__ __forceinline__ void ListTiles(const F32Item& item, int begin, int end) {
    const int64_t kv_head = item.head / problem_.group;
    const int64_t flags = FlagIndex(problem_, item.sequence.batch, kv_head);
    first_plane_row_ = static_cast<int>(PlaneRow(problem_, item.sequence, kv_head));
    bool has_pending = false;
    F32Tile pending = {};
    for (int first = begin; first < end; first += kWarpSize) {
      const int mine = first + lane_;
      core::TileClass by_dense = core::TileClass::kEmpty;
      uint64_t key_flags = 0;
      uint64_t value_flags = 0;
      if (mine < end) {
        by_dense = DenseClass(item, mine);
        key_flags = params_.key_flags[flags + mine];
        value_flags = params_.value_flags[flags + mine];
      }
      const bool is_full = mine >= full_begin_ && mine < full_end_;
      const uint32_t word = static_cast<uint32_t>(mine) << F32Tile::kPropertyBits |
                            (is_full ? 0 : F32Tile::kStructuredPart) |
                            (by_dense == core::TileClass::kPartial ? F32Tile::kDensePart : 0) |
                            (key_flags != 0 ? F32Tile::kFlaggedKeys : 0) |
                            (value_flags != 0 ? F32Tile::kFlaggedValues : 0);
      uint32_t left = __ballot_sync(~0u, by_dense != core::TileClass::kEmpty);
      for (; left != 0; left &= left - 1) {
        const int n = __ffs(static_cast<int>(left)) - 1;
        const F32Tile tile = {__shfl_sync(~0u, word, n)};
        if (has_pending) Load(pending);
        has_pending = true;
        pending = tile;
      }
    }
    pending.word |= F32Tile::kLast;
    Load(pending);
  }

  // The planes of a tile in the order of their use: of K, then of V, the low ones first.
  __device__ __forceinline__ void Load(const F32Tile& tile) {
    if (lane_ == 0) {
#pragma unroll
      for (int n = 0; n < 2 * kF32Planes; ++n) {
        const uint32_t plane = planes_ + n;
        const int slot = plane % State::kSlots;
        const uint32_t full = SharedAddress(&state_.plane_full[slot]);
        Wait(SharedAddress(&state_.plane_empty[slot]), (plane / State::kSlots & 1) ^ 1);
        if (n == 0) state_.tiles[slot] = tile;
        ArriveExpecting(full, State::kPlaneBytes);
#pragma unroll
        for (int part = 0; part < kHeadDim / 64; ++part) {
          CopyBox(slots_ + slot * State::kPlaneBytes + part * (kF32BlockKeys * 128),
                  n < kF32Planes ? &params_.keys : &params_.values, full,
                  (kF32Planes - 1 - n % kF32Planes) * params_.plane_columns + 64 * part,
                  first_plane_row_ + tile.FirstKey(), 0, 0);
        }
      }
    }
    planes_ += 2 * kF32Planes;
    __syncwarp();
  }

  const F32Params& params_;
  const Problem& problem_;
  const uint32_t slots_;
  State& state_;
  const int lane_;
  uint32_t items_ = 0;   // announced
  uint32_t planes_ = 0;  // loaded
  int full_begin_;       // tiles that lengths and bands hide nothing of
  int full_end_;
  int first_plane_row_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_F32_LOADING_CUH_
