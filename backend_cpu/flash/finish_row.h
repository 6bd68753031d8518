// The end of a row: sink, normalisation, LSE, and the output's type.
#ifndef TANDEM_BACKEND_CPU_FLASH_FINISH_ROW_H_
#define TANDEM_BACKEND_CPU_FLASH_FINISH_ROW_H_

#include "backend_cpu/flash/output.h"
#include "core/problem.h"
#include "core/softmax.h"

namespace tandem::cpu {
namespace {

// Local row i of a head, from its maximum m (or what else the exponentials were measured from), sum
// l, and o, the sum of p v: `columns` floats, a multiple of the vector, aligned; overwritten.
template <class Arch>
TANDEM_ISA_INLINE void FinishRow(const core::Problem& p, const core::Sequence& s, int64_t i,
                                 int64_t head, float m, float l, float* o, int64_t columns) {
  const bool is_empty = core::SoftmaxRowIsEmpty(m, l);
  float rescale = 1.0f;
  if (p.sink != nullptr && core::RowExists(s, i)) {
    core::SoftmaxAddSink(p.sink[head * p.sink_stride], &m, &l, &rescale);
  }
  const float factor =
      rescale * core::SoftmaxInverse(l) * (p.dropout.enabled ? p.dropout.keep_scale : 1.0f);
  for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
    // + 0 turns -0 into +0: an invisible pair adds +0 or -0 by the sign of a value that must not
    // matter.
    const Vector<Arch> x = Vector<Arch>::load_aligned(o + c) + Vector<Arch>(0.0f);
    (is_empty ? Vector<Arch>(0.0f) : x * Vector<Arch>(factor)).store_aligned(o + c);
  }
  StoreRow(p.out.data, p.out.dtype, core::QueryOffset(p.out, s, head, i), p.out.column_stride,
           p.v_dim, o);
  if (p.lse.data != nullptr) {
    core::StoreFloat(p.lse.data, core::DType::kF32, core::QueryOffset(p.lse, s, head, i),
                     core::SoftmaxLse(m, l));
  }
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FLASH_FINISH_ROW_H_
