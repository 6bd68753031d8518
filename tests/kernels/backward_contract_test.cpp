// Gradients and what must not matter: whatever lies at invisible places of q, k, v, bias, O, dO,
// LSE and dLSE changes no bit; a NaN that is seen shows where it is seen; memory beside the tensors
// is not touched.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/kernels/backward.h"
#include "tests/kernels/case_table.h"
#include "tests/kernels/poison.h"

namespace tandem::test {
namespace {

using Parameter = std::tuple<Kernel, CaseSpec>;
class BackwardPoison : public ::testing::TestWithParam<Parameter> {
 protected:
  const Kernel& kernel() const { return std::get<0>(GetParam()); }
  // The dtypes that the kernel serves.
  std::vector<CaseSpec> Specs() const {
    std::vector<CaseSpec> specs;
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      CaseSpec spec = std::get<1>(GetParam());
      spec.dtype = dtype;
      if (MustAcceptBackward(kernel(), spec)) specs.push_back(spec);
    }
    return specs;
  }
};

// O, dO, LSE and dLSE of the rows that see nothing, not even a sink, and of rows of no sequence.
void PoisonEmptyRows(BackwardCase& problem, const Invisible& invisible, int kind) {
  Case& c = problem.forward();
  Random random(static_cast<uint64_t>(kind) + 9);
  std::vector<bool> used(static_cast<size_t>(c.out().Count()), false);
  std::vector<bool> lse_used(static_cast<size_t>(c.lse()->Count()), false);
  for (int64_t b = 0; b < c.batch(); ++b) {
    for (int64_t h = 0; h < c.spec().q_heads; ++h) {
      for (int64_t i = 0; i < c.sequence(b).q_rows; ++i) {
        const bool sees =
            invisible.query_is_needed[Invisible::FlatRow(c.q(), c.QueryIndex(b, h, i, 0))] ||
            (c.sink() && c.RowExists(b, i));
        if (!sees) continue;
        used[Invisible::FlatRow(c.out(), c.QueryIndex(b, h, i, 0))] = true;
        lse_used[Invisible::Flat(*c.lse(), c.LseIndex(b, h, i))] = true;
      }
    }
  }
  for (Tensor* tensor : {&c.out(), &problem.dout()}) {
    tensor->ForEach([&](std::span<const int64_t> index) {
      if (!used[Invisible::FlatRow(*tensor, index)]) tensor->Set(index, Poison(kind, random));
    });
  }
  for (Tensor* tensor : {&*c.lse(), &problem.dlse()}) {
    tensor->ForEach([&](std::span<const int64_t> index) {
      if (!lse_used[Invisible::Flat(*tensor, index)]) tensor->Set(index, Poison(kind, random));
    });
  }
}

TEST_P(BackwardPoison, InvisiblePlacesChangeNoBit) {
  for (const CaseSpec& spec : Specs()) {
    BackwardCase c(spec);
    ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
    ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
    const std::vector<uint8_t> clean = c.GradientBytes();
    const Invisible invisible(c.forward());
    for (int kind = 0; kind < kPoisonKinds; ++kind) {
      PoisonInvisible(c.forward(), invisible, kind);
      PoisonEmptyRows(c, invisible, kind);
      ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
      EXPECT_EQ(c.GradientBytes(), clean) << "kind of poison " << kind << ", dtype " << spec.dtype;
    }
  }
}

std::vector<float> Values(const Tensor& tensor) {
  std::vector<float> values;
  tensor.ForEach([&](std::span<const int64_t> index) {
    values.push_back(static_cast<float>(tensor.Get(index)));
  });
  return values;
}

// One NaN in q, k, v or dO: the oracle says where it must show, and everywhere else no bit changes.
TEST_P(BackwardPoison, VisibleNanShowsWhereItIsSeen) {
  for (CaseSpec spec : Specs()) {
    spec.dropout_rate = 0.0f;  // a dropped pair need not show what it would have added
    Random random(spec.seed + 3);
    for (int part = 0; part < 4; ++part) {
      BackwardCase c(spec);
      ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
      ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
      std::vector<float> clean[3] = {Values(c.dq()), Values(c.dk()), Values(c.dv())};
      Tensor* inputs[] = {&c.forward().q(), &c.forward().k(), &c.forward().v(), &c.dout()};
      Tensor& tensor = *inputs[part];
      std::vector<int64_t> place;
      for (const int64_t extent : tensor.shape()) place.push_back(random.Below(extent));
      tensor.Set(place, NAN);
      ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
      ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
      ExpectGradients(kernel(), c);
      const std::vector<float> now[3] = {Values(c.dq()), Values(c.dk()), Values(c.dv())};
      for (int g = 0; g < 3; ++g) {
        for (size_t n = 0; n < clean[g].size(); ++n) {
          if (!std::isfinite(now[g][n])) continue;
          ASSERT_EQ(std::memcmp(&now[g][n], &clean[g][n], sizeof(float)), 0)
              << "NaN in input " << part << ", gradient " << g << ", element " << n;
        }
      }
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Terms, BackwardPoison,
                         ::testing::Combine(::testing::ValuesIn(BackwardKernels()),
                                            ::testing::ValuesIn(PoisonSpecs())),
                         KernelAndCaseName());

// Elements so small that matrix units take them for 0, times elements so large that the products
// count.
TEST_P(BackwardPoison, TinyTimesHugeCounts) {
  for (CaseSpec spec : Specs()) {
    const bool is_f16 = spec.dtype == TANDEM_DTYPE_F16;
    const double huge = is_f16 ? 1e4 : 1e37, tiny = is_f16 ? 1e-6 : 1e-38;
    BackwardCase c(spec);
    const auto scale_first_column = [](Tensor& tensor, double factor) {
      tensor.ForEach([&](std::span<const int64_t> index) {
        if (index.back() == 0) tensor.Set(index, tensor.Get(index) * factor);
      });
    };
    scale_first_column(c.forward().q(), huge);
    scale_first_column(c.forward().k(), tiny);
    scale_first_column(c.dout(), huge);
    scale_first_column(c.forward().v(), tiny);
    ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
    ASSERT_TRUE(RunBackwardOrDecline(kernel(), c));
    ExpectGradients(kernel(), c);
    if (HasFailure()) return;
  }
}

std::vector<CaseSpec> GuardSpecs() {
  std::vector<CaseSpec> specs = CasesWithEdges();
  specs.push_back(
      SizedCase("lengths", TANDEM_LAYOUT_BHSD, 66, 131, 8, 8, {Lengths(true, true), Dense(4)}, 60));
  specs.push_back(SizedCase("bias", TANDEM_LAYOUT_BHSD, 66, 131, 40, 40, {}, 61));
  specs.back().bias.dtype = TANDEM_DTYPE_F16;
  specs.back().sink = true;
  specs.back().alibi_rank = 1;
  return specs;
}

class BackwardGuard : public ::testing::TestWithParam<Parameter> {};

TEST_P(BackwardGuard, NothingBesideTheTensorsIsTouched) {
  const auto& [kernel, given] = GetParam();
  for (const Placement placement : {Placement::kGuardBefore, Placement::kGuardAfter}) {
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      CaseSpec spec = given;
      spec.dtype = dtype;
      spec.placement = placement;
      if (MustAcceptBackward(kernel, spec)) CheckBackward(kernel, spec);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Placements, BackwardGuard,
                         ::testing::Combine(::testing::ValuesIn(BackwardKernels()),
                                            ::testing::ValuesIn(GuardSpecs())),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
