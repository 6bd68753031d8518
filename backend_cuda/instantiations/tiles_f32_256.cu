#include "backend_cuda/tile_launch.cuh"

template cudaError_t tandem::cuda::LaunchForwardTiles<tandem::core::DType::kF32, 256>(
    tandem::cuda::ForwardParams, cudaStream_t);
