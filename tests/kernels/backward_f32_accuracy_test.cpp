// f32 gradients beside an ordinary f32 evaluation of section 6 of docs/semantics.md, for the same O
// and LSE: a wide bound must not hide a poor kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "tests/kernels/backward.h"

namespace tandem::test {
namespace {

// dQ, dK and dV of one head in arithmetic of T, one loop after another.
template <typename T>
std::vector<T> Evaluate(BackwardCase& c) {
  Case& f = c.forward();
  const int64_t rows = c.spec().q_rows, keys = c.spec().kv_rows, dim = c.spec().qk_dim;
  const auto read = [](const Tensor& tensor, int64_t row, int64_t d) {
    return static_cast<T>(tensor.Get({0, 0, row, d}));
  };
  const T scale = 1 / std::sqrt(static_cast<T>(dim));
  std::vector<T> sums(static_cast<size_t>((rows + 2 * keys) * dim), T{0});
  T* dq = sums.data();
  T* dk = dq + rows * dim;
  T* dv = dk + keys * dim;
  for (int64_t i = 0; i < rows; ++i) {
    T d_i = 0;
    for (int64_t d = 0; d < dim; ++d) d_i += read(c.dout(), i, d) * read(f.out(), i, d);
    const T lse = static_cast<T>(f.lse()->Get({0, 0, i}));
    for (int64_t j = 0; j < keys; ++j) {
      T score = 0, dp = 0;
      for (int64_t d = 0; d < dim; ++d) {
        score += read(f.q(), i, d) * read(f.k(), j, d);
        dp += read(c.dout(), i, d) * read(f.v(), j, d);
      }
      const T p = std::exp(scale * score - lse);
      const T ds = scale * p * (dp - d_i);
      for (int64_t d = 0; d < dim; ++d) {
        dq[i * dim + d] += ds * read(f.k(), j, d);
        dk[j * dim + d] += ds * read(f.q(), i, d);
        dv[j * dim + d] += p * read(c.dout(), i, d);
      }
    }
  }
  return sums;
}

struct Expected {
  std::vector<double> exact;
  std::vector<float> plain;
};

// Once for all kernels, since they get the same inputs, O and LSE.
const Expected& ExpectedOf(BackwardCase& c) {
  static std::map<std::pair<double, int64_t>, Expected> known;
  const auto [place, is_new] = known.try_emplace({c.spec().magnitude, c.spec().qk_dim});
  if (is_new) place->second = {Evaluate<double>(c), Evaluate<float>(c)};
  return place->second;
}

class BackwardF32Accuracy : public ::testing::TestWithParam<Kernel> {};

TEST_P(BackwardF32Accuracy, IsThatOfAnOrdinaryEvaluation) {
  for (const double magnitude : {0.3, 1.0, 2.0}) {
    for (const int64_t dim : {int64_t{32}, int64_t{64}, int64_t{128}}) {
      CaseSpec spec;
      spec.q_rows = 97;
      spec.kv_rows = 150;
      spec.qk_dim = spec.v_dim = dim;
      spec.magnitude = magnitude;
      if (!MustAcceptBackward(GetParam(), spec)) return;
      BackwardCase c(spec);
      c.gradients().dlse = nullptr;
      ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
      ASSERT_TRUE(RunBackwardOrDecline(GetParam(), c));
      const auto& [exact, plain] = ExpectedOf(c);
      const Tensor* const ours[] = {&c.dq(), &c.dk(), &c.dv()};
      size_t n = 0;
      for (int g = 0; g < 3; ++g) {
        double our_largest = 0, our_square = 0, largest = 0, square = 0;
        ours[g]->ForEach([&](std::span<const int64_t> index) {
          const double error = std::fabs(ours[g]->Get(index) - exact[n]);
          const double ordinary = std::fabs(static_cast<double>(plain[n]) - exact[n]);
          our_largest = std::max(our_largest, error);
          largest = std::max(largest, ordinary);
          our_square += error * error;
          square += ordinary * ordinary;
          ++n;
        });
        EXPECT_LE(our_largest, 2 * largest) << "gradient " << g << " dim " << dim;
        EXPECT_LE(our_square, 4 * square) << "gradient " << g << " dim " << dim;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, BackwardF32Accuracy, ::testing::ValuesIn(BackwardKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
