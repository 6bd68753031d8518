#include "core/softmax.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <vector>

namespace tandem::core {
namespace {

constexpr float kNan = __builtin_nanf("");
constexpr float kInfinity = __builtin_inff();

// One row of one output column, kept as a kernel keeps it.
struct Online {
  float m = NegativeInfinity();
  float l = 0.0f;
  float sum = 0.0f;

  void Add(float score, float value) {
    const float new_m = MaxKeepNan(m, score);
    const float rescale = SoftmaxRescale(m, new_m);
    const float p = expf(score - SoftmaxReference(new_m));
    l = l * rescale + p;
    sum = sum * rescale + p * value;
    m = new_m;
  }
  float Output() const { return sum * SoftmaxInverse(l); }
  float Lse() const { return SoftmaxLse(m, l); }
};

TEST(SoftmaxSmall, MaximumKeepsNan) {
  EXPECT_EQ(MaxKeepNan(1.0f, 2.0f), 2.0f);
  EXPECT_EQ(MaxKeepNan(-kInfinity, -3.0f), -3.0f);
  EXPECT_EQ(MaxKeepNan(-kInfinity, -kInfinity), -kInfinity);
  EXPECT_TRUE(IsNan(MaxKeepNan(kNan, kInfinity)));
  EXPECT_TRUE(IsNan(MaxKeepNan(-kInfinity, kNan)));
  EXPECT_TRUE(IsNan(MaxKeepNan(kNan, kNan)));
}

TEST(SoftmaxSmall, NothingVisibleIsEmpty) {
  Online row;
  EXPECT_TRUE(SoftmaxRowIsEmpty(row.m, row.l));
  EXPECT_EQ(FloatToBits(row.Output()), 0u);
  EXPECT_EQ(row.Lse(), -kInfinity);
}

TEST(SoftmaxSmall, EveryScoreMinusInfinityIsEmpty) {
  Online row;
  for (int n = 0; n < 3; ++n) row.Add(-kInfinity, 7.0f);
  EXPECT_TRUE(SoftmaxRowIsEmpty(row.m, row.l));
  EXPECT_EQ(FloatToBits(row.Output()), 0u);
  EXPECT_EQ(row.Lse(), -kInfinity);
}

TEST(SoftmaxSmall, LowestFiniteScoresAreOrdinary) {
  Online row;
  for (int n = 0; n < 4; ++n) row.Add(-3.4028234663852886e38f, static_cast<float>(n));
  EXPECT_FALSE(SoftmaxRowIsEmpty(row.m, row.l));
  EXPECT_EQ(row.Output(), 1.5f);
}

TEST(SoftmaxSmall, NanAndInfinityAreNotSwallowed) {
  for (const float bad : {kNan, kInfinity}) {
    for (int place = 0; place < 3; ++place) {
      Online row;
      for (int n = 0; n < 3; ++n) row.Add(n == place ? bad : 1.0f, 2.0f);
      EXPECT_TRUE(IsNan(row.Output())) << bad << place;
      EXPECT_TRUE(IsNan(row.Lse())) << bad << place;
      EXPECT_FALSE(SoftmaxRowIsEmpty(row.m, row.l));
    }
  }
}

TEST(SoftmaxSmall, SinkIsOneMoreScore) {
  Online row;
  for (int n = 0; n < 3; ++n) row.Add(0.5f * static_cast<float>(n), 1.0f);
  for (const float sink : {-50.0f, 0.25f, 3.0f, 80.0f}) {
    float m = row.m, l = row.l, rescale = 0.0f;
    SoftmaxAddSink(sink, &m, &l, &rescale);
    const double total = 1.0 + std::exp(0.5) + std::exp(1.0);
    const double with_sink = total + std::exp(static_cast<double>(sink));
    EXPECT_NEAR(SoftmaxLse(m, l), std::log(with_sink), 1e-5);
    EXPECT_NEAR(row.sum * rescale * SoftmaxInverse(l), total / with_sink, 1e-6);
  }
}

TEST(SoftmaxSmall, SinkAlone) {
  float m = NegativeInfinity(), l = 0.0f, rescale = 1.0f;
  SoftmaxAddSink(1.25f, &m, &l, &rescale);
  EXPECT_EQ(SoftmaxLse(m, l), 1.25f);
  EXPECT_EQ(rescale, 0.0f);
  m = NegativeInfinity(), l = 0.0f;
  SoftmaxAddSink(-kInfinity, &m, &l, &rescale);
  EXPECT_TRUE(SoftmaxRowIsEmpty(m, l));
  SoftmaxAddSink(kNan, &m, &l, &rescale);
  EXPECT_TRUE(IsNan(SoftmaxLse(m, l)));
}

TEST(SoftmaxSmall, MergeWithEmptyChangesNoBit) {
  const float value = BitsToFloat(0xbf123457u), lse = BitsToFloat(0xc2345679u);
  for (const bool empty_first : {true, false}) {
    const MergeWeights w =
        empty_first ? MergePartials(-kInfinity, lse) : MergePartials(lse, -kInfinity);
    // The empty side's output is never looked at.
    const float merged = empty_first ? MergeValue(w, kNan, value) : MergeValue(w, value, kNan);
    EXPECT_EQ(FloatToBits(merged), FloatToBits(value));
    EXPECT_EQ(FloatToBits(w.lse), FloatToBits(lse));
  }
  const MergeWeights both = MergePartials(-kInfinity, -kInfinity);
  EXPECT_EQ(both.lse, -kInfinity);
  EXPECT_EQ(FloatToBits(MergeValue(both, kNan, kNan)), 0u);
}

TEST(SoftmaxSmall, MergeKeepsNan) {
  for (const bool first : {true, false}) {
    const MergeWeights w = first ? MergePartials(kNan, 1.0f) : MergePartials(1.0f, kNan);
    EXPECT_TRUE(IsNan(w.lse));
    EXPECT_TRUE(IsNan(MergeValue(w, 1.0f, 1.0f)));
  }
  EXPECT_TRUE(IsNan(MergePartials(-kInfinity, kNan).lse));
}

std::vector<float> Scores(const std::vector<int>& raw) {
  std::vector<float> scores;
  for (const int n : raw)
    scores.push_back(n % 11 == 0 ? -kInfinity : static_cast<float>(n % 997) * 0.1f);
  return scores;
}

RC_GTEST_PROP(SoftmaxProperty, OnlineEqualsTheDefinition, (const std::vector<int>& raw)) {
  const std::vector<float> scores = Scores(raw);
  Online row;
  double m = -HUGE_VAL;
  for (const float s : scores) m = std::fmax(m, s);
  double l = 0.0, sum = 0.0;
  for (size_t n = 0; n < scores.size(); ++n) {
    const float value = static_cast<float>(n % 5) - 2.0f;
    row.Add(scores[n], value);
    const double p = m == -HUGE_VAL ? 0.0 : std::exp(scores[n] - m);
    l += p;
    sum += p * value;
  }
  if (l == 0.0) {
    RC_ASSERT(FloatToBits(row.Output()) == 0u);
    RC_ASSERT(row.Lse() == -kInfinity);
  } else {
    RC_ASSERT(std::fabs(row.Output() - sum / l) < 1e-5);
    RC_ASSERT(std::fabs(row.Lse() - (m + std::log(l))) < 1e-4);
  }
}

RC_GTEST_PROP(SoftmaxProperty, MergeOfPartsEqualsTheWhole,
              (const std::vector<int>& raw_a, const std::vector<int>& raw_b)) {
  Online whole, a, b;
  for (const auto& [raw, part] : {std::pair(&raw_a, &a), std::pair(&raw_b, &b)}) {
    for (const float s : Scores(*raw)) {
      const float value = std::isinf(s) ? 0.0f : s;
      part->Add(s, value);
      whole.Add(s, value);
    }
  }
  const MergeWeights w = MergePartials(a.Lse(), b.Lse());
  const float merged = MergeValue(w, a.Output(), b.Output());
  if (whole.Lse() == -kInfinity) {
    RC_ASSERT(w.lse == -kInfinity);
    RC_ASSERT(FloatToBits(merged) == 0u);
  } else {
    RC_ASSERT(std::fabs(w.lse - whole.Lse()) < 1e-4);
    RC_ASSERT(std::fabs(merged - whole.Output()) < 2e-3);
  }
}

}  // namespace
}  // namespace tandem::core
