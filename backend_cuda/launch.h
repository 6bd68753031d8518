// Launchers of the kernels, each in a translation unit of its own. They only launch: no allocation,
// no wait, nothing that a graph capture forbids. The caller has made the stream's device current.
#ifndef TANDEM_BACKEND_CUDA_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/params.h"
#include "core/backend.h"

namespace tandem::cuda {

// An attribute of the current device.
inline cudaError_t GetDeviceAttribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

// Launches a kernel with dynamic shared memory of any size that the device has.
inline cudaError_t LaunchShared(const void* kernel, dim3 grid, int threads, int shared_bytes,
                                void** arguments, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernel(kernel, grid, dim3(threads), arguments, static_cast<size_t>(shared_bytes),
                          stream);
}

// The forward pass of the sequences that are not short, and of those that are. kHeadDim:
// HeadDimBucket(max(Dqk, Dv)). params: problem and workspace are set.
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForwardTiles(ForwardParams params, cudaStream_t stream);
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForwardShort(ForwardParams params, cudaStream_t stream);

// Merges the partial results of short sequences.
cudaError_t LaunchMergeSplits(const ForwardParams& params, cudaStream_t stream);

// Splits the keys and values of f32 problems into planes.
cudaError_t LaunchSplitPlanes(const ForwardParams& params, cudaStream_t stream);

// Writes the rows of packed outputs that belong to no sequence. Before the forward kernel: the
// sequences of hostile cu_seqlens may overlap such rows.
cudaError_t LaunchFillGaps(const core::Problem& problem, cudaStream_t stream);

cudaError_t LaunchPrepareMask(const core::Problem& problem, const core::PreparationLayout& layout,
                              void* buffer, cudaStream_t stream);

cudaError_t LaunchCopyArray(const core::ArrayCopy& copy, cudaStream_t stream);

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_LAUNCH_H_
