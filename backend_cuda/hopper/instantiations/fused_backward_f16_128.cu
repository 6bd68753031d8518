#include "backend_cuda/hopper/fused_backward_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchFusedGradients<tandem::core::DType::kF16, 128>(
    tandem::cuda::hopper::FusedGradientParams, cudaStream_t);
