// What the forward and the backward oracle have in common: where rows lie, and the parts of a
// score.
#ifndef TANDEM_TESTS_ORACLE_SCORE_H_
#define TANDEM_TESTS_ORACLE_SCORE_H_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "tests/oracle/tensor.h"
#include "tests/oracle/visibility.h"

namespace tandem::oracle {

struct RowAddress {
  int64_t offset;
  int64_t column_stride;
};

// Row `row` of head `head`; packed tensors have no batch axis and `row` counts from the tensor's
// start.
inline RowAddress AddressOf(tandem_layout layout, const tandem_tensor& t, int64_t b, int64_t head,
                            int64_t row) {
  switch (layout) {
    case TANDEM_LAYOUT_THD:
      return {row * t.strides[0] + head * t.strides[1], t.strides[2]};
    case TANDEM_LAYOUT_BSHD:
      return {b * t.strides[0] + row * t.strides[1] + head * t.strides[2], t.strides[3]};
    default:
      return {b * t.strides[0] + head * t.strides[1] + row * t.strides[2], t.strides[3]};
  }
}

inline bool OverflowsF32(double x) { return !std::isnan(x) && std::isinf(static_cast<float>(x)); }

// <a, b> and sum |a||b|, in four interleaved sums (the latency of one would be most of the time).
inline void Dot(const std::vector<double>& a, const std::vector<double>& b, double* dot,
                double* magnitude) {
  double sum[4] = {};
  double absolute[4] = {};
  for (size_t d = 0; d < a.size(); ++d) {
    const double product = a[d] * b[d];
    sum[d % 4] += product;
    absolute[d % 4] += std::fabs(product);
  }
  *dot = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  *magnitude = (absolute[0] + absolute[1]) + (absolute[2] + absolute[3]);
}

inline double AlibiTerm(const tandem_problem& problem, const SequenceRange& s, int64_t b, int64_t h,
                        int64_t i, int64_t j) {
  const tandem_tensor& slopes = *problem.alibi_slopes;
  const int64_t index =
      slopes.rank == 1 ? h * slopes.strides[0] : b * slopes.strides[0] + h * slopes.strides[1];
  const int64_t query = s.q_offset + i;
  const int64_t d =
      problem.alibi_alignment == TANDEM_ALIGN_BOTTOM_RIGHT ? query + (s.kv_len - s.q_len) : query;
  return LoadReal(slopes, index) * static_cast<double>(std::abs(d - (s.kv_offset + j)));
}

inline double ScaleOf(const tandem_problem& problem, int64_t qk_dim) {
  return problem.has_scale != 0 ? static_cast<double>(problem.scale)
                                : 1.0 / std::sqrt(static_cast<double>(qk_dim));
}

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_SCORE_H_
