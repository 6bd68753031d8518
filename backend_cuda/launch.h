// Launchers of the kernels, each in a translation unit of its own. They only launch: no allocation,
// no wait, nothing that a graph capture forbids. The caller has made the stream's device current.
#ifndef TANDEM_BACKEND_CUDA_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"

namespace tandem::cuda {

// One (batch, head, row block) triple per thread block. kHeadDim: HeadDimBucket(max(Dqk, Dv)).
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForward(const core::Problem& problem, cudaStream_t stream);

// Writes the rows of packed outputs that belong to no sequence. Before the forward kernel: the
// sequences of hostile cu_seqlens may overlap such rows.
cudaError_t LaunchFillGaps(const core::Problem& problem, cudaStream_t stream);

cudaError_t LaunchPrepareMask(const core::Problem& problem, const core::PreparationLayout& layout,
                              void* buffer, cudaStream_t stream);

cudaError_t LaunchCopyArray(const core::ArrayCopy& copy, cudaStream_t stream);

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_LAUNCH_H_
