#include "backend_cuda/hopper/backward_f32_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchF32Gradients<64, false>(
    tandem::cuda::hopper::GradientParams, tandem::cuda::GradientSide, cudaStream_t);
