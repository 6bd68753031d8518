// The end of a row, the same for every forward kernel: sink, normalisation, output and LSE.
#ifndef TANDEM_BACKEND_CUDA_ROW_OUTPUT_CUH_
#define TANDEM_BACKEND_CUDA_ROW_OUTPUT_CUH_

#include "backend_cuda/tensor_core.cuh"
#include "core/problem.h"
#include "core/softmax.h"

namespace tandem::cuda {

struct RowEnd {
  float factor;   // of the unnormalised output
  bool is_empty;  // the row is +0 and its LSE -inf, whatever was summed
  float maximum;  // with the sink
  float sum;

  // Apart, so that it may be found after the output is on its way.
  __device__ __forceinline__ float Lse() const {
    return is_empty ? core::NegativeInfinity() : core::SoftmaxLse(maximum, sum);
  }
};

// exists: the row is inside its sequence; maximum: natural, of all visible scores; sum: of their
// exponentials.
__device__ __forceinline__ RowEnd FinishRow(const core::Problem& problem, bool exists, int64_t head,
                                            float maximum, float sum) {
  float rescale = 1.0f;
  if (exists && problem.sink != nullptr) {
    core::SoftmaxAddSink(problem.sink[head * problem.sink_stride], &maximum, &sum, &rescale);
  }
  const float keep_scale = problem.dropout.enabled != 0 ? problem.dropout.keep_scale : 1.0f;
  RowEnd end;
  end.is_empty = !exists || core::SoftmaxRowIsEmpty(maximum, sum);
  end.factor = core::SoftmaxInverse(sum) * rescale * keep_scale;
  end.maximum = maximum;
  end.sum = sum;
  return end;
}
__device__ __forceinline__ RowEnd FinishRow(const core::Problem& problem, const core::Sequence& s,
                                            int64_t head, int64_t row, float maximum, float sum) {
  return FinishRow(problem, core::RowExists(s, row), head, maximum, sum);
}

__device__ __forceinline__ void StoreLse(const core::Problem& problem, const core::Sequence& s,
                                         int64_t head, int64_t row, float lse) {
  if (problem.lse.data == nullptr) return;
  static_cast<float*>(problem.lse.data)[core::QueryOffset(problem.lse, s, head, row)] = lse;
}

// One element of the output, already normalised.
__device__ __forceinline__ void StoreOutput(const core::Problem& problem, const core::Sequence& s,
                                            int64_t head, int64_t row, int64_t column,
                                            float value) {
  const core::Array4& out = problem.out;
  StoreElement(out.data, out.dtype,
               core::QueryOffset(out, s, head, row) + column * out.column_stride, value);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_ROW_OUTPUT_CUH_
