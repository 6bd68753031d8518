#include "backend_cuda/hopper/backward_launch.h"

#include "backend_cuda/backward.h"
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/tile_choice.h"

namespace tandem::cuda::hopper {
namespace {

using core::DType;
using core::Format;
using core::Problem;

// box_rows: of a copy.
bool MakeMaps(const GradientPlanes& planes, DType dtype, int64_t heads, int columns, int box_rows,
              PlaneMaps* maps) {
  const int64_t rows = core::Max<int64_t>(heads * planes.rows, 1);
  return MakePlaneMap(planes.first, dtype, rows, columns, box_rows, &maps->first) &&
         MakePlaneMap(planes.second, dtype, rows, columns, box_rows, &maps->second);
}

// launch(params, side), for the sides that are asked for.
template <typename Launch>
cudaError_t LaunchSides(GradientParams params, Launch launch) {
  const Problem& p = params.base.problem;
  cudaError_t error = cudaSuccess;
  params.is_dependent = 0;
  if ((p.dk.data != nullptr || p.dv.data != nullptr) && p.batch * p.kv_heads * p.kv_rows > 0) {
    error = launch(params, GradientSide::kKeys);
    params.is_dependent = 1;
  }
  if (error == cudaSuccess && (p.dq.data != nullptr || params.base.row_sums != nullptr)) {
    error = launch(params, GradientSide::kQueries);
  }
  return error;
}

template <DType kDType, int kHeadDim>
cudaError_t LaunchProducts(const GradientParams& params, cudaStream_t stream) {
  const Problem& p = params.base.problem;
  const auto launch = [&](const GradientParams& sides, GradientSide side) {
    if (p.bias.data != nullptr) {
      return LaunchGradients<kDType, kHeadDim, GradientTerms::kBias>(sides, side, stream);
    }
    if (NeedsAllTerms(p)) {
      return LaunchGradients<kDType, kHeadDim, GradientTerms::kAll>(sides, side, stream);
    }
    if (NeedsEveryMask(p)) {
      return LaunchGradients<kDType, kHeadDim, GradientTerms::kMasks>(sides, side, stream);
    }
    return LaunchGradients<kDType, kHeadDim, GradientTerms::kFewest>(sides, side, stream);
  };
  GradientParams gradients = params;
  if (p.softcap > 0.0f && params.base.row_sums != nullptr) {
    // The sums are of dS before the softcap's slope.
    GradientParams sums = params;
    Problem& of_sums = sums.base.problem;
    of_sums.dq.data = of_sums.dk.data = of_sums.dv.data = nullptr;
    const cudaError_t error = LaunchSides(sums, launch);
    if (error != cudaSuccess) return error;
    gradients.base.row_sums = nullptr;
  }
  const cudaError_t error = LaunchSides(gradients, launch);
  if (error != cudaSuccess || !HasBiasMatrix(p)) return error;
  return LaunchBiasGradient<kDType, kHeadDim>(params, stream);
}

template <DType kDType>
cudaError_t LaunchType(const GradientParams& params, int head_dim, cudaStream_t stream) {
  return head_dim == 64 ? LaunchProducts<kDType, 64>(params, stream)
                        : LaunchProducts<kDType, 128>(params, stream);
}

template <int kHeadDim>
cudaError_t LaunchF32(const GradientParams& params, cudaStream_t stream) {
  return LaunchSides(params, [&](const GradientParams& sides, GradientSide side) {
    return NeedsEveryMask(params.base.problem)
               ? LaunchF32Gradients<kHeadDim, true>(sides, side, stream)
               : LaunchF32Gradients<kHeadDim, false>(sides, side, stream);
  });
}

}  // namespace

cudaError_t LaunchSideKernel(const SideKernel& kernel, GradientParams& params,
                             cudaStream_t stream) {
  const Problem& p = params.base.problem;
  const bool keeps_keys = kernel.side == GradientSide::kKeys;
  const int64_t heads = p.batch * (keeps_keys ? p.kv_heads : p.q_heads);
  params.base.blocks = core::CeilDiv<int64_t>(keeps_keys ? p.kv_rows : p.q_rows, kernel.kept_rows);
  const int64_t items = params.base.blocks * heads;
  if (items == 0) return cudaSuccess;
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t head_bytes = (keeps_keys ? p.group * p.q_rows : p.kv_rows) * kernel.row_bytes;
  params.base.section_heads = SectionHeads(p, heads, head_bytes, 1);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(items));
  config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
  config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = params.is_dependent != 0 ? 1 : 0;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, kernel.kernel, arguments);
}

