// The oracle itself: against published vectors, rows worked out by hand, and damaged outputs.
#include "tests/oracle/oracle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/oracle/compare.h"
#include "tests/oracle/tensor.h"

namespace tandem::oracle {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

tandem_tensor Describe(tandem_dtype dtype, const std::vector<int64_t>& shape, void* data) {
  tandem_tensor t = TANDEM_TENSOR_INIT;
  t.dtype = dtype;
  t.device_type = TANDEM_DEVICE_CPU;
  t.rank = static_cast<int32_t>(shape.size());
  t.data = data;
  int64_t stride = 1;
  for (size_t n = shape.size(); n-- > 0;) {
    t.shape[n] = shape[n];
    t.strides[n] = stride;
    stride *= shape[n];
  }
  return t;
}

// One head, two rows, three keys, one dimension: the scores are q_i k_j.
class SmallProblem : public testing::Test {
 protected:
  SmallProblem() {
    problem_.layout = TANDEM_LAYOUT_BHSD;
    problem_.q = &q_tensor_;
    problem_.k = &k_tensor_;
    problem_.v = &v_tensor_;
    problem_.mask_terms = terms_;
    outputs_.out = &out_tensor_;
    outputs_.lse = &lse_tensor_;
  }

  void Mask(std::vector<uint8_t> visible) {
    visible_ = std::move(visible);
    mask_tensor_ = Describe(TANDEM_DTYPE_BOOL, {2, 3}, visible_.data());
    dense_.mask = &mask_tensor_;
    terms_[0] = &dense_.head;
    problem_.mask_term_count = 1;
  }

  Row Compute(int64_t i) {
    Row row;
    ComputeRow(problem_, SequenceOf(problem_, 0), 0, 0, i, F32Arithmetic(), TANDEM_DTYPE_F32, &row);
    return row;
  }

  // The outputs as the oracle expects them.
  void FillOutputs() {
    for (int64_t i = 0; i < 2; ++i) {
      const Row row = Compute(i);
      out_[i] = static_cast<float>(row.out[0]);
      lse_[i] = static_cast<float>(row.lse);
    }
  }

