#include "backend_cuda/hopper/fused_backward_launch.h"

#include "backend_cuda/backward.h"
#include "backend_cuda/hopper/backward_launch.h"
#include "backend_cuda/hopper/launch.h"

namespace tandem::cuda::hopper {
namespace {

using core::DType;
using core::Problem;

constexpr int64_t kCounterBytes = 256;  // behind the sums, zeroed with them

int HeadDim(const Problem& p) { return GradientHeadDim(core::Max(p.qk_dim, p.v_dim)); }

bool MakePlaneMaps(const Problem& p, const GradientPlanes& planes, int64_t heads, PlaneMaps* maps) {
  const int64_t rows = (core::IsPacked(p) ? 1 : p.batch) * heads * planes.rows;
  return rows <= INT32_MAX &&
         MakePlaneMap(planes.first, p.dtype, rows, HeadDim(p), kStepRows, &maps->first) &&
         MakePlaneMap(planes.second, p.dtype, rows, HeadDim(p), kStepRows, &maps->second);
}

bool MakeTensorMaps(const Problem& p, PlaneMaps* queries, PlaneMaps* keys) {
  const bool is_packed = core::IsPacked(p);
  const int64_t q_rows = is_packed ? p.q_total : p.q_rows;
  const int64_t kv_rows = is_packed ? p.kv_total : p.kv_rows;
  return MakeTensorMap(p, p.q, p.qk_dim, p.q_heads, q_rows, kStepRows, &queries->first) &&
         MakeTensorMap(p, p.dout, p.v_dim, p.q_heads, q_rows, kStepRows, &queries->second) &&
         MakeTensorMap(p, p.k, p.qk_dim, p.kv_heads, kv_rows, kStepRows, &keys->first) &&
         MakeTensorMap(p, p.v, p.v_dim, p.kv_heads, kv_rows, kStepRows, &keys->second);
}

}  // namespace

bool DeclinesFusedGradients(const Problem& p, core::Text* reason) {
  if (p.deterministic != 0) {
    core::Format(reason,
                 "gradients.deterministic is asked for, and it adds dQ up in no order of its own");
  } else if (p.dq.data == nullptr || (p.dk.data == nullptr && p.dv.data == nullptr)) {
    core::Format(reason, "it computes dq, dk and dv together, and %s asked for",
                 p.dq.data == nullptr ? "dq is not" : "neither dk nor dv is");
  } else if (p.bias.data != nullptr) {
    core::Format(reason, "it serves no bias");
  } else if (GradientMath(p) != p.dtype) {
    core::Format(reason, "it serves dout of q's type, and it is %s", core::DTypeName(p.dout.dtype));
  } else if (NeedsAllTerms(p)) {
    core::Format(reason, "it serves no ALiBi, softcap or dropout");
  } else if (NeedsEveryMask(p)) {
    core::Format(
        reason,
        "beside lengths and dense masks it serves bands, with a prefix only where they have "
        "no left edge");
  } else {
    return DeclinesGradients(p, reason);
  }
  return true;
}

int64_t FusedSumBytes(const Problem& p) {
  BackwardParams params = {};
  params.problem = p;
  LayOutBackward(&params, nullptr);
  const int64_t batch = core::IsPacked(p) ? 1 : p.batch;
  return batch * p.q_heads * params.queries.rows * HeadDim(p) * 4 + kCounterBytes;
}

bool ReadsTensors(const Problem& p) {
  PlaneMaps queries = {};
  PlaneMaps keys = {};
  return MakeTensorMaps(p, &queries, &keys);
}

cudaError_t LaunchFusedProducts(const BackwardParams& base, cudaStream_t stream) {
  const Problem& p = base.problem;
  FusedGradientParams params = {};
  if (base.is_plain == 0 || !MakePlaneMaps(p, base.queries, p.q_heads, &params.queries) ||
      !MakePlaneMaps(p, base.keys, p.kv_heads, &params.keys) ||
      (base.reads_tensors != 0 && !MakeTensorMaps(p, &params.query_tensors, &params.key_tensors))) {
    // Which need planes of all rows.
    return base.reads_tensors == 0 ? LaunchPortableProducts(base, stream)
                                   : cudaErrorInvalidConfiguration;
  }
  params.base = base;
  params.query_sums = reinterpret_cast<float*>(base.rest);
  params.next_block = reinterpret_cast<uint32_t*>(base.rest + FusedSumBytes(p) - kCounterBytes);
  const bool is_64 = HeadDim(p) == 64;
  if (p.dtype == DType::kF16) {
    return is_64 ? LaunchFusedGradients<DType::kF16, 64>(params, stream)
                 : LaunchFusedGradients<DType::kF16, 128>(params, stream);
  }
  return is_64 ? LaunchFusedGradients<DType::kBF16, 64>(params, stream)
               : LaunchFusedGradients<DType::kBF16, 128>(params, stream);
}

}  // namespace tandem::cuda::hopper
