// What the kernels receive, by value in constant memory, and how the work is divided.
#ifndef TANDEM_BACKEND_CUDA_PARAMS_H_
#define TANDEM_BACKEND_CUDA_PARAMS_H_

#include "backend_cuda/policy.h"
#include "core/problem.h"
#include "core/softmax.h"

namespace tandem::cuda {

// ---- which kernel serves a sequence: a question about that sequence alone ----

// Sequences with so few query rows are split over keys, and the heads of a group share the rows of
// a tile; the others take blocks of rows. Both give every row its own bits, whatever the batch.
inline constexpr int64_t kShortRows = 16;        // rows of a head, or
inline constexpr int64_t kShortPackedRows = 64;  // rows of a group

inline constexpr int64_t kShortestSplit = 512;  // local keys
inline constexpr int64_t kMostSplits = 64;

// Local keys of a split of a sequence, and how many splits it has.
TANDEM_HD int64_t SplitKeys(const core::Sequence& s) {
  return core::RoundUp<int64_t>(
      core::Max<int64_t>(core::CeilDiv(core::LocalKeys(s), kMostSplits), 1), kShortestSplit);
}
TANDEM_HD int64_t SplitCount(const core::Sequence& s) {
  // In 32 bits, where divisions are short.
  return core::CeilDiv(static_cast<uint32_t>(core::LocalKeys(s)),
                       static_cast<uint32_t>(SplitKeys(s)));
}

TANDEM_HD int64_t MaxShortRows(int64_t group) {
  const auto divisor = static_cast<uint32_t>(core::Min(group, kShortPackedRows));
  return core::Max<int64_t>(kShortRows, static_cast<uint32_t>(kShortPackedRows) / divisor);
}
// Rows of a sequence that exist.
TANDEM_HD int64_t ExistingRows(const core::Sequence& s) {
  return core::Clamp<int64_t>(s.q_len - s.q_offset, 0, s.q_rows);
}
TANDEM_HD bool IsShort(const core::Problem& p, const core::Sequence& s) {
  return ExistingRows(s) <= MaxShortRows(p.group);
}
// Whether a problem can have such sequences, and others.
TANDEM_HD bool MayBeShort(const core::Problem& p) {
  return p.q_rows <= MaxShortRows(p.group) || core::IsPacked(p) || p.q_lengths.data != nullptr ||
         p.global_q_len - p.q_offset <= MaxShortRows(p.group);
}
TANDEM_HD bool MayBeLong(const core::Problem& p) { return p.q_rows > MaxShortRows(p.group); }

// ---- workspace ----

// Planes of the keys and values of f32 problems (forward_stages.cu): a row has its three planes of
// `head_dim` bf16 one after the other, and each sequence rows of zeros up to the end of its last
// tile. Flags: one word per 64 keys of a sequence.
struct SplitTensor {
  uint16_t* planes;
  uint64_t* flags;
};

// Partial results of short sequences, indexed by (batch, head, row, split): the unnormalised
// output, the maximum and the sum.
struct PartialResults {
  float* output;
  float* maximum;
  float* sum;
  int64_t rows;    // of a head, at most
  int64_t splits;  // of a sequence, at most
};

// Factors from a product <q, k> to a score: score = product * scale; exp2(product * log2_scale) is
// its exponential. margin: of a product above a row's reference, before that is raised.
struct ScoreScale {
  float scale;
  float log2_scale;
  float margin;
};

TANDEM_HD constexpr ScoreScale ScaleBy(float scale) {
  constexpr float kLazyBits = 8.0f;
  return {scale, scale * core::kLog2e, kLazyBits / (scale * core::kLog2e)};
}

// How far apart things lie in a tensor of K or V rows, in bytes; products that copies would take
// again in every step.
struct CopySteps {
  int64_t step;  // the keys of one step and those of the next
  int64_t pass;  // the rows that one thread copies
};

struct ForwardParams {
  core::Problem problem;
  SplitTensor keys;
  SplitTensor values;
  PartialResults partials;
  ScoreScale score_scale;  // |scale|: for scores that are nothing but products by it
  CopySteps key_steps;
  CopySteps value_steps;
  int64_t row_blocks;      // of the longest sequence
  int64_t items;           // blocks of the launch
  int64_t section_heads;   // heads whose row blocks are served together, longest first
  int32_t has_mask_terms;  // of the problem's mask
  int32_t bias_bytes;      // of an element, where tiles of the bias are staged; else 0
  int32_t has_chunks;      // rows of K and V are whole 16-byte chunks at multiples of 16 bytes,
  int32_t has_whole_rows;  // and so are those of Q, and all are as long as a tile's
  int32_t stages;          // of the streaming kernel
};

TANDEM_HD int64_t PartialIndex(const PartialResults& partials, int64_t q_heads, int64_t batch,
                               int64_t head, int64_t row) {
  return ((batch * q_heads + head) * partials.rows + row) * partials.splits;
}

TANDEM_HD int64_t FlagWords(const core::Problem& p) {
  return core::CeilDiv<int64_t>(p.kv_rows, core::kTile);
}
// Rows of the planes of one head; with packed tensors, of all sequences.
TANDEM_HD int64_t PlaneRows(const core::Problem& p) {
  return core::IsPacked(p) ? p.kv_total + p.batch * core::kTile : FlagWords(p) * core::kTile;
}
// Index of the planes of local row 0 of a sequence, in rows.
TANDEM_HD int64_t PlaneRow(const core::Problem& p, const core::Sequence& s, int64_t kv_head) {
  if (core::IsPacked(p)) return kv_head * PlaneRows(p) + s.kv_start + s.batch * core::kTile;
  return (s.batch * p.kv_heads + kv_head) * PlaneRows(p);
}
TANDEM_HD int64_t FlagIndex(const core::Problem& p, int64_t batch, int64_t kv_head) {
  return (batch * p.kv_heads + kv_head) * FlagWords(p);
}

// Binds the parts of a workspace; `base` null: only their size in bytes is of interest.
inline int64_t LayOutWorkspace(ForwardParams* params, char* base) {
  const core::Problem& p = params->problem;
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* part = base == nullptr ? nullptr : base + size;
    size += core::RoundUp<int64_t>(bytes, 256);
    return part;
  };
  if (MayBeShort(p)) {
    PartialResults& partials = params->partials;
    partials.rows = core::Min<int64_t>(p.q_rows, MaxShortRows(p.group));
    partials.splits =
        core::Min<int64_t>(core::CeilDiv<int64_t>(p.kv_rows, kShortestSplit), kMostSplits);
    const int64_t count =
        partials.splits <= 1 ? 0 : p.batch * p.q_heads * partials.rows * partials.splits;
    partials.output = reinterpret_cast<float*>(take(4 * count * p.v_dim));
    partials.maximum = reinterpret_cast<float*>(take(4 * count));
    partials.sum = reinterpret_cast<float*>(take(4 * count));
  }
  if (MayBeLong(p) && p.dtype == core::DType::kF32) {
    const int64_t heads = (core::IsPacked(p) ? 1 : p.batch) * p.kv_heads;
    const int64_t dim = HeadDimBucket(core::Max(p.qk_dim, p.v_dim));
    SplitTensor* const tensors[] = {&params->keys, &params->values};
    for (SplitTensor* tensor : tensors) {
      tensor->planes =
          reinterpret_cast<uint16_t*>(take(heads * PlaneRows(p) * dim * Planes(p.dtype) * 2));
      tensor->flags = reinterpret_cast<uint64_t*>(take(8 * p.batch * p.kv_heads * FlagWords(p)));
    }
  }
  return size;
}

// Kernel parameters are limited to 4 KB before CUDA 12.1's drivers.
static_assert(sizeof(ForwardParams) <= 4096, "ForwardParams no longer fits kernel parameters");

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_PARAMS_H_
