#include "backend_cuda/tile_launch.cuh"

template cudaError_t tandem::cuda::LaunchForwardTiles<tandem::core::DType::kBF16, 32>(
    tandem::cuda::ForwardParams, cudaStream_t);
