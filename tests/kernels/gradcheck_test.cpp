// Gradients against differences of the forward pass, through the public interface alone: along a
// random direction in each input, the loss sum O dO + sum LSE dLSE changes as the gradient says. O
// and the gradients are f32, whatever the type of q, k and v.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/backward.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

CaseSpec Base(const char* name) {
  CaseSpec spec;
  spec.name = name;
  spec.batch = 2;
  spec.q_heads = 4;
  spec.kv_heads = 2;
  spec.q_rows = 21;
  spec.kv_rows = 70;
  spec.qk_dim = 12;
  spec.v_dim = 9;
  spec.magnitude = 0.7;
  spec.seed = 77;
  return spec;
}

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs = {Base("plain")};
  CaseSpec spec = Base("causal_with_empty_rows");
  spec.q_rows = 80;
  spec.kv_rows = 60;
  spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
  specs.push_back(spec);
  spec = Base("everything");
  spec.terms = {Dense(3), Lengths(true, true)};
  spec.softcap = 2.0f;
  spec.scale = -0.9f;
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.per_batch = false;
  spec.bias.hidden = 0.1;
  spec.alibi_rank = 2;
  spec.sink = true;
  spec.dropout_rate = 0.3f;
  specs.push_back(spec);
  spec = Base("packed");
  spec.layout = TANDEM_LAYOUT_THD;
  spec.q_lens = {21, 0, 7};
  spec.kv_lens = {33, 4, 66};
  spec.packed_tail = 2;
  spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.per_head = spec.bias.per_row = false;
  specs.push_back(spec);
  return specs;
}

class Gradcheck : public ::testing::TestWithParam<std::tuple<Kernel, CaseSpec>> {
 protected:
  static double Loss(BackwardCase& c) {
    EXPECT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
    double loss = 0;
    const auto add = [&](const Tensor& a, const Tensor& b) {
      a.ForEach([&](std::span<const int64_t> index) {
        if (std::isfinite(a.Get(index))) loss += a.Get(index) * b.Get(index);
      });
    };
    add(c.forward().out(), c.dout());
    add(*c.forward().lse(), c.dlse());
    return loss;
  }

  static void RoundToSixteenths(Tensor& input) {
    input.ForEach([&](std::span<const int64_t> index) {
      input.Set(index, std::round(input.Get(index) * 16) / 16);
    });
  }

  void Check(BackwardCase& c, Tensor& input, const Tensor& gradient, const char* name) {
    const bool is_half = c.spec().dtype != TANDEM_DTYPE_F32;
    const double step = is_half ? 1.0 / 16 : 1.0 / 64;
    Random random(5);
    std::vector<double> at, direction;
    double expected = 0, size = 0;
    input.ForEach([&](std::span<const int64_t> index) {
      at.push_back(input.Get(index));
      // Multiples of 1/16, so that the steps are exact enough in f32; in 16 bits they are exact.
      direction.push_back(is_half ? static_cast<double>(random.Below(3) - 1)
                                  : static_cast<double>(random.Below(33) - 16) / 16);
      if (!std::isfinite(at.back())) return;
      expected += gradient.Get(index) * direction.back();
      size += std::fabs(gradient.Get(index) * direction.back());
    });
    const auto loss_at = [&](double step) {
      size_t n = 0;
      input.ForEach([&](std::span<const int64_t> index) {
        input.Set(index, at[n] + step * direction[n]);
        ++n;
      });
      return Loss(c);
    };
    // Central differences with their h^2 term removed.
    const double coarse = (loss_at(2 * step) - loss_at(-2 * step)) / (4 * step);
    const double fine = (loss_at(step) - loss_at(-step)) / (2 * step);
    loss_at(0.0);
    const double rounding = is_half ? 8 : 1;
    EXPECT_NEAR(expected, (4 * fine - coarse) / 3,
                rounding * (2e-3 * std::fabs(expected) + 2e-4 * size + 2e-4))
        << name << ", dtype " << c.spec().dtype;
  }
};

TEST_P(Gradcheck, AgreesWithDifferences) {
  const Kernel& kernel = std::get<0>(GetParam());
  CaseSpec spec = std::get<1>(GetParam());
  spec.out_f32 = true;
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    spec.dtype = dtype;
    if (!MustAcceptBackward(kernel, spec)) continue;
    BackwardCase c(spec);
    Case& f = c.forward();
    if (dtype != TANDEM_DTYPE_F32) {
      for (Tensor* input : {&f.q(), &f.k(), &f.v()}) RoundToSixteenths(*input);
    }
    ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
    ASSERT_TRUE(RunBackwardOrDecline(kernel, c));
    Check(c, f.q(), c.dq(), "q");
    Check(c, f.k(), c.dk(), "k");
    Check(c, f.v(), c.dv(), "v");
    if (f.bias()) Check(c, *f.bias(), *c.dbias(), "bias");
    if (f.sink()) Check(c, *f.sink(), *c.dsink(), "sink");
    if (f.alibi()) Check(c, *f.alibi(), *c.dalibi(), "alibi");
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Gradcheck,
                         ::testing::Combine(::testing::ValuesIn(BackwardKernels()),
                                            ::testing::ValuesIn(Specs())),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
