// The tile of each kernel variant: one constexpr function answers the launcher and the kernel.
#ifndef TANDEM_BACKEND_CUDA_POLICY_H_
#define TANDEM_BACKEND_CUDA_POLICY_H_

#include "core/element.h"
#include "core/mask.h"

namespace tandem::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxHeadDim = 256;

// The padded head dimension that serves max(Dqk, Dv) = `dim`.
constexpr int HeadDimBucket(int64_t dim) {
  return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// The rows of one head of one sequence.
struct RowSource {
  const char* base;
  int64_t row_stride;     // in elements
  int64_t column_stride;  // in elements
  int32_t columns;
  bool is_vector;  // contiguous rows that start at multiples of 16 bytes
};

// What the threads of a block share beside the Q, K and V tiles. What is the same for all of them
// but not needed in the inner loops is here too, to spare registers.
struct BlockState {
  core::Sequence sequence;
  int64_t head;
  int64_t first_row;  // of the block
  int64_t rows_end;
  int64_t tile_begin;  // the key tiles that these rows may see
  int64_t tile_end;
  int64_t list_begin;  // the first tile of the list's chunk
  RowSource keys;
  RowSource values;
  uint64_t visible_words[core::kTile];  // of the current partial tile, one per row
  uint64_t query_flags;                 // rows that the split products cannot serve (f32)
  uint64_t key_flags[2];                // likewise keys; of the tiles with even and odd step
  uint64_t value_flags[2];              // keys whose values were taken out of the V tile
  int32_t warp_counts[8];
  int32_t list_count;
  uint16_t list[128];  // key tiles to visit: 4 * (tile - list_begin) + class
};

struct TilePolicy {
  int head_dim;    // padded
  int planes;      // 16-bit parts of one element: 1, or 3 for f32 = bf16 + bf16 + bf16
  int block_rows;  // query rows of a block; 16 to a warp
  int block_keys;  // keys of a step; divides the canonical 64
  int threads;
  int blocks_per_multiprocessor;  // that the registers must leave room for
  bool query_in_registers;        // else its fragments are read from shared memory in every step
  int query_bytes;
  int key_bytes;  // of the K tile and of the V tile
  int shared_bytes;
};

// Every tile fits the 99 KB of the smallest GPUs served (compute capability 8.6), so that no
// variant depends on the device. Widths of f32 shrink because its three planes cost 6 bytes an
// element.
constexpr TilePolicy ForwardPolicy(core::DType dtype, int head_dim) {
  const bool is_f32 = dtype == core::DType::kF32;
  TilePolicy policy = {};
  policy.head_dim = head_dim;
  policy.planes = is_f32 ? 3 : 1;
  policy.block_rows = is_f32 && head_dim > 128 ? 32 : 64;
  policy.block_keys = 64;
  if (is_f32 && head_dim > 64) policy.block_keys = head_dim > 128 ? 16 : 32;
  if (!is_f32 && head_dim > 128) policy.block_keys = 32;
  policy.threads = policy.block_rows / 16 * kWarpSize;
  policy.blocks_per_multiprocessor = !is_f32 && head_dim <= 64 ? 3 : 2;
  policy.query_in_registers = !is_f32 && head_dim <= 32;
  policy.query_bytes = policy.planes * policy.block_rows * head_dim * 2;
  policy.key_bytes = policy.planes * policy.block_keys * head_dim * 2;
  policy.shared_bytes =
      policy.query_bytes + 2 * policy.key_bytes + static_cast<int>(sizeof(BlockState));
  return policy;
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_POLICY_H_
