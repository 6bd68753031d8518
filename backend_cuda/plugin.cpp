// The plugin's one exported symbol: the backend "efficient_cuda" as a struct of functions.
#include <cuda_runtime_api.h>

#include "backend_cuda/backward.h"
#include "backend_cuda/device.h"
#include "backend_cuda/hopper/backward_launch.h"
#include "backend_cuda/hopper/f32_launch.h"
#include "backend_cuda/hopper/fused_backward_launch.h"
#include "backend_cuda/hopper/launch.h"
#include "backend_cuda/launch.h"
#include "backend_cuda/policy.h"
#include "core/backend.h"

namespace tandem::cuda {
namespace {

using core::Context;
using core::DType;
using core::Format;
using core::Problem;
using core::Text;

// ---- kernels ----

template <DType kDType>
bool DeclineForward(const Problem& problem, Text* reason) {
  if (problem.is_backward) {
    Format(reason, "it serves the forward pass only");
  } else if (problem.dtype != kDType) {
    Format(reason, "it serves %s, and q is %s", core::DTypeName(kDType),
           core::DTypeName(problem.dtype));
  } else if (problem.qk_dim > kMaxHeadDim || problem.v_dim > kMaxHeadDim) {
    Format(reason, "it serves head dimensions up to %d, and these are %lld (q, k) and %lld (v)",
           kMaxHeadDim, static_cast<long long>(problem.qk_dim),
           static_cast<long long>(problem.v_dim));
  } else if (problem.has_block_table && MayBeLong(problem)) {
    Format(reason, "it serves paged keys and values with up to %lld query rows, and these are %lld",
           static_cast<long long>(MaxShortRows(problem.group)),
           static_cast<long long>(problem.q_rows));
  } else if (problem.has_kv_cache) {
    Format(reason, "key and value caches (kv_cache) are in host memory");
  } else {
    return false;
  }
  return true;
}

int64_t WorkspaceSize(const Problem& problem) {
  ForwardParams params = {};
  params.problem = problem;
  return LayOutWorkspace(&params, nullptr);
}

// What all kernels have in common: the sequences that are short, and rows outside of every packed
// sequence.
template <DType kDType, int kHeadDim>
cudaError_t LaunchShort(const ForwardParams& params, cudaStream_t stream) {
  if (core::IsPacked(params.problem)) {
    const cudaError_t error = LaunchFillGaps(params.problem, stream);
    if (error != cudaSuccess) return error;
  }
  if (!MayBeShort(params.problem)) return cudaSuccess;
  return LaunchForwardShort<kDType, kHeadDim>(params, stream);
}

template <DType kDType, int kHeadDim>
cudaError_t LaunchForward(const ForwardParams& params, cudaStream_t stream) {
  cudaError_t error = LaunchShort<kDType, kHeadDim>(params, stream);
  if (error != cudaSuccess || !MayBeLong(params.problem)) return error;
  if (kDType == DType::kF32) error = LaunchSplitPlanes(params, stream);
  return error != cudaSuccess ? error : LaunchForwardTiles<kDType, kHeadDim>(params, stream);
}

template <DType kDType>
tandem_status RunForward(const Problem& problem, void* workspace, const Context& context) {
  ForwardParams params = {};
  params.problem = problem;
  LayOutWorkspace(&params, static_cast<char*>(workspace));
  return OnDevice(context, "launching the forward pass", [&](cudaStream_t stream) {
    switch (HeadDimBucket(core::Max(problem.qk_dim, problem.v_dim))) {
      case 32:
        return LaunchForward<kDType, 32>(params, stream);
      case 64:
        return LaunchForward<kDType, 64>(params, stream);
      case 128:
        return LaunchForward<kDType, 128>(params, stream);
      default:
        return LaunchForward<kDType, 256>(params, stream);
    }
  });
}

template <DType kDType>
bool DeclineGradients(const Problem& problem, Text* reason) {
  return DeclineBackward(kDType, problem, reason);
}

tandem_status RunBackward(const Problem& problem, void* workspace, const Context& context) {
  return OnDevice(context, "launching the backward pass", [&](cudaStream_t stream) {
    return LaunchBackward(problem, workspace, LaunchPortableProducts, false, stream);
  });
}

// ---- kernels of sm_90a ----

template <DType kDType>
bool DeclineHopper(const Problem& problem, Text* reason) {
  if (DeclineForward<kDType>(problem, reason)) return true;
  if (!problem.has_block_table) return hopper::Declines(problem, reason);
  Format(reason, "paged keys and values are served by the kernels for all GPUs");
  return true;
}

int64_t HopperWorkspaceSize(const Problem& problem) {
  return WorkspaceSize(problem) + (MayBeLong(problem) ? hopper::WorkspaceBytes(problem) : 0);
}

// kHeadDim: of the kernels of short sequences; kBucket: of those of others.
template <DType kDType, int kHeadDim, int kBucket = hopper::ForwardBucket(kHeadDim)>
cudaError_t LaunchHopper(const ForwardParams& shorts, const hopper::Params& params,
                         cudaStream_t stream) {
  const cudaError_t error = LaunchShort<kDType, kHeadDim>(shorts, stream);
  if (error != cudaSuccess || !MayBeLong(shorts.problem)) return error;
  if (shorts.problem.bias.data != nullptr) {
    return hopper::LaunchBias<kDType, kBucket>(params, stream);
  }
  if (shorts.problem.alibi_slopes != nullptr) {
    return hopper::LaunchAlibi<kDType, kBucket>(params, stream);
  }
  if (shorts.problem.softcap > 0.0f || shorts.problem.dropout.enabled != 0) {
    return hopper::LaunchTerms<kDType, kBucket>(params, stream);
  }
  return params.has_words != 0 ? hopper::LaunchWords<kDType, kBucket>(params, stream)
                               : hopper::LaunchForward<kDType, kBucket>(params, stream);
}

template <DType kDType>
tandem_status RunHopper(const Problem& problem, void* workspace, const Context& context) {
  ForwardParams shorts = {};
  shorts.problem = problem;
  char* const own =
      static_cast<char*>(workspace) + LayOutWorkspace(&shorts, static_cast<char*>(workspace));
  hopper::Params params;
  if (!hopper::MakeParams(problem, own, &params)) {
    return RunForward<kDType>(problem, workspace, context);
  }
  return OnDevice(context, "launching the forward pass", [&](cudaStream_t stream) {
    const int64_t dim = core::Max(problem.qk_dim, problem.v_dim);
    switch (HeadDimBucket(dim)) {
      case 32:
        return LaunchHopper<kDType, 32>(shorts, params, stream);
      case 64:
        return LaunchHopper<kDType, 64>(shorts, params, stream);
      case 128:
        return LaunchHopper<kDType, 128>(shorts, params, stream);
      default:
        return hopper::ForwardBucket(dim) == 192
                   ? LaunchHopper<kDType, 256, 192>(shorts, params, stream)
                   : LaunchHopper<kDType, 256>(shorts, params, stream);
    }
  });
}

template <DType kDType>
bool DeclineHopperGradients(const Problem& problem, Text* reason) {
  return DeclineBackward(kDType, problem, reason) || hopper::DeclinesGradients(problem, reason);
}

tandem_status RunHopperBackward(const Problem& problem, void* workspace, const Context& context) {
  return OnDevice(context, "launching the backward pass", [&](cudaStream_t stream) {
    return LaunchBackward(problem, workspace, hopper::LaunchGradientProducts, false, stream);
  });
}

template <DType kDType>
bool DeclineFusedGradients(const Problem& problem, Text* reason) {
  return DeclineBackward(kDType, problem, reason) ||
         hopper::DeclinesFusedGradients(problem, reason);
}

int64_t FusedWorkspaceSize(const Problem& problem) {
  return BackwardWorkspaceSize(problem) + hopper::FusedSumBytes(problem);
}

tandem_status RunFusedBackward(const Problem& problem, void* workspace, const Context& context) {
  return OnDevice(context, "launching the backward pass", [&](cudaStream_t stream) {
    return LaunchBackward(problem, workspace, hopper::LaunchFusedProducts,
                          hopper::ReadsTensors(problem), stream);
  });
}

bool DeclineHopperF32(const Problem& problem, Text* reason) {
  return DeclineForward<DType::kF32>(problem, reason) || hopper::DeclinesF32(problem, reason);
}

template <int kHeadDim>
cudaError_t LaunchHopperF32(const ForwardParams& forward, const hopper::F32Params& params,
                            cudaStream_t stream) {
  cudaError_t error = LaunchShort<DType::kF32, kHeadDim>(forward, stream);
  if (error == cudaSuccess) error = LaunchSplitPlanes(forward, stream);
  if (error != cudaSuccess) return error;
  return hopper::LaunchF32Forward<hopper::HeadDimBucket(kHeadDim)>(params, stream);
}

tandem_status RunHopperF32(const Problem& problem, void* workspace, const Context& context) {
  ForwardParams forward = {};
  forward.problem = problem;
  LayOutWorkspace(&forward, static_cast<char*>(workspace));
  hopper::F32Params params;
  if (!MayBeLong(problem) || !hopper::MakeF32Params(forward, &params)) {
    return RunForward<DType::kF32>(problem, workspace, context);
  }
  return OnDevice(context, "launching the forward pass", [&](cudaStream_t stream) {
    switch (HeadDimBucket(core::Max(problem.qk_dim, problem.v_dim))) {
      case 32:
        return LaunchHopperF32<32>(forward, params, stream);
      case 64:
        return LaunchHopperF32<64>(forward, params, stream);
      default:
        return LaunchHopperF32<128>(forward, params, stream);
    }
  });
}

constexpr const char* kRequirement = "a GPU of compute capability 8.0 or newer";

constexpr const char* kHopperRequirement = "a GPU of compute capability 9.0";

constexpr core::KernelRecord kKernels[] = {
    {"efficient_cuda.sm90.bf16", kFeatureSm90, kHopperRequirement, DeclineHopper<DType::kBF16>,
     HopperWorkspaceSize, RunHopper<DType::kBF16>},
    {"efficient_cuda.sm90.f16", kFeatureSm90, kHopperRequirement, DeclineHopper<DType::kF16>,
     HopperWorkspaceSize, RunHopper<DType::kF16>},
    {"efficient_cuda.sm90.f32", kFeatureSm90, kHopperRequirement, DeclineHopperF32, WorkspaceSize,
     RunHopperF32},
    {"efficient_cuda.sm80.bf16", kFeatureSm80, kRequirement, DeclineForward<DType::kBF16>,
     WorkspaceSize, RunForward<DType::kBF16>},
    {"efficient_cuda.sm80.f16", kFeatureSm80, kRequirement, DeclineForward<DType::kF16>,
     WorkspaceSize, RunForward<DType::kF16>},
    {"efficient_cuda.sm80.f32", kFeatureSm80, kRequirement, DeclineForward<DType::kF32>,
     WorkspaceSize, RunForward<DType::kF32>},
    {"efficient_cuda_backward.sm90_fused.bf16", kFeatureSm90, kHopperRequirement,
     DeclineFusedGradients<DType::kBF16>, FusedWorkspaceSize, RunFusedBackward},
    {"efficient_cuda_backward.sm90_fused.f16", kFeatureSm90, kHopperRequirement,
     DeclineFusedGradients<DType::kF16>, FusedWorkspaceSize, RunFusedBackward},
    {"efficient_cuda_backward.sm90.bf16", kFeatureSm90, kHopperRequirement,
     DeclineHopperGradients<DType::kBF16>, BackwardWorkspaceSize, RunHopperBackward},
    {"efficient_cuda_backward.sm90.f16", kFeatureSm90, kHopperRequirement,
     DeclineHopperGradients<DType::kF16>, BackwardWorkspaceSize, RunHopperBackward},
    {"efficient_cuda_backward.sm90.f32", kFeatureSm90, kHopperRequirement,
     DeclineHopperGradients<DType::kF32>, BackwardWorkspaceSize, RunHopperBackward},
    {"efficient_cuda_backward.sm80.bf16", kFeatureSm80, kRequirement,
     DeclineGradients<DType::kBF16>, BackwardWorkspaceSize, RunBackward},
    {"efficient_cuda_backward.sm80.f16", kFeatureSm80, kRequirement, DeclineGradients<DType::kF16>,
     BackwardWorkspaceSize, RunBackward},
    {"efficient_cuda_backward.sm80.f32", kFeatureSm80, kRequirement, DeclineGradients<DType::kF32>,
     BackwardWorkspaceSize, RunBackward},
};

tandem_status PrepareMask(const Problem& problem, const core::PreparationLayout& layout,
                          void* buffer, const Context& context) {
  return OnDevice(context, "launching the preparation of the mask", [&](cudaStream_t stream) {
    return LaunchPrepareMask(problem, layout, buffer, stream);
  });
}

tandem_status CopyArray(const core::ArrayCopy& copy, const Context& context) {
  return OnDevice(context, "launching a strided copy",
                  [&](cudaStream_t stream) { return LaunchCopyArray(copy, stream); });
}

// ---- memory ----

tandem_status Allocate(int64_t size, void** memory, const Context& context) {
  return OnDevice(context, "allocating memory", [&](cudaStream_t) {
    return cudaMalloc(memory, static_cast<size_t>(core::Max<int64_t>(size, 1)));
  });
}

void Release(void* memory, const Context& context) {
  Context quiet = context;
  quiet.error = nullptr;
  OnDevice(quiet, "releasing memory", [&](cudaStream_t) { return cudaFree(memory); });
}

tandem_status CopyToDevice(void* device, const void* host, int64_t size, const Context& context) {
  return OnDevice(context, "copying to it", [&](cudaStream_t stream) {
    return cudaMemcpyAsync(device, host, static_cast<size_t>(size), cudaMemcpyHostToDevice, stream);
  });
}

tandem_status CopyToHost(void* host, const void* device, int64_t size, const Context& context) {
  return OnDevice(context, "copying from it", [&](cudaStream_t stream) {
    return cudaMemcpyAsync(host, device, static_cast<size_t>(size), cudaMemcpyDeviceToHost, stream);
  });
}

tandem_status Synchronize(const Context& context) {
  return OnDevice(context, "waiting for it",
                  [](cudaStream_t stream) { return cudaStreamSynchronize(stream); });
}

constexpr core::Backend kBackend = {
    core::kBackendAbiVersion,
    sizeof(core::Backend),
    sizeof(Problem),
    TANDEM_DEVICE_CUDA,
    TANDEM_VERSION_STRING,
    "efficient_cuda",
    DeviceCount,
    GetDeviceInfo,
    kKernels,
    sizeof(kKernels) / sizeof(kKernels[0]),
    0,
    PrepareMask,
    CopyArray,
    Allocate,
    Release,
    CopyToDevice,
    CopyToHost,
    Synchronize,
};

}  // namespace
}  // namespace tandem::cuda

extern "C" __attribute__((visibility("default"))) const tandem::core::Backend* tandem_backend_v1() {
  return &tandem::cuda::kBackend;
}
