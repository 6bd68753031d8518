// What the plugin calls of the f32 kernel of sm_90a.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/hopper/f32_params.h"
#include "core/text.h"

namespace tandem::cuda::hopper {

// Whether the kernel serves the rows of sequences that are not short, with the reason as a sentence
// where it does not. Looks at shapes and terms alone; strides do not matter.
bool DeclinesF32(const core::Problem& problem, core::Text* reason);

// `forward`: problem and workspace are set; LaunchSplitPlanes goes before. False where the scale,
// which no plan knows, is 0 or far from 1.
bool MakeF32Params(const ForwardParams& forward, F32Params* params);

// kHeadDim: HeadDimBucket(max(Dqk, Dv)) of params.h here.
template <int kHeadDim>
cudaError_t LaunchF32Forward(const F32Params& params, cudaStream_t stream);

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_F32_LAUNCH_H_