bool NeedsEveryMask(const Problem& p) {
  return !core::SeesIntervals(p.mask) || p.sources.block_sparse_count != 0;
}
bool NeedsAllTerms(const Problem& p) {
  return p.alibi_slopes != nullptr || p.softcap > 0.0f || p.dropout.enabled != 0;
}

bool DeclinesGradients(const Problem& p, core::Text* reason) {
  const bool is_f32 = GradientMath(p) == DType::kF32;
  if (p.qk_dim > kMostHeadDim || p.v_dim > kMostHeadDim) {
    Format(reason, "it serves head dimensions up to %d, and these are %lld (q, k) and %lld (v)",
           kMostHeadDim, static_cast<long long>(p.qk_dim), static_cast<long long>(p.v_dim));
  } else if (NeedsAllTerms(p) && (is_f32 || p.bias.data != nullptr)) {
    Format(reason, "%s it serves no %s", is_f32 ? "in the arithmetic of f32" : "with a bias",
           p.alibi_slopes != nullptr ? "ALiBi"
           : p.softcap > 0.0f        ? "softcap"
                                     : "dropout");
  } else if (p.softcap > 0.0f && !(p.softcap > 1e-30f && p.softcap < 1e30f)) {
    Format(reason, "it serves a softcap between 1e-30 and 1e30, not %g",
           static_cast<double>(p.softcap));
  } else if (p.bias.data != nullptr && is_f32) {
    Format(reason, "in the arithmetic of f32 it serves no bias");
  } else if (p.bias.data != nullptr && DeclinesBias(p, reason)) {
    return true;
  } else if (p.dbias.data != nullptr && !HasBiasMatrix(p)) {
    Format(reason, "it computes no gradient of a bias that is broadcast over rows");
  } else if (p.mask.row_ranges_count != 0) {
    Format(reason, "it serves no row ranges, whose tiles it takes longer to find than to compute");
  } else if (p.mask.segments_count != 0 && !is_f32 && !NeedsAllTerms(p)) {
    Format(reason,
           "in 16 bits it serves segments only with ALiBi, softcap or dropout: their tiles take it "
           "longer to find");
  } else if (NeedsEveryMask(p) && p.bias.data != nullptr) {
    Format(reason,
           "with a bias it serves, beside lengths and dense masks, bands, with a prefix only where "
           "they have no left edge");
  } else if (p.sources.dense_count + (p.mask.dense.words != nullptr) != 0 &&
             p.kv_offset % 64 != 0) {
    Format(reason, "with a dense mask it serves kv_offset that is a multiple of 64, not %lld",
           static_cast<long long>(p.kv_offset));
  } else {
    return false;
  }
  return true;
}

cudaError_t LaunchGradientProducts(const BackwardParams& base, cudaStream_t stream) {
  const Problem& p = base.problem;
  const int head_dim = GradientHeadDim(core::Max(p.qk_dim, p.v_dim));
  const int64_t batch = core::IsPacked(p) ? 1 : p.batch;
  const int64_t most_rows =
      core::Max(batch * p.q_heads * base.queries.rows, batch * p.kv_heads * base.keys.rows);
  const DType math = GradientMath(p);
  const bool is_f32 = math == DType::kF32;
  const int columns = Planes(math) * head_dim;
  const int box_rows = is_f32 ? kF32StepRows : kStepRows;
  GradientParams params;
  if (!HasOrdinaryScale(p) || most_rows > INT32_MAX ||
      !MakeMaps(base.queries, math, batch * p.q_heads, columns, box_rows, &params.queries) ||
      !MakeMaps(base.keys, math, batch * p.kv_heads, columns, box_rows, &params.keys) ||
      (p.bias.data != nullptr && !MakeBiasSource(p, kStepRows, &params.bias))) {
    return LaunchPortableProducts(base, stream);
  }
  params.base = base;
  if (is_f32) {
    return head_dim == 64 ? LaunchF32<64>(params, stream) : LaunchF32<128>(params, stream);
  }
  return math == DType::kF16 ? LaunchType<DType::kF16>(params, head_dim, stream)
                             : LaunchType<DType::kBF16>(params, head_dim, stream);
}

}  // namespace tandem::cuda::hopper
