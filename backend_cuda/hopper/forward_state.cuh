// What the threads of a block of the forward kernel share: row blocks announced, tiles in their
// stages, and the barriers that tell when.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_

#include "backend_cuda/hopper/instructions.cuh"
#include "backend_cuda/hopper/params.h"
#include "backend_cuda/tensor_core.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda::hopper {

using core::Problem;
using core::Sequence;

// What a query row may see, for partial tiles.
struct alignas(16) RowView {
  int32_t begin;  // local keys, but for a dense term
  int32_t end;
  const uint64_t* words;  // dense bits of key 0 on
};

// A row block of a head. Rows are counted from its first.
struct Item {
  Sequence sequence;
  int64_t head;
  int64_t first_row;
  void* out;                  // of row 0
  float* lse;                 // of row 0; null where it was not asked for
  int32_t first_written_row;  // those before it are not this kernel's
  int32_t rows;               // of the tensor
  int32_t existing_rows;      // in the sequence
  int32_t begin;              // the key tiles that they may see
  int32_t end;
  int32_t full_begin;  // those that lengths and bands hide nothing of
  int32_t full_end;
  int32_t keys;  // of the sequence
  int32_t has_tiles;
  int32_t is_end;  // there is no item, nor another one
  int32_t is_strict;
  CarefulFlags* flags;
};

// A tile of keys that waits in a stage.
struct Tile {
  uint32_t word;

  static constexpr uint32_t kLast = 1;            // of the row block
  static constexpr uint32_t kStructuredPart = 2;  // lengths and bands hide pairs
  static constexpr uint32_t kDensePart = 4;
  static constexpr int kPropertyBits = 3;

  __device__ __forceinline__ int Index() const { return static_cast<int>(word >> kPropertyBits); }
  __device__ __forceinline__ int FirstKey() const { return Index() * kBlockKeys; }
  __device__ __forceinline__ bool IsLast() const { return (word & kLast) != 0; }
  __device__ __forceinline__ bool HasStructuredPart() const {
    return (word & kStructuredPart) != 0;
  }
  __device__ __forceinline__ bool HasDensePart() const { return (word & kDensePart) != 0; }
  __device__ __forceinline__ bool IsPartial() const {
    return (word & (kStructuredPart | kDensePart)) != 0;
  }
};

inline constexpr int kQueryStages = 2;
// Announced or at work: a warpgroup may be writing an item when another has the Q of the next, and
// the Q of two more are on their way.
inline constexpr int kItems = 4;

// Begins at a multiple of 1024 bytes, after the tiles.
template <int kHeadDim>
struct BlockState {
  static constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim);

  // Each has two phases a turn of its buffer: full, by the copies; empty, by every warp that read
  // it.
  uint64_t query_full[kQueryStages];
  uint64_t query_empty[kQueryStages];
  uint64_t item_full[kItems];
  uint64_t key_full[kPolicy.stages];
  uint64_t key_empty[kPolicy.stages];
  uint64_t value_full[kPolicy.stages];
  uint64_t value_empty[kPolicy.stages];
  Item items[kItems];
  Tile tiles[kPolicy.stages];
  uint32_t non_finite_keys[kBlockKeys / 32];  // of the V tile at work (kCareful)
  RowView views[kItems][kPolicy.block_rows];  // kept up where not every tile is full (kPlain)

  static constexpr int kOffset =
      kQueryStages * kPolicy.query_bytes + 2 * kPolicy.stages * kPolicy.tile_bytes;
};

template <int kHeadDim>
inline constexpr int kSharedBytes = BlockState<kHeadDim>::kOffset +
                                    static_cast<int>(sizeof(BlockState<kHeadDim>));

static __device__ __forceinline__ uint32_t Barrier(const uint64_t& barrier) {
  return SharedAddress(&barrier);
}

// The index of a tensor's batch dimension.
static __device__ __forceinline__ int BatchIndex(const Problem& problem, const Sequence& s) {
  return core::IsPacked(problem) ? 0 : static_cast<int>(s.batch);
}

// The canonical tiles are 64 x 64 of global rows and keys; what lies beyond the sequence is not
// asked for.
static __device__ __forceinline__ core::TileClass DenseClass(const Problem& problem,
                                                             const Item& item, int tile) {
  const Sequence& s = item.sequence;
  const int64_t row = s.q_offset + item.first_row;
  const int64_t key = s.kv_offset + int64_t{tile} * kBlockKeys;
  const int64_t keys_end = s.kv_offset + core::LocalKeys(s);
  return core::ClassifyDense(problem.mask.dense, s, item.head, row, row + item.existing_rows, key,
                             core::Min<int64_t>(key + kBlockKeys, keys_end));
}

// What both loading warps know.
template <int kHeadDim>
class LoadingWarp {
 public:
  static constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim);

  __device__ LoadingWarp(const Params& params, uint32_t shared, BlockState<kHeadDim>& state)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        state_(state),
        lane_(threadIdx.x % kWarpSize) {}

 protected:
  const Params& params_;
  const Problem& problem_;
  const uint32_t shared_;
  BlockState<kHeadDim>& state_;
  const int lane_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_
