// What the plugin calls of the sm_90a kernels.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_LAUNCH_H_
#define TANDEM_BACKEND_CUDA_HOPPER_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "backend_cuda/hopper/params.h"
#include "core/text.h"

namespace tandem::cuda::hopper {

// Whether these kernels serve the rows of sequences that are not short, with the reason as a
// sentence where they do not. Looks at shapes, strides and terms alone.
bool Declines(const core::Problem& problem, core::Text* reason);

// In bytes.
int64_t WorkspaceBytes(const core::Problem& problem);

// False where a pointer or the scale, which no plan knows, is not one that these kernels serve: an
// address that is no multiple of 16, a scale that is 0 or far from 1, a softcap beyond 256.
bool MakeParams(const core::Problem& problem, void* workspace, Params* params);

// Whether these kernels do not serve a bias that there is.
bool DeclinesBias(const core::Problem& problem, core::Text* reason);
// Its map, in boxes of `box_rows` rows, or of one where it is broadcast over rows; false where
// there is none.
bool MakeBiasSource(const core::Problem& problem, int box_rows, BiasSource* bias);

// Maps of K and V for reading them once, in boxes of `box_rows` rows and 64 columns; false where
// there are none. Without promotion in the L2: it costs a twelfth of the memory's rate there.
bool MakeStreamMaps(const core::Problem& problem, int box_rows, CUtensorMap* keys,
                    CUtensorMap* values);

// A map of contiguous rows of 16-bit elements, in boxes of `box_rows` rows and 64 columns; false
// where there is none.
bool MakePlaneMap(void* data, core::DType dtype, int64_t rows, int columns, int box_rows,
                  CUtensorMap* map);

// A map of q, k, v or a tensor of their shape, in boxes of `box_rows` rows and 64 columns; false
// where its address or strides allow none.
bool MakeTensorMap(const core::Problem& problem, const core::Array4& array, int64_t dim,
                   int64_t heads, int64_t rows, int box_rows, CUtensorMap* map);

// Fills the queue, where there is one: to be launched before the kernels, which wait for it.
cudaError_t LaunchFillQueue(const Params& params, cudaStream_t stream);

// One of these serves a problem: LaunchBias, LaunchAlibi or LaunchTerms (softcap and dropout) where
// there is such a term, else LaunchWords where params.has_words, else LaunchForward. kHeadDim:
// ForwardBucket(max(Dqk, Dv)).
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchForward(const Params& params, cudaStream_t stream);
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchWords(const Params& params, cudaStream_t stream);
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchBias(const Params& params, cudaStream_t stream);
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchAlibi(const Params& params, cudaStream_t stream);
template <core::DType kDType, int kHeadDim>
cudaError_t LaunchTerms(const Params& params, cudaStream_t stream);

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_LAUNCH_H_
