// The tiles of each kernel variant: one constexpr function a kernel answers launcher and kernel.
#ifndef TANDEM_BACKEND_CUDA_POLICY_H_
#define TANDEM_BACKEND_CUDA_POLICY_H_

#include "core/element.h"
#include "core/mask.h"

namespace tandem::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kSmallestSharedBytes = 99 * 1024;  // of a block, on compute capability 8.6

// The padded head dimension that serves max(Dqk, Dv) = `dim`.
constexpr int HeadDimBucket(int64_t dim) {
  return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// 16-bit parts that one element is multiplied in: f32 = bf16 + bf16 + bf16.
constexpr int Planes(core::DType dtype) { return dtype == core::DType::kF32 ? 3 : 1; }

// Forward, a block of query rows of one head.
struct TilePolicy {
  int block_rows;  // query rows of a block
  int row_tiles;   // of 16 rows, to a warp: two share every fragment of K and V
  int block_keys;  // keys of a step; divides the canonical 64
  int threads;
  int blocks_per_multiprocessor;  // that the registers must leave room for
  bool query_in_registers;        // else its fragments are read from shared memory in every step
  int query_bytes;
  int tile_bytes;  // of one K or V tile
};

// Every tile fits the shared memory of the smallest GPUs served, so that no variant, and no bit of
// a result, depends on the device.
constexpr TilePolicy ForwardPolicy(core::DType dtype, int head_dim) {
  const bool is_f32 = dtype == core::DType::kF32;
  TilePolicy policy = {};
  policy.row_tiles = !is_f32 && head_dim <= 128 ? 2 : 1;
  const int warps = is_f32 && head_dim > 128 ? 2 : 4;
  policy.block_rows = 16 * policy.row_tiles * warps;
  policy.block_keys = 64;
  if (is_f32 && head_dim > 64) policy.block_keys = head_dim > 128 ? 16 : 32;
  policy.threads = warps * kWarpSize;
  policy.blocks_per_multiprocessor = 2;
  policy.query_in_registers = !is_f32 && head_dim <= 64;
  policy.query_bytes = Planes(dtype) * policy.block_rows * head_dim * 2;
  policy.tile_bytes = Planes(dtype) * policy.block_keys * head_dim * 2;
  return policy;
}

// Forward, short queries: the heads of a group share a block's rows, and its warps the keys.
struct ShortPolicy {
  int warps;   // each takes 16 keys of a step
  int stages;  // steps in shared memory; 1: loads are not asynchronous
  int threads;
  int blocks_per_multiprocessor;  // that the registers must leave room for
  int query_bytes;
  int tile_bytes;  // of one warp's 16 keys or values
  int shared_bytes;
};

inline constexpr int kShortBlockRows = 16;

constexpr ShortPolicy ForwardShortPolicy(core::DType dtype, int head_dim) {
  const bool is_f32 = dtype == core::DType::kF32;
  ShortPolicy policy = {};
  policy.warps = is_f32 && head_dim > 128 ? 1 : 2;
  policy.stages = is_f32 ? 1 : 2;
  policy.threads = policy.warps * kWarpSize;
  policy.blocks_per_multiprocessor = (is_f32 || head_dim > 128 ? 256 : 384) / policy.threads;
  policy.query_bytes = Planes(dtype) * kShortBlockRows * head_dim * 2;
  policy.tile_bytes = Planes(dtype) * 16 * head_dim * 2;
  policy.shared_bytes = policy.query_bytes + policy.stages * policy.warps * 2 * policy.tile_bytes;
  return policy;
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_POLICY_H_
