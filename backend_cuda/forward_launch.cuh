// The launchers of one forward variant; backend_cuda/instantiations/ has a line for each.
#ifndef TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_
#define TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_

#include "backend_cuda/launch.h"

namespace tandem::cuda {

// Whether rows of a 16-bit tensor can be copied by aligned chunks of 16 bytes.
inline bool HasChunks(const core::Array4& array, int64_t dim) {
  const int64_t strides = array.batch_stride | array.head_stride | array.row_stride;
  return array.column_stride == 1 && dim % 8 == 0 && strides % 8 == 0 &&
         reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
}

// And whether those of the keys and values of a problem can.
inline bool HasKeyChunks(const core::Problem& p) {
  return HasChunks(p.k, p.qk_dim) && HasChunks(p.v, p.v_dim);
}

// Launches params.items blocks, fewer than 2^31: their outputs alone would take terabytes.
inline cudaError_t LaunchItems(const void* kernel, ForwardParams& params, int threads,
                               int shared_bytes, cudaStream_t stream) {
  if (params.items == 0) return cudaSuccess;
  if (params.items > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&params};
  return LaunchShared(kernel, dim3(static_cast<unsigned>(params.items)), threads, shared_bytes,
                      arguments, stream);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_FORWARD_LAUNCH_CUH_
