// The oracle of the backward pass: against finite differences of the forward oracle, in f64, and
// against damaged gradients.
#include "tests/oracle/gradient.h"

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <functional>
#include <vector>

#include "tests/oracle/tensor.h"

namespace tandem::oracle {
namespace {

// A contiguous f64 array of the given shape with repeatable values in [-1, 1].
struct Array {
  explicit Array(std::vector<int64_t> shape, uint64_t seed) {
    tensor = TANDEM_TENSOR_INIT;
    tensor.dtype = TANDEM_DTYPE_F64;
    tensor.device_type = TANDEM_DEVICE_CPU;
    tensor.rank = static_cast<int32_t>(shape.size());
    int64_t count = 1;
    for (size_t n = shape.size(); n-- > 0;) {
      tensor.shape[n] = shape[n];
      tensor.strides[n] = count;
      count *= shape[n];
    }
    for (int64_t n = 0; n < count; ++n) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      data.push_back(static_cast<double>(static_cast<int64_t>(seed >> 33)) / 0x1p30 - 1.0);
    }
    tensor.data = data.data();
  }
  Array(const Array&) = delete;
  std::vector<double> data;
  tandem_tensor tensor;
};

// Two sequences, four query heads on two key heads, causal from the bottom right: the first rows
// are empty. Every term of the scores is there.
class Everything : public testing::Test {
 protected:
  Everything() {
    problem_.layout = TANDEM_LAYOUT_BHSD;
    problem_.q = &q_.tensor;
    problem_.k = &k_.tensor;
    problem_.v = &v_.tensor;
    problem_.has_scale = 1;
    problem_.scale = -0.8f;
    problem_.softcap = 1.5f;
    problem_.bias = &bias_.tensor;
    problem_.alibi_slopes = &slopes_.tensor;
    problem_.alibi_alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
    problem_.sink = &sink_.tensor;
    problem_.dropout_rate = 0.25f;
    problem_.dropout_seed = 7;
    band_.alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
    band_.right = 0;
    terms_[0] = &band_.head;
    problem_.mask_terms = terms_;
    problem_.mask_term_count = 1;
    bias_.data[3] = -INFINITY;
    outputs_.out = &out_.tensor;
    outputs_.lse = &lse_.tensor;
    gradients_.dout = &dout_.tensor;
    gradients_.dlse = &dlse_.tensor;
  }

  // O and LSE, and the loss sum O dO + sum LSE dLSE over rows that are not empty.
  double Forward() {
    double loss = 0;
    Row row;
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t i = 0; i < kRows; ++i) {
          ComputeRow(problem_, SequenceOf(problem_, b), b, h, i, F32Arithmetic(), TANDEM_DTYPE_F32,
                     &row);
          const size_t place = static_cast<size_t>((b * kHeads + h) * kRows + i);
          lse_.data[place] = row.lse;
          if (!row.empty) loss += row.lse * dlse_.data[place];
          for (size_t c = 0; c < kDv; ++c) {
            out_.data[place * kDv + c] = row.out[c];
            loss += row.out[c] * dout_.data[place * kDv + c];
          }
        }
      }
    }
    return loss;
  }

  // d loss / d x, with all other elements as they are.
  double Difference(double* x) {
    constexpr double kStep = 1e-5;
    const double at = *x;
    *x = at + kStep;
    const double above = Forward();
    *x = at - kStep;
    const double below = Forward();
    *x = at;
    return (above - below) / (2 * kStep);
  }

  // Fills a gradient by finite differences and holds it against the oracle.
  void Check(Array* input, const tandem_tensor* tandem_gradients::*slot) {
    Array gradient(
        std::vector<int64_t>(input->tensor.shape, input->tensor.shape + input->tensor.rank), 1);
    for (size_t n = 0; n < gradient.data.size(); ++n) {
      gradient.data[n] = std::isinf(input->data[n]) ? 0.0 : Difference(&input->data[n]);
      if (std::fabs(gradient.data[n]) < 1e-9) gradient.data[n] = 0.0;
    }
    Forward();
    gradients_.*slot = &gradient.tensor;
    const GradientResults results = CompareGradients(problem_, outputs_, gradients_);
    EXPECT_TRUE(results.InContract()) << results.Worst();
    EXPECT_TRUE(results.Total().compared);
    EXPECT_LT(results.Total().max_error, 1e-8) << results.Worst();
    // A gradient that is off is seen.
    for (double& x : gradient.data) x *= 1.001;
    EXPECT_FALSE(CompareGradients(problem_, outputs_, gradients_).InContract());
    gradients_.*slot = nullptr;
  }

  static constexpr int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kRows = 5, kKeys = 4, kDqk = 3;
  static constexpr size_t kDv = 2;
  Array q_{{kBatch, kHeads, kRows, kDqk}, 1}, k_{{kBatch, kKvHeads, kKeys, kDqk}, 2},
      v_{{kBatch, kKvHeads, kKeys, kDv}, 3}, bias_{{1, kHeads, kRows, kKeys}, 4},
      slopes_{{kBatch, kHeads}, 5}, sink_{{kHeads}, 6}, out_{{kBatch, kHeads, kRows, kDv}, 7},
      lse_{{kBatch, kHeads, kRows}, 8}, dout_{{kBatch, kHeads, kRows, kDv}, 9},
      dlse_{{kBatch, kHeads, kRows}, 10};
  tandem_band_term band_ = TANDEM_BAND_TERM_INIT;
  const tandem_mask_term* terms_[1];
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
  tandem_gradients gradients_ = TANDEM_GRADIENTS_INIT;
};

