#include "backend_cuda/backward.h"

#include "backend_cuda/tile_choice.h"
#include "core/softmax.h"

namespace tandem::cuda {
namespace {

using core::DType;
using core::Problem;

// dQ, dK, dV and the sums of `params`.
template <DType kDType, int kHeadDim>
cudaError_t LaunchBothSides(const BackwardParams& params, cudaStream_t stream) {
  const Problem& p = params.problem;
  cudaError_t error = cudaSuccess;
  if (p.dk.data != nullptr || p.dv.data != nullptr || params.key_sums != nullptr) {
    error = LaunchGradients<kDType, kHeadDim>(params, GradientSide::kKeys, stream);
  }
  if (error == cudaSuccess && (p.dq.data != nullptr || params.row_sums != nullptr)) {
    error = LaunchGradients<kDType, kHeadDim>(params, GradientSide::kQueries, stream);
  }
  return error;
}

template <DType kDType, int kHeadDim>
cudaError_t LaunchProducts(const BackwardParams& params, cudaStream_t stream) {
  const Problem& p = params.problem;
  BackwardParams gradients = params;
  gradients.has_slope = 1;
  cudaError_t error = cudaSuccess;
  if (p.softcap > 0.0f && (params.row_sums != nullptr || params.key_sums != nullptr)) {
    // The sums are of dS before the softcap's slope.
    BackwardParams sums = params;
    sums.problem.dq.data = sums.problem.dk.data = sums.problem.dv.data = nullptr;
    error = LaunchBothSides<kDType, kHeadDim>(sums, stream);
    gradients.row_sums = gradients.key_sums = nullptr;
  }
  if (error == cudaSuccess) error = LaunchBothSides<kDType, kHeadDim>(gradients, stream);
  if (error == cudaSuccess && HasBiasMatrix(p)) {
    error = LaunchBiasMatrix<kDType, kHeadDim>(params, stream);
  }
  return error;
}

}  // namespace

bool DeclineBackward(DType dtype, const Problem& problem, core::Text* reason) {
  if (!problem.is_backward) {
    core::Format(reason, "it computes gradients, and none are asked for");
  } else if (problem.dtype != dtype) {
    core::Format(reason, "it takes %s tensors, and q, k and v are %s", core::DTypeName(dtype),
                 core::DTypeName(problem.dtype));
  } else if (problem.has_block_table || problem.has_kv_cache) {
    core::Format(reason, "%s is given, and it has no gradients of paged or packed keys",
                 problem.has_block_table ? "block_table" : "kv_cache");
  } else if (problem.qk_dim > kMaxHeadDim || problem.v_dim > kMaxHeadDim) {
    core::Format(reason, "head dims are 1 to %d, and that of q and k is %lld, that of v is %lld",
                 kMaxHeadDim, static_cast<long long>(problem.qk_dim),
                 static_cast<long long>(problem.v_dim));
  } else {
    return false;
  }
  return true;
}

int64_t BackwardWorkspaceSize(const Problem& problem) {
  BackwardParams params = {};
  params.problem = problem;
  return LayOutBackward(&params, nullptr);
}

cudaError_t LaunchPortableProducts(const BackwardParams& params, cudaStream_t stream) {
  return LaunchForPlanes(params.problem, [&]<DType kDType, int kHeadDim>() {
    return LaunchProducts<kDType, kHeadDim>(params, stream);
  });
}

cudaError_t LaunchBackward(const Problem& problem, void* workspace,
                           ProductsLauncher launch_products, bool reads_tensors,
                           cudaStream_t stream) {
  BackwardParams params = {};
  params.problem = problem;
  char* const base = static_cast<char*>(workspace);
  params.rest = base + LayOutBackward(&params, base);
  const DType math = GradientMath(problem);
  params.is_plain = HasOrdinaryScores(problem) && problem.bias.data == nullptr ? 1 : 0;
  params.reads_tensors = params.is_plain != 0 && reads_tensors ? 1 : 0;
  params.unit = problem.scale * (math == DType::kF32 ? 1.0f : core::kLog2e);
  cudaError_t error = cudaSuccess;
  if (core::IsPacked(problem)) error = LaunchFillGradientGaps(problem, stream);
  // A shard's part of the bias may be smaller than the bias.
  if (error == cudaSuccess && HasBiasMatrix(problem) &&
      (problem.q_rows < problem.global_q_len || problem.kv_rows < problem.global_kv_len)) {
    error = LaunchFillBias(problem, stream);
  }
  if (error == cudaSuccess) error = LaunchPrepareGradients(params, stream);
  if (error == cudaSuccess) error = launch_products(params, stream);
  if (error == cudaSuccess && problem.dv.data != nullptr) {
    error = LaunchMarkNonFinite(params, stream);
  }
  return error == cudaSuccess ? LaunchReduceSums(params, stream) : error;
}

}  // namespace tandem::cuda
