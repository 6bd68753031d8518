// What backward.cpp and the plugin call of the sm_90a kernels.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/hopper/backward_params.h"
#include "core/text.h"

namespace tandem::cuda::hopper {

// What only the kernels of every mask serve, and those of all terms.
bool NeedsEveryMask(const core::Problem& problem);
bool NeedsAllTerms(const core::Problem& problem);
// Whether these kernels serve a backward pass that the portable ones serve, with the reason as a
// sentence where they do not. Looks at shapes and terms alone.
bool DeclinesGradients(const core::Problem& problem, core::Text* reason);

// dQ, dK and dV of prepared planes, by LaunchPortableProducts where the scale, which no plan knows,
// is 0 or far from 1.
cudaError_t LaunchGradientProducts(const BackwardParams& params, cudaStream_t stream);

// dQ, or dK and dV. kHeadDim: HeadDimBucket(max(Dqk, Dv)).
template <core::DType kDType, int kHeadDim, GradientTerms kTerms>
cudaError_t LaunchGradients(GradientParams params, GradientSide side, cudaStream_t stream);
// dBias, if it has rows and keys of its own.
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBiasGradient(GradientParams params, cudaStream_t stream);

// dQ, or dK and dV, of planes of f32. kHeadDim: HeadDimBucket(max(Dqk, Dv)).
template <int kHeadDim, bool kEveryMask>
cudaError_t LaunchF32Gradients(GradientParams params, GradientSide side, cudaStream_t stream);

// The kernel of a side. row_bytes: of both tensors that are walked over.
struct SideKernel {
  const void* kernel;
  GradientSide side;
  int kept_rows;
  int row_bytes;
  int threads;
  int shared_bytes;
};
// Launches it; it may begin while that of the other side runs if params.is_dependent.
cudaError_t LaunchSideKernel(const SideKernel& kernel, GradientParams& params, cudaStream_t stream);

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LAUNCH_H_