TEST_F(Everything, AgreesWithFiniteDifferences) {
  Check(&q_, &tandem_gradients::dq);
  Check(&k_, &tandem_gradients::dk);
  Check(&v_, &tandem_gradients::dv);
  Check(&bias_, &tandem_gradients::dbias);
  Check(&sink_, &tandem_gradients::dsink);
  Check(&slopes_, &tandem_gradients::dalibi);
}

TEST_F(Everything, EmptyRowsHaveNoGradientWhateverTheyHold) {
  problem_.sink = nullptr;
  Forward();
  const double poison = NAN;
  for (int64_t plane = 0; plane < kBatch * kHeads; ++plane) {  // row 0 is before the first key
    const size_t row = static_cast<size_t>(plane * kRows);
    lse_.data[row] = dlse_.data[row] = poison;
    for (size_t c = 0; c < kDv; ++c) out_.data[row * kDv + c] = dout_.data[row * kDv + c] = poison;
    for (size_t c = 0; c < kDqk; ++c) q_.data[row * kDqk + c] = poison;
  }
  Array dq({kBatch, kHeads, kRows, kDqk}, 1), dk({kBatch, kKvHeads, kKeys, kDqk}, 1);
  gradients_.dq = &dq.tensor;
  gradients_.dk = &dk.tensor;
  std::fill(dq.data.begin(), dq.data.end(), 0.0);
  const GradientResults results = CompareGradients(problem_, outputs_, gradients_);
  EXPECT_EQ(results.dq.zero_mismatches, 0);
  EXPECT_EQ(results.dq.nonfinite_mismatches, 0);
  EXPECT_EQ(results.dk.nonfinite_mismatches, 0);
  dq.data[0] = -0.0;
  EXPECT_EQ(CompareGradients(problem_, outputs_, gradients_).dq.zero_mismatches, 1);
}

TEST_F(Everything, NanIsExpectedWhereItIsSeen) {
  dout_.data[static_cast<size_t>(kRows - 1) * kDv] = NAN;  // column 0 of the last row of head 0
  Forward();
  Array dq({kBatch, kHeads, kRows, kDqk}, 1), dv({kBatch, kKvHeads, kKeys, kDv}, 1);
  gradients_.dq = &dq.tensor;
  gradients_.dv = &dv.tensor;
  const GradientResults results = CompareGradients(problem_, outputs_, gradients_);
  EXPECT_EQ(results.dq.nonfinite_mismatches, kDqk);
  // Column 0 of the keys that row sees and does not drop.
  EXPECT_GE(results.dv.nonfinite_mismatches, 1);
  EXPECT_LE(results.dv.nonfinite_mismatches, kKeys);
}

}  // namespace
}  // namespace tandem::oracle
