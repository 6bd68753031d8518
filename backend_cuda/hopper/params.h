// The forward kernels of sm_90a: their tiles, and what they receive.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_
#define TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_

#include <cuda.h>

#include "backend_cuda/params.h"

namespace tandem::cuda::hopper {

inline constexpr int kMostHeadDim = 128;  // of the backward and f32
inline constexpr int kMostForwardHeadDim = 256;
inline constexpr int kWarpgroupThreads = 128;  // of 64 query rows
inline constexpr int kMostWarpgroups = 3;

// The padded head dimension that serves max(Dqk, Dv) = `dim`.
constexpr int HeadDimBucket(int64_t dim) { return dim <= 64 ? 64 : 128; }
// The same of the forward kernels of 16-bit types.
constexpr int ForwardBucket(int64_t dim) {
  return dim <= 128 ? HeadDimBucket(dim) : dim <= 192 ? 192 : 256;
}

// The tiles of a head dimension. Two warps of one warpgroup more find out which there are and load
// them.
struct TilePolicy {
  int warpgroups;
  int query_stages;
  int stages;        // of K
  int value_stages;  // of V
  int bias_stages;   // of kBiasKeys columns
  int bias_parts;    // of a tile, each in a stage
  int block_rows;
  int block_keys;
  int threads;
  bool has_query_in_registers;
  int registers;          // of a thread of a warpgroup with rows
  int loading_registers;  // of a thread of the others
  int query_bytes;
  int tile_bytes;  // of K or V
  int bias_bytes;  // of a stage of the bias
};

inline constexpr int kBiasKeys = 64;

// What a kernel is compiled for. kPlain: only lengths hide pairs. kBands: also bands
// (core::SeesIntervals). kMasked: also a dense term. kWords: all terms. kBias, kAlibi, kTerms: all
// terms, and a bias of the type of Q, ALiBi, or softcap and dropout. The careful ones are for the
// row blocks whose output has a non-finite element.
enum class Variant {
  kPlain,
  kBands,
  kMasked,
  kCareful,  // kMasked
  kWords,
  kWordsCareful,
  kBias,
  kBiasCareful,
  kAlibi,
  kAlibiCareful,
  kTerms,
  kTermsCareful,
};
TANDEM_HD constexpr bool IsCareful(Variant variant) {
  return variant == Variant::kCareful || variant == Variant::kWordsCareful ||
         variant == Variant::kBiasCareful || variant == Variant::kAlibiCareful ||
         variant == Variant::kTermsCareful;
}
TANDEM_HD constexpr bool MayHaveDense(Variant variant) {
  return variant != Variant::kPlain && variant != Variant::kBands;
}
TANDEM_HD constexpr bool HasBias(Variant variant) {
  return variant == Variant::kBias || variant == Variant::kBiasCareful;
}
TANDEM_HD constexpr bool HasAlibi(Variant variant) {
  return variant == Variant::kAlibi || variant == Variant::kAlibiCareful;
}
TANDEM_HD constexpr bool HasScoreTerms(Variant variant) {
  return variant == Variant::kTerms || variant == Variant::kTermsCareful;
}
// Whether scores are more than products by a scale.
TANDEM_HD constexpr bool HasAddends(Variant variant) {
  return HasBias(variant) || HasAlibi(variant) || HasScoreTerms(variant);
}
TANDEM_HD constexpr bool MayHaveWords(Variant variant) {
  return HasAddends(variant) || variant == Variant::kWords || variant == Variant::kWordsCareful;
}
// Whether a warp copies a tile's dense bits to shared memory, where the warpgroups read them; else
// they read them where they are.
TANDEM_HD constexpr bool HasDenseRows(Variant variant) { return variant == Variant::kMasked; }

constexpr TilePolicy ForwardPolicy(int head_dim, Variant variant = Variant::kPlain) {
  TilePolicy policy = {};
  policy.warpgroups = head_dim <= 64 ? 3 : 2;
  // Draws need registers, and so does hiding many pairs.
  policy.has_query_in_registers =
      head_dim == 128 && !HasScoreTerms(variant) && variant != Variant::kMasked;
  // Q that is in registers leaves its place to the output, and a second place to one more stage of
  // V; where there is a bias, its stages take that, at head dimension 64 also some of the tiles'.
  const bool has_bias = HasBias(variant);
  policy.query_stages = head_dim > 128 || policy.has_query_in_registers ? 1 : 2;
  policy.stages = head_dim > 64 || has_bias ? 2 : 4;
  policy.value_stages = policy.has_query_in_registers && !has_bias ? 3 : policy.stages;
  policy.bias_stages = !has_bias ? 0 : head_dim > 128 ? 1 : 3;
  policy.block_rows = 64 * policy.warpgroups;
  policy.block_keys = head_dim > 128 ? 64 : 128;
  policy.bias_parts = policy.block_keys / kBiasKeys;
  policy.threads = (policy.warpgroups + 1) * kWarpgroupThreads;
  policy.registers = policy.warpgroups == 3 ? 160 : 232;
  policy.loading_registers = policy.warpgroups == 3 ? 32 : 40;
  policy.query_bytes = policy.block_rows * head_dim * 2;
  policy.tile_bytes = policy.block_keys * head_dim * 2;
  policy.bias_bytes = policy.block_rows * kBiasKeys * 2;
  return policy;
}

// One byte for each warp of a row block: its output has a non-finite element.
struct alignas(16) CarefulFlags {
  uint8_t warps[4 * kMostWarpgroups];
  uint8_t unused[16 - 4 * kMostWarpgroups];
};

inline constexpr int kOutputRows = 16;  // of a warp

inline constexpr int kMostBlocks = 256;  // of threads

// Where row blocks differ in length in ways that only the GPU knows, blocks of threads take one
// after the other from a queue, as they come free: sequences by the number of their keys, most of
// them first, of each its heads, of each its row blocks from the last to the first. Units are row
// blocks here, of those sequences that have them.
struct WorkQueue {
  int32_t* taken;        // units, but for the first of each block; null: there is no queue
  int32_t* sequences;    // in order of work
  int32_t* first_units;  // of each of them, and of what would follow
};

// Where a bias is, whose type is that of Q.
struct BiasSource {
  CUtensorMap map;
  // 1, or 0 where it is broadcast.
  int32_t per_batch;
  int32_t per_head;
  int32_t per_row;
};

struct Params {
  CUtensorMap query;
  CUtensorMap keys;
  CUtensorMap values;
  CUtensorMap out;  // in boxes of kOutputRows rows, where has_out_map
  BiasSource bias;
  core::Problem problem;
  CarefulFlags* flags;      // one per row block of each head
  CarefulFlags* any_flags;  // one per block of threads: whether it left any
  WorkQueue queue;
  ScoreScale score_scale;  // |scale|: its sign goes into Q
  int32_t row_blocks;      // of the longest sequence
  int32_t has_out_map;
  int32_t has_words;  // terms leave rows more than an interval of keys (MayHaveWords)
  // What a block of threads takes by turns: a row block of a head, or two, the n-th from the front
  // and the n-th from the back, which together are as long as any other two under a causal mask.
  int32_t units_of_head;
  int64_t units;
};
static_assert(sizeof(Params) <= 4096, "Params no longer fits kernel parameters");

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_PARAMS_H_
