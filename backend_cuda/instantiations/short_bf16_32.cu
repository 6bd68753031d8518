#include "backend_cuda/short_launch.cuh"

template cudaError_t tandem::cuda::LaunchForwardShort<tandem::core::DType::kBF16, 32>(
    tandem::cuda::ForwardParams, cudaStream_t);
