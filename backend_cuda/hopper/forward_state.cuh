// What the threads of a block of the forward kernel share: row blocks announced, tiles in their
// stages, and the barriers that tell when.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_

#include <type_traits>

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
struct alignas(16) Item {
  int4 place;  // of row 0 in tensors: row, head and batch
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
  // Of the tiles that the rows of each warpgroup may see, but for dense terms; no less than one
  // tile is left.
  int32_t ends[kMostWarpgroups];
  int32_t keys;  // of the sequence
  int32_t has_tiles;
  int32_t is_end;  // there is no item, nor another one
  int32_t is_strict;
  CarefulFlags* flags;
};

// A tile of keys that waits in a stage.
template <int kBlockKeys>
struct KeysInStage {
  uint32_t word;

  static constexpr uint32_t kLast = 1;            // of the row block
  static constexpr uint32_t kStructuredPart = 2;  // lengths and bands hide pairs
  static constexpr uint32_t kDensePart = 4;
  static constexpr uint32_t kWordPart = 8;  // other terms do: there are words of all of them
  static constexpr uint32_t kNothing = 16;  // nothing of it is visible
  static constexpr int kPropertyBits = 5;

  __device__ __forceinline__ int Index() const { return static_cast<int>(word >> kPropertyBits); }
  __device__ __forceinline__ int FirstKey() const { return Index() * kBlockKeys; }
  __device__ __forceinline__ bool IsLast() const { return (word & kLast) != 0; }
  __device__ __forceinline__ bool HasStructuredPart() const {
    return (word & kStructuredPart) != 0;
  }
  __device__ __forceinline__ bool HasDensePart() const { return (word & kDensePart) != 0; }
  // Of terms that are not intervals.
  __device__ __forceinline__ bool HasBits() const {
    return (word & (kDensePart | kWordPart | kNothing)) != 0;
  }
  __device__ __forceinline__ bool HasWords() const { return (word & (kWordPart | kNothing)) != 0; }
  __device__ __forceinline__ bool IsPartial() const {
    return (word & (kStructuredPart | kDensePart | kWordPart | kNothing)) != 0;
  }
};

// Announced or at work: a warpgroup may be writing an item when another has the Q of the next, and
// the Q of two more are on their way.
inline constexpr int kItems = 4;

// What 32 tiles are by the terms of the mask: bit n is the tile that many before the first.
struct TileGroup {
  uint32_t visible;
  uint32_t structured;  // partial by lengths and bands,
  uint32_t dense;       // a dense term,
  uint32_t words;       // other terms
  uint32_t nothing;     // visited although nothing of it is visible
};
inline constexpr int kTileGroups = 4;

// The segments of keys or rows, from the least to the most.
struct SegmentRange {
  int32_t least;
  int32_t most;
};
inline constexpr int kMostKnownTiles = 256;  // of a sequence, from its first on

// What the threads of a block share for some variants only.
struct NoWords {};
template <int kStages, int kRows>
struct Words {
  uint64_t tile_known[kStages];
  uint64_t group_full[kTileGroups];
  uint64_t group_empty[kTileGroups];
  TileGroup groups[kTileGroups];
  SegmentRange segments[core::kMaxSegments][kMostKnownTiles];
  // Of the tile of a stage and each row: what the four lanes that share it see of it.
  uint4 words[kStages][kRows];

  __device__ __forceinline__ void InitWordBarriers() {
    for (uint64_t& barrier : tile_known) InitBarrier(SharedAddress(&barrier), 1);
    for (uint64_t& barrier : group_full) InitBarrier(SharedAddress(&barrier), 1);
    for (uint64_t& barrier : group_empty) InitBarrier(SharedAddress(&barrier), 1);
  }
};
// What a row sees by a dense term of a tile.
template <int kBlockKeys>
struct alignas(kBlockKeys / 8) DenseRow {
  uint64_t words[kBlockKeys / 64];
};
template <int kStages, int kRows, int kBlockKeys>
struct DenseRows {
  uint64_t tile_known[kStages];
  DenseRow<kBlockKeys> dense[kStages][kRows];

  __device__ __forceinline__ void InitDenseBarriers() {
    for (uint64_t& barrier : tile_known) InitBarrier(SharedAddress(&barrier), 1);
  }
};
struct NoBias {};
template <int kStages>
struct BiasBarriers {
  uint64_t bias_full[kStages];
  uint64_t bias_empty[kStages];

  __device__ __forceinline__ void InitBiasBarriers(int readers) {
    for (uint64_t& barrier : bias_full) InitBarrier(SharedAddress(&barrier), 1);
    for (uint64_t& barrier : bias_empty) InitBarrier(SharedAddress(&barrier), readers);
  }
};

