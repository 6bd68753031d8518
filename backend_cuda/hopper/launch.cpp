#include "backend_cuda/hopper/launch.h"

#include <type_traits>

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

// Maps an array of 16-bit elements, whose last dimension is contiguous, for boxes of `box_rows`
// rows and 64 columns whose 16-byte chunks are permuted. extents: columns, rows, heads, batch.
bool MakeMap(const Array4& array, const int64_t (&extents)[4], int box_rows, CUtensorMap* map,
             CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const Encoder encode = FindEncoder();
  if (encode == nullptr || reinterpret_cast<uintptr_t>(array.data) % 16 != 0) return false;
  const int64_t strides_given[3] = {array.row_stride, array.head_stride, array.batch_stride};
  cuuint64_t shape[4];
  cuuint64_t strides[3];
  for (int d = 0; d < 4; ++d) shape[d] = static_cast<cuuint64_t>(core::Max<int64_t>(extents[d], 1));
  for (int d = 0; d < 3; ++d) {
    // Where there is one, its distance to the next does not matter, but it must not be 0.
    strides[d] = shape[d + 1] == 1 ? 16 : static_cast<cuuint64_t>(strides_given[d] * 2);
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, array.data, shape, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool MakeMap(const Problem& p, const Array4& array, int64_t dim, int64_t heads, int64_t rows,
             int box_rows, CUtensorMap* map) {
  const int64_t extents[4] = {dim, rows, heads, core::IsPacked(p) ? 1 : p.batch};
  return MakeMap(array, extents, box_rows, map);
}

}  // namespace

bool MakeBiasSource(const Problem& p, int box_rows, BiasSource* bias) {
  const Array4& array = p.bias;
  bias->per_batch = array.batch_stride != 0;
  bias->per_head = array.head_stride != 0;
  bias->per_row = array.row_stride != 0;
  const int64_t extents[4] = {p.global_kv_len, bias->per_row != 0 ? p.global_q_len : 1,
                              bias->per_head != 0 ? p.q_heads : 1,
                              bias->per_batch != 0 ? p.batch : 1};
  return MakeMap(array, extents, bias->per_row != 0 ? box_rows : 1, &bias->map);
}

bool MakeStreamMaps(const Problem& p, int box_rows, CUtensorMap* keys, CUtensorMap* values) {
  const auto make = [&](const Array4& array, int64_t dim, CUtensorMap* map) {
    const int64_t strides = array.row_stride | array.head_stride | array.batch_stride;
    const bool is_packed = core::IsPacked(p);
    const int64_t extents[4] = {dim, is_packed ? p.kv_total : p.kv_rows, p.kv_heads,
                                is_packed ? 1 : p.batch};
    return array.column_stride == 1 && strides % 8 == 0 && strides >= 0 &&
           MakeMap(array, extents, box_rows, map, CU_TENSOR_MAP_L2_PROMOTION_NONE);
  };
  return make(p.k, p.qk_dim, keys) && make(p.v, p.v_dim, values);
}

bool MakePlaneMap(void* data, core::DType dtype, int64_t rows, int columns, int box_rows,
                  CUtensorMap* map) {
  Array4 array = {};
  array.data = data;
  array.dtype = dtype;
  array.row_stride = columns;
  const int64_t extents[4] = {columns, rows, 1, 1};
  return MakeMap(array, extents, box_rows, map);
}

namespace {

bool HasStrides(const Array4& array) {
  const int64_t strides = array.row_stride | array.head_stride | array.batch_stride;
  return array.column_stride == 1 && strides % 8 == 0 && strides >= 0;
}

bool DeclinesStrides(const Array4& array, const char* name, core::Text* reason) {
  Format(reason,
         "the strides of %s are %lld, %lld, %lld and %lld; the tensor memory accelerator takes a "
         "last stride of 1 and multiples of 8, none negative",
         name, static_cast<long long>(array.batch_stride),
         static_cast<long long>(array.head_stride), static_cast<long long>(array.row_stride),
         static_cast<long long>(array.column_stride));
  return true;
}

TilePolicy PolicyOf(const Problem& p) {
  return ForwardPolicy(ForwardBucket(core::Max(p.qk_dim, p.v_dim)));
}
int64_t RowBlocks(const Problem& p) {
  return core::CeilDiv<int64_t>(p.q_rows, PolicyOf(p).block_rows);
}
int64_t Items(const Problem& p) { return p.batch * p.q_heads * RowBlocks(p); }

// Whether blocks of a block-sparse term cut tiles, whose words then take longer than the products.
bool HasListsAcrossTiles(const Problem& p) {
  const TilePolicy policy = PolicyOf(p);
  const auto cuts = [&](int64_t q_block, int64_t kv_block) {
    return q_block % policy.block_rows != 0 || kv_block % policy.block_keys != 0;
  };
  bool is_cut = false;
  for (int t = 0; t < p.sources.block_sparse_count; ++t) {
    const core::BlockSparseSource& source = p.sources.block_sparse[t];
    is_cut = is_cut || cuts(source.q_block, source.kv_block);
  }
  for (int t = 0; t < p.mask.block_sparse_count; ++t) {
    is_cut = is_cut || cuts(p.mask.block_sparse[t].q_block, p.mask.block_sparse[t].kv_block);
  }
  return is_cut;
}

// Scores with softcap have errors of 2^-22 of the cap (ScoreTerms).
bool HasOrdinarySoftcap(const Problem& p) {
  return !(p.softcap > 0.0f) || (p.softcap >= 0x1p-16f && p.softcap <= 256.0f);
}

constexpr int64_t kPairedItems = 1024;  // from where on pairs still occupy all multiprocessors

}  // namespace

bool DeclinesBias(const Problem& p, core::Text* reason) {
  if (p.bias.dtype != p.dtype) {
    Format(reason, "it serves a bias of the type of q, %s, and this one is %s",
           core::DTypeName(p.dtype), core::DTypeName(p.bias.dtype));
    return true;
  }
  return !HasStrides(p.bias) && DeclinesStrides(p.bias, "the bias", reason);
}

bool MakeTensorMap(const Problem& p, const Array4& array, int64_t dim, int64_t heads, int64_t rows,
                   int box_rows, CUtensorMap* map) {
  return HasStrides(array) && MakeMap(p, array, dim, heads, rows, box_rows, map);
}

bool Declines(const Problem& p, core::Text* reason) {
  if (!HasStrides(p.q)) return DeclinesStrides(p.q, "q", reason);
  if (!HasStrides(p.k)) return DeclinesStrides(p.k, "k", reason);
  if (!HasStrides(p.v)) return DeclinesStrides(p.v, "v", reason);
  const core::Mask& mask = p.mask;
  if (p.qk_dim > kMostForwardHeadDim || p.v_dim > kMostForwardHeadDim) {
    Format(reason, "it serves head dimensions up to %d, and these are %lld (q, k) and %lld (v)",
           kMostForwardHeadDim, static_cast<long long>(p.qk_dim), static_cast<long long>(p.v_dim));
  } else if ((p.softcap > 0.0f || p.dropout.enabled != 0) &&
             (p.alibi_slopes != nullptr || p.bias.data != nullptr)) {
    Format(reason, "it serves %s or %s, and there are both",
           p.softcap > 0.0f ? "softcap" : "dropout", p.bias.data != nullptr ? "a bias" : "ALiBi");
  } else if (p.dropout.enabled != 0 && p.kv_offset % 4 != 0) {
    Format(reason, "with dropout it serves kv_offset that is a multiple of 4, not %lld",
           static_cast<long long>(p.kv_offset));
  } else if (p.alibi_slopes != nullptr && p.bias.data != nullptr) {
    Format(reason, "it serves a bias or ALiBi, and there are both");
  } else if (p.bias.data != nullptr && DeclinesBias(p, reason)) {
    return true;
  } else if (p.sources.dense_count + (mask.dense.words != nullptr) != 0 && p.kv_offset % 64 != 0) {
    Format(reason, "with a dense mask it serves kv_offset that is a multiple of 64, not %lld",
           static_cast<long long>(p.kv_offset));
  } else if (HasListsAcrossTiles(p)) {
    Format(reason, "it serves block-sparse lists of blocks of whole tiles, multiples of %d x %d",
           PolicyOf(p).block_rows, PolicyOf(p).block_keys);
  } else if (p.global_q_len > INT32_MAX || p.global_kv_len > INT32_MAX) {
    Format(reason, "it serves fewer than 2^31 rows and keys, and these are %lld and %lld",
           static_cast<long long>(p.global_q_len), static_cast<long long>(p.global_kv_len));
  } else if (Items(p) > INT32_MAX) {
    Format(reason, "it serves fewer than 2^31 blocks of rows, and these are %lld",
           static_cast<long long>(Items(p)));
  } else {
    return false;
  }
  return true;
}

namespace {

// Binds the parts of the workspace; `base` null: only their size in bytes is of interest.
int64_t LayOut(const Problem& p, char* base, Params* params) {
  int64_t size = 0;
  const auto take = [&](auto** part, int64_t count) {
    using Part = std::remove_pointer_t<decltype(part)>;
    *part = base == nullptr ? nullptr : reinterpret_cast<Part>(base + size);
    size += core::RoundUp<int64_t>(count * static_cast<int64_t>(sizeof(**part)), 16);
  };
  take(&params->flags, Items(p));
  take(&params->any_flags, kMostBlocks);
  take(&params->queue.taken, 1);
  take(&params->queue.sequences, p.batch);
  take(&params->queue.first_units, p.batch + 1);
  return size;
}

}  // namespace

int64_t WorkspaceBytes(const Problem& problem) {
  Params params;
  return LayOut(problem, nullptr, &params);
}

bool MakeParams(const Problem& p, void* workspace, Params* params) {
  if (!HasOrdinaryScale(p) || !HasOrdinarySoftcap(p)) return false;
  const TilePolicy policy = PolicyOf(p);
  const bool is_packed = core::IsPacked(p);
  const int64_t q_rows = is_packed ? p.q_total : p.q_rows;
  const int64_t kv_rows = is_packed ? p.kv_total : p.kv_rows;
  if (!MakeMap(p, p.q, p.qk_dim, p.q_heads, q_rows, policy.block_rows, &params->query) ||
      !MakeMap(p, p.k, p.qk_dim, p.kv_heads, kv_rows, policy.block_keys, &params->keys) ||
      !MakeMap(p, p.v, p.v_dim, p.kv_heads, kv_rows, policy.block_keys, &params->values)) {
    return false;
  }
  params->has_out_map = p.out.dtype == p.dtype && HasStrides(p.out) &&
                        MakeMap(p, p.out, p.v_dim, p.q_heads, q_rows, kOutputRows, &params->out);
  if (p.bias.data != nullptr && !MakeBiasSource(p, policy.block_rows, &params->bias)) return false;
  params->problem = p;
  LayOut(p, static_cast<char*>(workspace), params);
  const bool has_lengths = is_packed || p.q_lengths.data != nullptr || p.kv_lengths.data != nullptr;
  if (!has_lengths && core::SeesIntervals(p.mask)) params->queue = {};
  params->score_scale = ScaleBy(p.scale < 0.0f ? -p.scale : p.scale);
  params->row_blocks = static_cast<int32_t>(RowBlocks(p));
  params->has_words = !core::SeesIntervals(p.mask);
  const bool is_paired =
      params->queue.taken == nullptr && p.mask.band_count > 0 && Items(p) >= kPairedItems;
  params->units_of_head = is_paired ? static_cast<int32_t>(core::CeilDiv<int64_t>(RowBlocks(p), 2))
                                    : params->row_blocks;
  params->units = p.batch * p.q_heads * params->units_of_head;
  return true;
}

}  // namespace tandem::cuda::hopper
