// The backward pass: its launchers, which only launch. Workspace and params: backward_params.h.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_H_
#define TANDEM_BACKEND_CUDA_BACKWARD_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/backward_params.h"
#include "core/text.h"

namespace tandem::cuda {

// What a backward kernel of one dtype does not serve, as KernelRecord::decline.
bool DeclineBackward(core::DType dtype, const core::Problem& problem, core::Text* reason);
// Bytes of workspace; no data is read.
int64_t BackwardWorkspaceSize(const core::Problem& problem);
// Launches the kernels that multiply, on planes that are prepared.
using ProductsLauncher = cudaError_t (*)(const BackwardParams& params, cudaStream_t stream);
cudaError_t LaunchPortableProducts(const BackwardParams& params, cudaStream_t stream);
// All gradients that the problem asks for. reads_tensors: the launcher's kernels need planes only
// of rows that are not finite or not there.
cudaError_t LaunchBackward(const core::Problem& problem, void* workspace,
                           ProductsLauncher launch_products, bool reads_tensors,
                           cudaStream_t stream);

// launch.operator()<GradientMath, GradientHeadDim>() of a problem's planes.
template <core::DType kDType, typename Launch>
cudaError_t LaunchForHeadDim(const core::Problem& p, Launch launch) {
  switch (GradientHeadDim(core::Max(p.qk_dim, p.v_dim))) {
    case 64:
      return launch.template operator()<kDType, 64>();
    case 128:
      return launch.template operator()<kDType, 128>();
    default:
      return launch.template operator()<kDType, 256>();
  }
}
template <typename Launch>
cudaError_t LaunchForPlanes(const core::Problem& p, Launch launch) {
  switch (GradientMath(p)) {
    case core::DType::kF16:
      return LaunchForHeadDim<core::DType::kF16>(p, launch);
    case core::DType::kBF16:
      return LaunchForHeadDim<core::DType::kBF16>(p, launch);
    default:
      return LaunchForHeadDim<core::DType::kF32>(p, launch);
  }
}

// Parts of it. kDType: GradientMath; kHeadDim: GradientHeadDim(max(Dqk, Dv)).

// dQ, or dK and dV, and the sums that the problem needs of them.
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchGradients(BackwardParams params, GradientSide side, cudaStream_t stream);
// dBias of its own rows and keys.
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBiasMatrix(BackwardParams params, cudaStream_t stream);

// Planes, flags and statistics.
cudaError_t LaunchPrepareGradients(const BackwardParams& params, cudaStream_t stream);
// Zeros for the rows of packed gradients that belong to no sequence.
cudaError_t LaunchFillGradientGaps(const core::Problem& problem, cudaStream_t stream);
// Zeros for dBias.
cudaError_t LaunchFillBias(const core::Problem& problem, cudaStream_t stream);
// NaN in dV where a visible element of dO is not finite.
cudaError_t LaunchMarkNonFinite(const BackwardParams& params, cudaStream_t stream);
// dSink, dALiBi, and dBias where it is broadcast along rows or keys.
cudaError_t LaunchReduceSums(const BackwardParams& params, cudaStream_t stream);

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_H_
