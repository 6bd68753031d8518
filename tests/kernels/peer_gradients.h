// Gradients that other libraries got wrong, by the number of the report (PyTorch's issues unless
// said): each is a case of its own for every kernel, judged by the oracle, and where the report has
// it by the exact value.
#ifndef TANDEM_TESTS_KERNELS_PEER_GRADIENTS_H_
#define TANDEM_TESTS_KERNELS_PEER_GRADIENTS_H_

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/kernels/backward.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {

// Two heads.
inline CaseSpec PeerCase(int64_t q_rows, int64_t kv_rows, int64_t dim) {
  CaseSpec spec;
  spec.q_heads = spec.kv_heads = 2;
  spec.q_rows = q_rows;
  spec.kv_rows = kv_rows;
  spec.qk_dim = spec.v_dim = dim;
  spec.seed = 5;
  return spec;
}

class PeerGradients : public ::testing::TestWithParam<Kernel> {
 protected:
  // Forward, `prepare`, backward, the oracle, and `look`, for each dtype that the kernel serves.
  using Step = std::function<void(BackwardCase&)>;
  static void ForEachType(CaseSpec spec, const Step& prepare, const Step& look = {}) {
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      spec.dtype = dtype;
      if (!MustAcceptBackward(GetParam(), spec)) continue;
      BackwardCase c(spec);
      if (prepare) prepare(c);
      ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
      ASSERT_TRUE(RunBackwardOrDecline(GetParam(), c));
      ExpectGradients(GetParam(), c);
      if (look) look(c);
    }
  }
  static void ExpectFinite(const Tensor& tensor) {
    tensor.ForEach(
        [&](std::span<const int64_t> index) { ASSERT_TRUE(std::isfinite(tensor.Get(index))); });
  }
  static void ExpectAllFinite(BackwardCase& c) {
    for (const Tensor* tensor : {&c.dq(), &c.dk(), &c.dv()}) ExpectFinite(*tensor);
  }
  static bool HasNan(const Tensor& tensor) {
    bool found = false;
    tensor.ForEach(
        [&](std::span<const int64_t> index) { found = found || std::isnan(tensor.Get(index)); });
    return found;
  }
};

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_PEER_GRADIENTS_H_