  float q_[2] = {1, 2};
  float k_[3] = {0, std::log(2.0f), std::log(5.0f)};
  float v_[3] = {8, 16, 32};
  float out_[2] = {};
  float lse_[2] = {};
  tandem_tensor q_tensor_ = Describe(TANDEM_DTYPE_F32, {1, 1, 2, 1}, q_);
  tandem_tensor k_tensor_ = Describe(TANDEM_DTYPE_F32, {1, 1, 3, 1}, k_);
  tandem_tensor v_tensor_ = Describe(TANDEM_DTYPE_F32, {1, 1, 3, 1}, v_);
  tandem_tensor out_tensor_ = Describe(TANDEM_DTYPE_F32, {1, 1, 2, 1}, out_);
  tandem_tensor lse_tensor_ = Describe(TANDEM_DTYPE_F32, {1, 1, 2}, lse_);
  std::vector<uint8_t> visible_;
  tandem_tensor mask_tensor_ = TANDEM_TENSOR_INIT;
  tandem_dense_term dense_ = TANDEM_DENSE_TERM_INIT;
  const tandem_mask_term* terms_[1] = {};
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
};

TEST_F(SmallProblem, RowsWorkedOutByHand) {
  // Weights 1, 2, 5 of 8; then their squares, 1, 4, 25 of 30.
  Row row = Compute(0);
  EXPECT_NEAR(row.out[0], (8 + 2 * 16 + 5 * 32) / 8.0, 1e-5);
  EXPECT_NEAR(row.lse, std::log(8.0), 1e-6);
  row = Compute(1);
  EXPECT_NEAR(row.out[0], (8 + 4 * 16 + 25 * 32) / 30.0, 1e-5);
  EXPECT_EQ(row.visible_keys, 3);
}

TEST_F(SmallProblem, EmptyRows) {
  Mask({0, 0, 0, 1, 0, 1});
  Row row = Compute(0);
  EXPECT_TRUE(row.empty);
  EXPECT_EQ(row.out_expect[0], Expect::kExact);
  EXPECT_EQ(row.lse, -kInfinity);
  row = Compute(1);
  EXPECT_NEAR(row.out[0], (8 + 25 * 32) / 26.0, 1e-5);
  const MaskCount count = CountMask(problem_);
  EXPECT_EQ(count.rows, 2);
  EXPECT_EQ(count.empty_rows, 1);
  EXPECT_EQ(count.visible_pairs, 2);
}

TEST_F(SmallProblem, TheSinkHasWeightAndNoValue) {
  Mask({0, 0, 0, 1, 1, 1});
  float sink[1] = {std::log(2.0f)};
  const tandem_tensor sink_tensor = Describe(TANDEM_DTYPE_F32, {1}, sink);
  problem_.sink = &sink_tensor;
  Row row = Compute(0);
  EXPECT_FALSE(row.empty);
  EXPECT_EQ(row.out_expect[0], Expect::kExact);
  EXPECT_NEAR(row.lse, std::log(2.0), 1e-6);
  row = Compute(1);
  EXPECT_NEAR(row.out[0], (8 + 4 * 16 + 25 * 32) / 32.0, 1e-5);
}

TEST_F(SmallProblem, NonFiniteValuesCountWhereTheyAreSeen) {
  v_[0] = NAN;
  EXPECT_EQ(Compute(0).out_expect[0], Expect::kNan);
  EXPECT_EQ(Compute(0).lse_expect, Expect::kValue);
  Mask({0, 1, 1, 0, 1, 1});
  EXPECT_EQ(Compute(0).out_expect[0], Expect::kValue);
  k_[0] = NAN;
  EXPECT_EQ(Compute(0).lse_expect, Expect::kValue);
  Mask({1, 1, 1, 0, 1, 1});
  EXPECT_EQ(Compute(0).lse_expect, Expect::kNan);
  k_[0] = 0;
  v_[0] = INFINITY;
  EXPECT_EQ(Compute(0).out_expect[0], Expect::kNonFinite);
}

TEST_F(SmallProblem, ABiasOfMinusInfinityHides) {
  float bias[3] = {0, -INFINITY, 0};
  const tandem_tensor bias_tensor = Describe(TANDEM_DTYPE_F32, {1, 3}, bias);
  problem_.bias = &bias_tensor;
  v_[1] = NAN;
  const Row row = Compute(0);
  EXPECT_EQ(row.visible_keys, 2);
  EXPECT_NEAR(row.out[0], (8 + 5 * 32) / 6.0, 1e-5);
}

TEST_F(SmallProblem, OneHugeNegativeBiasLeavesTheBoundUseful) {
  float bias[3] = {0, -std::numeric_limits<float>::max(), 0};
  const tandem_tensor bias_tensor = Describe(TANDEM_DTYPE_F32, {1, 3}, bias);
  problem_.bias = &bias_tensor;
  EXPECT_LT(Compute(0).out_bound[0], 1e-3);
}

TEST_F(SmallProblem, DamageIsSeen) {
  Mask({0, 0, 0, 1, 1, 1});
  FillOutputs();
  EXPECT_TRUE(Compare(problem_, outputs_).InContract());
  EXPECT_EQ(Compare(problem_, outputs_).empty_rows, 1);

  FillOutputs();
  out_[1] += 0.01f;
  EXPECT_FALSE(Compare(problem_, outputs_).InContract());
  FillOutputs();
  lse_[1] += 0.01f;
  EXPECT_FALSE(Compare(problem_, outputs_).InContract());
  FillOutputs();
  out_[1] = NAN;
  EXPECT_EQ(Compare(problem_, outputs_).nonfinite_mismatches, 1);
  FillOutputs();
  out_[0] = -0.0f;
  EXPECT_EQ(Compare(problem_, outputs_).empty_row_mismatches, 1);
  FillOutputs();
  lse_[0] = std::numeric_limits<float>::lowest();
  EXPECT_EQ(Compare(problem_, outputs_).empty_row_mismatches, 1);
}

TEST(Philox, AgreesWithThePublishedVectors) {
  uint32_t result[4];
  const uint32_t zero[4] = {};
  Philox(0, zero, result);
  EXPECT_EQ(result[0], 0x6627e8d5u);
  EXPECT_EQ(result[3], 0x9b00dbd8u);
  const uint32_t pi[4] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
  Philox(0x299f31d0a4093822u, pi, result);
  EXPECT_EQ(result[0], 0xd16cfe09u);
  EXPECT_EQ(result[3], 0x24126ea1u);
}

TEST(Conversions, OfHalves) {
  EXPECT_EQ(HalfToDouble(0x3c00), 1.0);
  EXPECT_EQ(HalfToDouble(0xc000), -2.0);
  EXPECT_EQ(HalfToDouble(0x7bff), 65504.0);
  EXPECT_EQ(HalfToDouble(0x0001), 0x1p-24);
  EXPECT_EQ(HalfToDouble(0xfc00), -kInfinity);
  EXPECT_TRUE(std::isnan(HalfToDouble(0x7e00)));
  EXPECT_EQ(Bfloat16ToDouble(0x3f80), 1.0);
  EXPECT_EQ(Bfloat16ToDouble(0xff80), -kInfinity);
}

}  // namespace
}  // namespace tandem::oracle
