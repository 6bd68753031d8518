#include "backend_cuda/hopper/backward_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchGradients<
    tandem::core::DType::kBF16, 64, tandem::cuda::hopper::GradientTerms::kBias>(
    tandem::cuda::hopper::GradientParams, tandem::cuda::GradientSide, cudaStream_t);
template cudaError_t tandem::cuda::hopper::LaunchBiasGradient<tandem::core::DType::kBF16, 64>(
    tandem::cuda::hopper::GradientParams, cudaStream_t);
