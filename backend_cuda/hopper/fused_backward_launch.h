// What the plugin calls of the fused backward kernels of sm_90a.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/hopper/fused_backward_params.h"
#include "core/text.h"

namespace tandem::cuda::hopper {

// Whether these kernels serve a backward pass that those of backward_launch.h serve, with the
// reason as a sentence where they do not. Looks at shapes and terms alone.
bool DeclinesFusedGradients(const core::Problem& problem, core::Text* reason);

// Bytes of workspace behind that of the portable kernels.
int64_t FusedSumBytes(const core::Problem& problem);

// Whether they can read the tensors themselves.
bool ReadsTensors(const core::Problem& problem);

// dQ, dK and dV of prepared planes, by LaunchPortableProducts where the scale, which no plan knows,
// is 0 or far from 1.
cudaError_t LaunchFusedProducts(const BackwardParams& params, cudaStream_t stream);

// kHeadDim: HeadDimBucket(max(Dqk, Dv)).
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchFusedGradients(FusedGradientParams params, cudaStream_t stream);

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_LAUNCH_H_
