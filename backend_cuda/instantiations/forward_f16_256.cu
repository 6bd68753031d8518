#include "backend_cuda/forward_launch.cuh"

template cudaError_t tandem::cuda::LaunchForward<tandem::core::DType::kF16, 256>(
    const tandem::core::Problem&, cudaStream_t);
