// f32 kernels stay within twice the error of an ordinary f32 evaluation of the same problem, so
// that a wide bound cannot hide a poor kernel (docs/semantics.md section 7).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <vector>

#include "tests/support/kernels.h"

namespace tandem::test {
namespace {

// One row of attention, every operation in T.
template <typename T>
std::vector<T> Row(Case& source, int64_t head, int64_t i) {
  const CaseSpec& spec = source.spec();
  const T scale = T{1} / std::sqrt(static_cast<T>(spec.qk_dim));
  std::vector<T> p(static_cast<size_t>(spec.kv_rows));
  T largest = -INFINITY;
  for (int64_t j = 0; j < spec.kv_rows; ++j) {
    T dot = 0;
    for (int64_t d = 0; d < spec.qk_dim; ++d) {
      dot += static_cast<T>(source.q().Get(source.QueryIndex(0, head, i, d))) *
             static_cast<T>(source.k().Get(source.KeyIndex(0, head, j, d)));
    }
    p[j] = dot * scale;
    largest = std::max(largest, p[j]);
  }
  T sum = 0;
  for (T& x : p) sum += x = std::exp(x - largest);
  std::vector<T> out(static_cast<size_t>(spec.v_dim));
  for (int64_t d = 0; d < spec.v_dim; ++d) {
    T value = 0;
    for (int64_t j = 0; j < spec.kv_rows; ++j) {
      value += p[j] * static_cast<T>(source.v().Get(source.KeyIndex(0, head, j, d)));
    }
    out[d] = value / sum;
  }
  return out;
}

struct Expected {
  std::vector<double> exact;
  std::vector<float> plain;
};

// All rows of all heads; once for all kernels, since they get the same inputs.
const Expected& ExpectedOf(Case& source) {
  static std::map<std::tuple<double, int64_t, int64_t>, Expected> known;
  const CaseSpec& spec = source.spec();
  const auto [place, is_new] = known.try_emplace({spec.magnitude, spec.qk_dim, spec.kv_rows});
  Expected& expected = place->second;
  if (!is_new) return expected;
  for (int64_t head = 0; head < spec.q_heads; ++head) {
    for (int64_t i = 0; i < spec.q_rows; ++i) {
      const std::vector<double> exact = Row<double>(source, head, i);
      const std::vector<float> plain = Row<float>(source, head, i);
      expected.exact.insert(expected.exact.end(), exact.begin(), exact.end());
      expected.plain.insert(expected.plain.end(), plain.begin(), plain.end());
    }
  }
  return expected;
}

struct Errors {
  double largest = 0;
  double mean_square = 0;
  void Add(double error) {
    largest = std::max(largest, std::fabs(error));
    mean_square += error * error;
  }
};

class F32Accuracy : public ::testing::TestWithParam<Kernel> {};

void Measure(const Kernel& kernel, const CaseSpec& spec, Errors* ours, Errors* ordinary) {
  Case source(spec);
  ASSERT_EQ(RunKernel(kernel, source), TANDEM_STATUS_OK) << tandem_last_error();
  const Expected& expected = ExpectedOf(source);
  size_t n = 0;
  for (int64_t head = 0; head < spec.q_heads; ++head) {
    for (int64_t i = 0; i < spec.q_rows; ++i) {
      for (int64_t d = 0; d < spec.v_dim; ++d, ++n) {
        const double exact = expected.exact[n];
        ours->Add(source.out().Get(source.QueryIndex(0, head, i, d)) - exact);
        ordinary->Add(static_cast<double>(expected.plain[n]) - exact);
      }
    }
  }
}

CaseSpec AccuracySpec(int64_t q_rows, int64_t kv_rows, int64_t dim, double magnitude) {
  CaseSpec spec;
  spec.q_heads = spec.kv_heads = 2;
  spec.q_rows = q_rows;
  spec.kv_rows = kv_rows;
  spec.qk_dim = spec.v_dim = dim;
  spec.magnitude = magnitude;
  return spec;
}

// Sums over many keys are made of sums over parts of them.
TEST_P(F32Accuracy, GrowsLessThanAnOrdinarySum) {
  Errors ours, ordinary;
  Measure(GetParam(), AccuracySpec(24, 4096, 64, 0.3), &ours, &ordinary);
  EXPECT_LE(ours.mean_square, 0.25 * ordinary.mean_square);
}

TEST_P(F32Accuracy, IsThatOfAnOrdinaryEvaluation) {
  for (const double magnitude : {0.3, 1.0, 4.0}) {
    for (const int64_t dim : {int64_t{32}, int64_t{64}, int64_t{128}}) {
      Errors ours, ordinary;
      Measure(GetParam(), AccuracySpec(24, 333, dim, magnitude), &ours, &ordinary);
      EXPECT_LE(ours.largest, 2 * ordinary.largest) << "magnitude " << magnitude << " dim " << dim;
      EXPECT_LE(ours.mean_square, 4 * ordinary.mean_square)
          << "magnitude " << magnitude << " dim " << dim;
    }
  }
}

std::vector<Kernel> F32Kernels() {
  std::vector<Kernel> kernels = ForwardKernels();
  std::erase_if(kernels, [](const Kernel& kernel) {
    return kernel.name.ends_with("f16");  // bf16 too
  });
  return kernels;
}

INSTANTIATE_TEST_SUITE_P(Kernels, F32Accuracy, ::testing::ValuesIn(F32Kernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
