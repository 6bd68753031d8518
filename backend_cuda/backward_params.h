// What the backward kernels receive, by value in constant memory, the layout of their workspace,
// and the tiles of each variant.
//
// Q, K, V and dO are first copied into planes (backward_prepare.cu): contiguous rows of the padded
// head dimension, zeros beyond what exists and in the place of what is not finite. So the kernels
// that multiply know one kind of tile, whatever the strides and types of the tensors.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_PARAMS_H_
#define TANDEM_BACKEND_CUDA_BACKWARD_PARAMS_H_

#include <type_traits>

#include "backend_cuda/policy.h"
#include "core/problem.h"

namespace tandem::cuda {

// The padded head dimension of the planes.
constexpr int GradientHeadDim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// Planes of a sequence end at a multiple of this many rows, so that every tile is whole.
inline constexpr int64_t kPlaneRows = 128;

// What there is to know of 64 rows: that they are in the planes, as all are unless
// BackwardParams::reads_tensors and none is empty or not finite; that dO or V has elements of 2^59
// and more, whose products may overflow.
enum TileNote : uint8_t { kInPlanes = 1, kHasLarge = 2 };

// Rows of Q and dO, or of K and V. `rows`: per head, of all sequences where packed.
struct GradientPlanes {
  uint16_t* first;        // of Q or K; a row has its parts one after the other (Planes of policy.h)
  uint16_t* second;       // of dO or V
  uint64_t* first_flags;  // per 64 rows of a sequence: rows whose products need another look
  uint64_t* second_flags;
  uint8_t* notes;  // TileNote, per 64 rows of a sequence, as the flags
  int64_t rows;
  int64_t words;  // of flags, per sequence and head
};

// Of a row of Q. lse: natural, but of base 2 in plain problems of 16 bits; +inf where the row is
// empty. offset: D - dLSE.
struct RowStatistics {
  float lse;
  float offset;
};

// Local keys [begin, end).
struct alignas(8) KeyInterval {
  int32_t begin;
  int32_t end;
};

struct BackwardParams {
  core::Problem problem;
  GradientPlanes queries;
  GradientPlanes keys;
  RowStatistics* statistics;  // as rows of Q
  float* lse;                 // natural; -inf where the row is empty
  KeyInterval* intervals;     // that rows see but for dense terms and segments; or null
  uint64_t* non_finite;       // rows of dO with such elements, as queries.second_flags
  float* row_sums;            // of dS and of dS times ALiBi's distance, as rows of Q; null: unused
  float* key_sums;            // of dS, per query head and key; null: unused
  char* rest;                 // of the workspace, for kernels that ask for more; where
                              // reads_tensors, f32 sums of dQ as rows of the planes and a count
                              // behind them, which the preparation clears
  float unit;                 // plain: from a product to a score in the unit of the statistics
  int32_t is_plain;           // scores are nothing but products by the scale, an ordinary number
  int32_t has_slope;          // dS is taken with respect to the products, under a softcap
  int32_t reads_tensors;      // only rows with kInPlanes are there
  int64_t blocks;             // of the longest sequence of a head
  int64_t section_heads;      // heads whose blocks are served together
};

// Index of the planes of local row 0 of a sequence, in rows.
TANDEM_HD int64_t PlaneRowOf(const core::Problem& p, const GradientPlanes& planes, int64_t batch,
                             int64_t heads, int64_t head, int64_t start) {
  return core::IsPacked(p) ? head * planes.rows + start + batch * kPlaneRows
                           : (batch * heads + head) * planes.rows;
}
TANDEM_HD int64_t QueryPlaneRow(const BackwardParams& params, const core::Sequence& s,
                                int64_t head) {
  return PlaneRowOf(params.problem, params.queries, s.batch, params.problem.q_heads, head,
                    s.q_start);
}
TANDEM_HD int64_t KeyPlaneRow(const BackwardParams& params, const core::Sequence& s,
                              int64_t kv_head) {
  return PlaneRowOf(params.problem, params.keys, s.batch, params.problem.kv_heads, kv_head,
                    s.kv_start);
}
TANDEM_HD int64_t KeySumRow(const BackwardParams& params, const core::Sequence& s, int64_t head) {
  return PlaneRowOf(params.problem, params.keys, s.batch, params.problem.q_heads, head, s.kv_start);
}
TANDEM_HD int64_t QueryFlagWord(const BackwardParams& params, const core::Sequence& s, int64_t head,
                                int64_t row) {
  return (s.batch * params.problem.q_heads + head) * params.queries.words + row / core::kTile;
}
TANDEM_HD int64_t KeyFlagWord(const BackwardParams& params, const core::Sequence& s,
                              int64_t kv_head, int64_t key) {
  return (s.batch * params.problem.kv_heads + kv_head) * params.keys.words + key / core::kTile;
}

// The arithmetic of a problem: that of f32 where dO has more bits than Q.
TANDEM_HD core::DType GradientMath(const core::Problem& p) {
  return p.dout.dtype == p.dtype ? p.dtype : core::DType::kF32;
}

// Which gradients are sums over rows or keys, collected by the kernels of dQ and of dK and dV.
TANDEM_HD bool HasBiasMatrix(const core::Problem& p) {
  return p.dbias.data != nullptr && p.dbias.row_stride != 0 && p.dbias.column_stride != 0;
}
TANDEM_HD bool NeedsRowSums(const core::Problem& p) {
  return p.dalibi != nullptr || (p.dbias.data != nullptr && p.dbias.column_stride == 0);
}
TANDEM_HD bool NeedsKeySums(const core::Problem& p) {
  return p.dbias.data != nullptr && p.dbias.row_stride == 0 && p.dbias.column_stride != 0;
}

// Whether all terms but dense ones and segments leave a row one interval of keys.
inline bool SeesIntervalsBesideSegments(core::Mask mask) {
  mask.segments_count = 0;
  return core::SeesIntervals(mask);
}

// Binds the parts of a workspace; `base` null: only their size in bytes is of interest.
inline int64_t LayOutBackward(BackwardParams* params, char* base) {
  const core::Problem& p = params->problem;
  int64_t size = 0;
  const auto take = [&](auto** part, int64_t bytes) {
    using Part = std::remove_reference_t<decltype(**part)>;
    *part = base == nullptr ? nullptr : reinterpret_cast<Part*>(base + size);
    size += core::RoundUp<int64_t>(bytes, 256);
  };
  const int64_t row_bytes =
      int64_t{2} * Planes(GradientMath(p)) * GradientHeadDim(core::Max(p.qk_dim, p.v_dim));
  const auto take_planes = [&](GradientPlanes* planes, int64_t heads, int64_t rows, int64_t total) {
    planes->rows =
        core::IsPacked(p) ? total + p.batch * kPlaneRows : core::RoundUp(rows, kPlaneRows);
    planes->words = core::RoundUp(rows, kPlaneRows) / core::kTile;
    const int64_t all = (core::IsPacked(p) ? 1 : p.batch) * heads * planes->rows;
    take(&planes->first, all * row_bytes);
    take(&planes->second, all * row_bytes);
    take(&planes->first_flags, 8 * p.batch * heads * planes->words);
    take(&planes->second_flags, 8 * p.batch * heads * planes->words);
    take(&planes->notes, p.batch * heads * planes->words);
    return all;
  };
  const int64_t rows = take_planes(&params->queries, p.q_heads, p.q_rows, p.q_total);
  take_planes(&params->keys, p.kv_heads, p.kv_rows, p.kv_total);
  take(&params->statistics, rows * static_cast<int64_t>(sizeof(RowStatistics)));
  take(&params->lse, rows * 4);
  if (SeesIntervalsBesideSegments(p.mask)) {
    take(&params->intervals, rows * static_cast<int64_t>(sizeof(KeyInterval)));
  }
  take(&params->non_finite, 8 * p.batch * p.q_heads * params->queries.words);
  if (NeedsRowSums(p)) take(&params->row_sums, rows * 8);
  if (NeedsKeySums(p)) {
    take(&params->key_sums, 4 * (core::IsPacked(p) ? 1 : p.batch) * p.q_heads * params->keys.rows);
  }
  return size;
}

static_assert(sizeof(BackwardParams) <= 4096, "BackwardParams no longer fits kernel parameters");

// ---- tiles ----

// A block keeps the rows of one side and walks over those of the other.
enum class GradientSide { kQueries, kKeys };

struct GradientPolicy {
  int row_tiles;  // of 16 rows that are kept, to a warp
  int warps;
  int step_rows;   // that are walked over at once
  int stages;      // steps in shared memory
  bool has_parts;  // dK and dV are computed by blocks of their own
  int threads;
  int block_rows;
  int kept_bytes;  // of one of the two tensors
  int step_bytes;
};

// Everything fits the shared memory of the smallest GPUs served, as in the forward pass.
constexpr GradientPolicy MakeGradientPolicy(core::DType dtype, int head_dim, GradientSide side,
                                            bool has_terms) {
  const bool is_f32 = dtype == core::DType::kF32;
  const bool keeps_keys = side == GradientSide::kKeys;
  GradientPolicy policy = {};
  policy.row_tiles = !is_f32 && (head_dim <= 64 || (head_dim <= 128 && !keeps_keys)) ? 2 : 1;
  policy.warps = !is_f32 ? 4 : head_dim <= 64 ? 4 : head_dim <= 128 ? 2 : 1;
  if (is_f32 || head_dim > 128) {
    policy.step_rows = head_dim <= 64 ? 32 : 16;
  } else {
    policy.step_rows = !has_terms && (head_dim <= 64) != keeps_keys ? 64 : 32;
  }
  policy.stages = is_f32 && head_dim > 128 ? 1 : 2;
  policy.has_parts = keeps_keys && head_dim > 128;
  policy.threads = policy.warps * kWarpSize;
  policy.block_rows = 16 * policy.row_tiles * policy.warps;
  policy.kept_bytes = Planes(dtype) * policy.block_rows * head_dim * 2;
  policy.step_bytes = Planes(dtype) * policy.step_rows * head_dim * 2;
  return policy;
}

// The gradient of a bias, by tiles of it: as many rows as keys.
struct BiasPolicy {
  int rows;
  int threads;
  int tile_bytes;
};

constexpr BiasPolicy MakeBiasPolicy(core::DType dtype, int head_dim) {
  BiasPolicy policy = {};
  policy.rows = dtype != core::DType::kF32 ? (head_dim <= 128 ? 64 : 32)
                                           : (head_dim <= 64    ? 64
                                              : head_dim <= 128 ? 32
                                                                : 16);
  policy.threads = policy.rows / 16 * kWarpSize;
  policy.tile_bytes = Planes(dtype) * policy.rows * head_dim * 2;
  return policy;
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_PARAMS_H_
