#include "backend_cuda/hopper/backward_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchGradients<
    tandem::core::DType::kBF16, 128, tandem::cuda::hopper::GradientTerms::kFewest>(
    tandem::cuda::hopper::GradientParams, tandem::cuda::GradientSide, cudaStream_t);