// Begins at a multiple of 1024 bytes, after the tiles.
template <int kHeadDim, Variant kVariant>
struct BlockState
    : std::conditional_t<MayHaveWords(kVariant),
                         Words<ForwardPolicy(kHeadDim, kVariant).stages,
                               ForwardPolicy(kHeadDim, kVariant).block_rows>,
                         std::conditional_t<HasDenseRows(kVariant),
                                            DenseRows<ForwardPolicy(kHeadDim, kVariant).stages,
                                                      ForwardPolicy(kHeadDim, kVariant).block_rows,
                                                      ForwardPolicy(kHeadDim, kVariant).block_keys>,
                                            NoWords>>,
      std::conditional_t<HasBias(kVariant),
                         BiasBarriers<ForwardPolicy(kHeadDim, kVariant).bias_stages>, NoBias> {
  static constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim, kVariant);
  using Tile = KeysInStage<kPolicy.block_keys>;

  // Each has two phases a turn of its buffer: full, by the copies; empty, by every warp that read
  // it.
  uint64_t query_full[kPolicy.query_stages];
  uint64_t query_empty[kPolicy.query_stages];
  uint64_t item_full[kItems];
  uint64_t key_full[kPolicy.stages];
  uint64_t key_empty[kPolicy.stages];
  uint64_t value_full[kPolicy.value_stages];
  uint64_t value_empty[kPolicy.value_stages];
  // Where all threads with rows meet (kCareful). Not a barrier of threads: they come from two
  // places of the code, which synccheck takes for divergence.
  uint64_t values_known;
  Item items[kItems];
  Tile tiles[kPolicy.stages];
  uint32_t non_finite_keys[kPolicy.block_keys / 32];  // of the V tile at work (kCareful)
  RowView views[kItems][kPolicy.block_rows];  // kept up where not every tile is full (kPlain)

  // Where an item's Q was, its output waits to be copied: Q's place is free once that is read. With
  // one place alone that is where the next item's Q was, which is in registers by then; else the
  // one after it would come too late.
  static constexpr bool kHasStagedOutput =
      (kPolicy.query_stages > 1 || (kPolicy.has_query_in_registers && !HasBias(kVariant))) &&
      !IsCareful(kVariant);

  // Of the stages of K, V and the bias, after those of Q.
  static constexpr int kKeyOffset = kPolicy.query_stages * kPolicy.query_bytes;
  static constexpr int kValueOffset = kKeyOffset + kPolicy.stages * kPolicy.tile_bytes;
  static constexpr int kBiasOffset = kValueOffset + kPolicy.value_stages * kPolicy.tile_bytes;
  static constexpr int kOffset = kBiasOffset + kPolicy.bias_stages * kPolicy.bias_bytes;
};

template <int kHeadDim, Variant kVariant>
inline constexpr int kSharedBytes = BlockState<kHeadDim, kVariant>::kOffset +
                                    static_cast<int>(sizeof(BlockState<kHeadDim, kVariant>));

static __device__ __forceinline__ uint32_t Barrier(const uint64_t& barrier) {
  return SharedAddress(&barrier);
}

// Whether a warp left a flag.
template <int kWarpgroups>
static __device__ __forceinline__ bool IsFlagged(const CarefulFlags& flags) {
  const uint4 words = reinterpret_cast<const uint4&>(flags);
  return (words.x | words.y | (kWarpgroups == 3 ? words.z : 0)) != 0;
}

// Whether there are words (params.has_words), where that is not known from the variant.
template <Variant kVariant>
static __device__ __forceinline__ bool HasWords(const Params& params) {
  if constexpr (HasAddends(kVariant)) return params.has_words != 0;
  return MayHaveWords(kVariant);
}

// Whether there is a warp that copies dense bits.
template <Variant kVariant>
static __device__ __forceinline__ bool CopiesDenseRows(const Params& params) {
  return HasDenseRows(kVariant) && params.problem.mask.dense.words != nullptr;
}

// Whether a term gives every row one range, which is then a part of its view (MayHaveWords).
static __device__ __forceinline__ bool IsOneRange(const core::RowRangesTerm& term) {
  return term.count == 1;
}

// The index of a tensor's batch dimension.
static __device__ __forceinline__ int BatchIndex(const Problem& problem, const Sequence& s) {
  return core::IsPacked(problem) ? 0 : static_cast<int>(s.batch);
}

// The canonical tiles are 64 x 64 of global rows and keys; what lies beyond the sequence is not
// asked for.
template <int kBlockKeys>
static __device__ __forceinline__ core::TileClass DenseClass(const Problem& problem,
                                                             const Item& item, int tile) {
  const Sequence& s = item.sequence;
  const int64_t row = s.q_offset + item.first_row;
  const int64_t key = s.kv_offset + int64_t{tile} * kBlockKeys;
  const int64_t keys_end = s.kv_offset + core::LocalKeys(s);
  return core::ClassifyDense(problem.mask.dense, s, item.head, row, row + item.existing_rows, key,
                             core::Min<int64_t>(key + kBlockKeys, keys_end));
}

// What the loading warps know.
template <int kHeadDim, Variant kVariant>
class LoadingWarp {
 public:
  static constexpr TilePolicy kPolicy = ForwardPolicy(kHeadDim, kVariant);
  static constexpr int kBlockKeys = kPolicy.block_keys;
  using State = BlockState<kHeadDim, kVariant>;
  using Tile = typename State::Tile;

  __device__ LoadingWarp(const Params& params, uint32_t shared, State& state)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        state_(state),
        lane_(threadIdx.x % kWarpSize) {}

 protected:
  const Params& params_;
  const Problem& problem_;
  const uint32_t shared_;
  State& state_;
  const int lane_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_STATE_CUH_
