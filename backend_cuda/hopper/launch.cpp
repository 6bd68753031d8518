#include "backend_cuda/hopper/launch.h"

#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {
namespace {

using core::Array4;
using core::Format;
using core::Problem;

// The driver's encoder of tensor maps; null where the driver has none.
using Encoder = decltype(&cuTensorMapEncodeTiled);
Encoder FindEncoder() {
  static const Encoder encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<Encoder>(function);
  }();
  return encoder;
}

CUtensorMapDataType MapType(core::DType dtype) {
  return dtype == core::DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Rows of a tensor, in boxes of `box_rows` rows and 64 columns whose 16-byte chunks are permuted.
bool MakeMap(const Problem& p, const Array4& array, int64_t dim, int64_t heads, int64_t rows,
             int box_rows, CUtensorMap* map) {
  const bool is_packed = core::IsPacked(p);
  const Encoder encode = FindEncoder();
  if (encode == nullptr || reinterpret_cast<uintptr_t>(array.data) % 16 != 0) return false;
  const int64_t shape[4] = {dim, rows, heads, is_packed ? 1 : p.batch};
  const int64_t strides_given[3] = {array.row_stride, array.head_stride, array.batch_stride};
  cuuint64_t extents[4];
  cuuint64_t strides[3];
  for (int d = 0; d < 4; ++d) extents[d] = static_cast<cuuint64_t>(core::Max<int64_t>(shape[d], 1));
  for (int d = 0; d < 3; ++d) {
    // Where there is one, its distance to the next does not matter, but it must not be 0.
    strides[d] = extents[d + 1] == 1 ? 16 : static_cast<cuuint64_t>(strides_given[d] * 2);
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map, MapType(p.dtype), 4, array.data, extents, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool MakePlaneMap(void* data, core::DType dtype, int64_t rows, int columns, int box_rows,
                  CUtensorMap* map) {
  const Encoder encode = FindEncoder();
  if (encode == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), 1,
                                 1};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(columns) * 2, 16, 16};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map, MapType(dtype), 4, data, extents, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

namespace {

bool HasStrides(const Array4& array) {
  const int64_t strides = array.row_stride | array.head_stride | array.batch_stride;
  return array.column_stride == 1 && strides % 8 == 0 && strides >= 0;
}

int64_t RowBlocks(const Problem& p) {
  const int head_dim = HeadDimBucket(core::Max(p.qk_dim, p.v_dim));
  return core::CeilDiv<int64_t>(p.q_rows, ForwardPolicy(head_dim).block_rows);
}
int64_t Items(const Problem& p) { return p.batch * p.q_heads * RowBlocks(p); }

constexpr int64_t kPairedItems = 1024;  // from where on pairs still occupy all multiprocessors

}  // namespace

bool Declines(const Problem& p, core::Text* reason) {
  const Array4* const arrays[] = {&p.q, &p.k, &p.v};
  const char* const names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    if (HasStrides(*arrays[i])) continue;
    Format(reason,
           "the strides of %s are %lld, %lld, %lld and %lld; the tensor memory accelerator takes a "
           "last stride of 1 and multiples of 8, none negative",
           names[i], static_cast<long long>(arrays[i]->batch_stride),
           static_cast<long long>(arrays[i]->head_stride),
           static_cast<long long>(arrays[i]->row_stride),
           static_cast<long long>(arrays[i]->column_stride));
    return true;
  }
  const core::Mask& mask = p.mask;
  if (p.qk_dim > kMostHeadDim || p.v_dim > kMostHeadDim) {
    Format(reason, "it serves head dimensions up to %d, and these are %lld (q, k) and %lld (v)",
           kMostHeadDim, static_cast<long long>(p.qk_dim), static_cast<long long>(p.v_dim));
  } else if (p.bias.data != nullptr || p.alibi_slopes != nullptr || p.softcap > 0.0f ||
             p.dropout.enabled != 0) {
    Format(reason, "it serves no %s",
           p.bias.data != nullptr      ? "bias"
           : p.alibi_slopes != nullptr ? "ALiBi"
           : p.softcap > 0.0f          ? "softcap"
                                       : "dropout");
  } else if (!core::SeesIntervals(mask) || p.sources.block_sparse_count != 0) {
    Format(reason,
           "beside lengths and dense masks it serves bands, with a prefix only where they have no "
           "left edge");
  } else if (p.sources.dense_count + (mask.dense.words != nullptr) != 0 && p.kv_offset % 64 != 0) {
    Format(reason, "with a dense mask it serves kv_offset that is a multiple of 64, not %lld",
           static_cast<long long>(p.kv_offset));
  } else if (Items(p) > INT32_MAX) {
    Format(reason, "it serves fewer than 2^31 blocks of rows, and these are %lld",
           static_cast<long long>(Items(p)));
  } else {
    return false;
  }
  return true;
}

int64_t FlagBytes(const Problem& problem) {
  return Items(problem) * static_cast<int64_t>(sizeof(CarefulFlags));
}

bool MakeParams(const Problem& p, void* flags, Params* params) {
  if (!HasOrdinaryScores(p)) return false;
  const TilePolicy policy = ForwardPolicy(HeadDimBucket(core::Max(p.qk_dim, p.v_dim)));
  const bool is_packed = core::IsPacked(p);
  const int64_t q_rows = is_packed ? p.q_total : p.q_rows;
  const int64_t kv_rows = is_packed ? p.kv_total : p.kv_rows;
  if (!MakeMap(p, p.q, p.qk_dim, p.q_heads, q_rows, policy.block_rows, &params->query) ||
      !MakeMap(p, p.k, p.qk_dim, p.kv_heads, kv_rows, kBlockKeys, &params->keys) ||
      !MakeMap(p, p.v, p.v_dim, p.kv_heads, kv_rows, kBlockKeys, &params->values)) {
    return false;
  }
  params->problem = p;
  params->flags = static_cast<CarefulFlags*>(flags);
  params->score_scale = ScaleBy(p.scale < 0.0f ? -p.scale : p.scale);
  params->row_blocks = static_cast<int32_t>(RowBlocks(p));
  const bool is_paired = p.mask.band_count > 0 && Items(p) >= kPairedItems;
  params->units_of_head = is_paired ? static_cast<int32_t>(core::CeilDiv<int64_t>(RowBlocks(p), 2))
                                    : params->row_blocks;
  params->units = p.batch * p.q_heads * params->units_of_head;
  return true;
}

}  // namespace tandem::cuda::hopper
