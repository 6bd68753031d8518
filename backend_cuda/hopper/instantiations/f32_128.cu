#include "backend_cuda/hopper/f32_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchF32Forward<128>(
    const tandem::cuda::hopper::F32Params&, cudaStream_t);
