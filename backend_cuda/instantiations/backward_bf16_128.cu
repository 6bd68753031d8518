#include "backend_cuda/backward_launch.cuh"

template cudaError_t tandem::cuda::LaunchGradients<tandem::core::DType::kBF16, 128>(
    tandem::cuda::BackwardParams, tandem::cuda::GradientSide, cudaStream_t);
template cudaError_t tandem::cuda::LaunchBiasMatrix<tandem::core::DType::kBF16, 128>(
    tandem::cuda::BackwardParams, cudaStream_t);
