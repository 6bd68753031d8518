#include "backend_cuda/hopper/forward_launch.cuh"

template cudaError_t tandem::cuda::hopper::LaunchTerms<tandem::core::DType::kBF16, 192>(
    const tandem::cuda::hopper::Params&, cudaStream_t);
