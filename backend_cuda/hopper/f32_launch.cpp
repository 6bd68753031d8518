#include "backend_cuda/hopper/f32_launch.h"

#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {
namespace {

using core::Format;
using core::Problem;

int64_t RowBlocks(const Problem& p) { return core::CeilDiv<int64_t>(p.q_rows, kF32BlockRows); }
int64_t Items(const Problem& p) { return p.batch * p.q_heads * RowBlocks(p); }

// Rows of the planes of all heads.
int64_t AllPlaneRows(const Problem& p) {
  return (core::IsPacked(p) ? 1 : p.batch) * p.kv_heads * PlaneRows(p);
}
// Padded columns of a plane (LayOutWorkspace).
int64_t PlaneColumns(const Problem& p) { return cuda::HeadDimBucket(core::Max(p.qk_dim, p.v_dim)); }

// The three planes of a row follow each other. Of fewer than 64 columns a box has some of the next
// plane too: Q has zeros there, and such columns of the output are not written.
bool MakeMap(const Problem& p, const SplitTensor& tensor, CUtensorMap* map) {
  return tensor.planes != nullptr &&
         MakePlaneMap(tensor.planes, core::DType::kBF16, AllPlaneRows(p),
                      static_cast<int>(kF32Planes * PlaneColumns(p)), kF32BlockKeys, map);
}

constexpr int64_t kPairedItems = 1024;  // from where on pairs still occupy all multiprocessors

}  // namespace

bool DeclinesF32(const Problem& p, core::Text* reason) {
  const core::Mask& mask = p.mask;
  if (p.qk_dim > kMostHeadDim || p.v_dim > kMostHeadDim) {
    Format(reason, "it serves head dimensions up to %d, and these are %lld (q, k) and %lld (v)",
           kMostHeadDim, static_cast<long long>(p.qk_dim), static_cast<long long>(p.v_dim));
  } else if (p.has_block_table) {
    Format(reason, "it serves no keys and values in pages");
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
  } else if (Items(p) > INT32_MAX || AllPlaneRows(p) > INT32_MAX) {
    Format(
        reason,
        "it serves fewer than 2^31 blocks of rows, and keys of all heads, and these are %lld and "
        "%lld",
        static_cast<long long>(Items(p)), static_cast<long long>(AllPlaneRows(p)));
  } else {
    return false;
  }
  return true;
}

bool MakeF32Params(const ForwardParams& forward, F32Params* params) {
  const Problem& p = forward.problem;
  if (!HasOrdinaryScores(p) || !MakeMap(p, forward.keys, &params->keys) ||
      !MakeMap(p, forward.values, &params->values)) {
    return false;
  }
  params->problem = p;
  params->key_flags = forward.keys.flags;
  params->value_flags = forward.values.flags;
  params->scale = p.scale < 0.0f ? -p.scale : p.scale;
  params->plane_columns = static_cast<int32_t>(PlaneColumns(p));
  params->row_blocks = static_cast<int32_t>(RowBlocks(p));
  const bool is_paired = p.mask.band_count > 0 && Items(p) >= kPairedItems;
  params->units_of_head = is_paired ? static_cast<int32_t>(core::CeilDiv<int64_t>(RowBlocks(p), 2))
                                    : params->row_blocks;
  params->units = p.batch * p.q_heads * params->units_of_head;
  return true;
}

}  // namespace tandem::cuda::hopper
