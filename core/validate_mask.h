// The validator's part for mask terms; used by the other parts of the validator only.
#ifndef TANDEM_CORE_VALIDATE_MASK_H_
#define TANDEM_CORE_VALIDATE_MASK_H_

#include "core/problem.h"
#include "core/tensor_check.h"

namespace tandem::core {

inline constexpr int kMostMaskTerms = 16;

// Finds the packed term (required): batch, cu_seqlens and the longest lengths.
bool PackedSequences(const tandem_problem& in, Checker* check, Problem* p);

// Every other term. Shapes, sequences and shard of `p` are complete.
bool MaskTerms(const tandem_problem& in, Checker* check, Problem* p);

// A tensor broadcastable to [B, Hq, Sq, Sk] (global extents) from rank 2, 3 or 4; strides 0 where
// broadcast.
bool ScoreMatrixStrides(const char* name, const tandem_tensor& tensor, const Problem& p,
                        Checker* check, int64_t* batch_stride, int64_t* head_stride,
                        int64_t* row_stride, int64_t* column_stride);

// An output's memory lies outside every array of the mask terms.
bool DisjointFromTerms(const tandem_problem& in, Checker* check, const char* name,
                       const tandem_tensor& output);

// The prepared mask's size does not overflow.
bool PreparationFits(Checker* check, const Problem& p);

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_MASK_H_
