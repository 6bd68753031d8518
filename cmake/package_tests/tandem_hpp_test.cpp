// The C++ interface on the CPU: what it passes to the C ABI, what it owns, and how it fails.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tandem/tandem.hpp"

namespace {

using tandem::Alignment;
using tandem::DType;
using tandem::Indices;
using tandem::Layout;
using tandem::Tensor;

constexpr int64_t kBatch = 2, kHeads = 2, kQueries = 3, kKeys = 5, kDim = 4;

// Small tensors whose values differ by row.
struct Data {
  std::vector<float> q = Fill(kBatch * kHeads * kQueries * kDim, 0.3f);
  std::vector<float> k = Fill(kBatch * kHeads * kKeys * kDim, 0.7f);
  std::vector<float> v = Fill(kBatch * kHeads * kKeys * kDim, 1.1f);
  std::vector<float> out = std::vector<float>(q.size(), -7.0f);
  std::vector<float> lse = std::vector<float>(kBatch * kHeads * kQueries, -7.0f);

  static std::vector<float> Fill(int64_t count, float step) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
      values.push_back(std::sin(step * static_cast<float>(i)));
    }
    return values;
  }
  tandem::Problem Problem() const {
    return {Layout::kBHSD, Tensor(q, {kBatch, kHeads, kQueries, kDim}),
            Tensor(k, {kBatch, kHeads, kKeys, kDim}), Tensor(v, {kBatch, kHeads, kKeys, kDim})};
  }
  Tensor Out() { return Tensor(out, {kBatch, kHeads, kQueries, kDim}); }
  tandem::Outputs Outputs() { return {Out(), Tensor(lse, {kBatch, kHeads, kQueries})}; }
};

std::vector<uint8_t> Truth(const std::function<bool(int64_t, int64_t)>& visible) {
  std::vector<uint8_t> truth;
  for (int64_t i = 0; i < kQueries; ++i) {
    for (int64_t j = 0; j < kKeys; ++j) truth.push_back(visible(i, j));
  }
  return truth;
}

tandem::Error Failure(const std::function<void()>& call) {
  try {
    call();
  } catch (const tandem::Error& error) {
    return error;
  }
  return tandem::Error(tandem::Status::kOk, "nothing was thrown");
}

const tandem::Rectangle kWhole{0, kQueries, 0, kKeys};

TEST(TensorTest, StridesAreRowMajorUnlessGiven) {
  const float data[6] = {};
  const tandem_tensor contiguous = Tensor(data, {2, 3}).c();
  EXPECT_EQ(contiguous.struct_size, sizeof(tandem_tensor));
  EXPECT_EQ(contiguous.dtype, TANDEM_DTYPE_F32);
  EXPECT_EQ(contiguous.device_type, TANDEM_DEVICE_CPU);
  EXPECT_EQ(contiguous.rank, 2);
  EXPECT_EQ(contiguous.shape[1], 3);
  EXPECT_EQ(contiguous.strides[0], 3);
  EXPECT_EQ(contiguous.strides[1], 1);
  const tandem_tensor strided =
      Tensor(data, DType::kBF16, {2, 3}, {0, -1}, tandem::Device::kCuda, 1).c();
  EXPECT_EQ(strided.dtype, TANDEM_DTYPE_BF16);
  EXPECT_EQ(strided.device_type, TANDEM_DEVICE_CUDA);
  EXPECT_EQ(strided.device_index, 1);
  EXPECT_EQ(strided.strides[0], 0);
  EXPECT_EQ(strided.strides[1], -1);
}

TEST(TensorTest, RefusesWhatItCannotHold) {
  const std::vector<float> data(6);
  EXPECT_EQ(Failure([&] { Tensor(data, {2, 4}); }).status(), tandem::Status::kInvalidArgument);
  EXPECT_EQ(Failure([&] {
              Tensor(data, {1, 1, 1, 1, 1, 6});
            }).status(),
            tandem::Status::kInvalidArgument);
  EXPECT_EQ(Failure([&] {
              Tensor(data.data(), {2, 3}, {1});
            }).status(),
            tandem::Status::kInvalidArgument);
}

TEST(MaskTest, TermsSayWhatTheCTermsSay) {
  const Data data;
  tandem::Problem problem = data.Problem();
  const auto expect = [&](const tandem::Mask& mask, int64_t batch,
                          const std::function<bool(int64_t, int64_t)>& visible) {
    problem.mask = mask;
    EXPECT_EQ(tandem::Visible(problem, batch, 1, kWhole), Truth(visible));
  };
  expect({}, 0, [](int64_t, int64_t) { return true; });
  expect(tandem::Causal(Alignment::kTopLeft), 0, [](int64_t i, int64_t j) { return j <= i; });
  expect(tandem::Causal(Alignment::kBottomRight), 0,
         [](int64_t i, int64_t j) { return j <= i + 2; });
  expect(tandem::Causal(Alignment::kTopLeft, Indices{0, 3}), 1,
         [](int64_t i, int64_t j) { return j <= i || j < 3; });
  expect(tandem::Window(1, 2, Alignment::kTopLeft), 0,
         [](int64_t i, int64_t j) { return j >= i - 1 && j <= i + 2; });
  const int32_t left[2] = {2, 0};
  expect(tandem::Band(Alignment::kTopLeft, -1, 1, {}, Tensor(left, {1, 2})), 0,
         [](int64_t i, int64_t j) { return j >= i && j <= i + 1; });
  expect(tandem::KvLengths({5, 2}), 1, [](int64_t, int64_t j) { return j < 2; });
  expect(tandem::QueryLengths({3, 1}), 1, [](int64_t i, int64_t) { return i < 1; });
  expect(tandem::Lengths(Indices{1, 1}, Indices{5, 4}), 1,
         [](int64_t i, int64_t j) { return i < 1 && j < 4; });
  const int32_t ranges[] = {0, 1, 3, 5};
  expect(tandem::RowRanges(Tensor(ranges, {1, 1, 1, 2, 2})), 0,
         [](int64_t, int64_t j) { return j < 1 || j >= 3; });
  const int32_t q_segments[] = {0, 1, -1}, kv_segments[] = {1, 0, 0, -1, 1};
  expect(
      tandem::Segments(Tensor(q_segments, {1, 3}), Tensor(kv_segments, {1, 5})), 0,
      [&](int64_t i, int64_t j) { return q_segments[i] == kv_segments[j] && q_segments[i] >= 0; });
  const bool dense[] = {true, false, true, false, true};
  expect(tandem::Dense(Tensor(dense, {1, 5})), 0, [](int64_t, int64_t j) { return j % 2 == 0; });
  const int32_t counts[] = {1, 2}, blocks[] = {1, 0, 0, 1};
  expect(tandem::BlockSparse(2, 3, Tensor(counts, {1, 1, 2}), Tensor(blocks, {1, 1, 2, 2})), 0,
         [](int64_t i, int64_t j) { return i >= 2 || j >= 3; });
  expect(tandem::Causal(Alignment::kTopLeft) & tandem::KvLengths({2, 2}), 0,
         [](int64_t i, int64_t j) { return j <= i && j < 2; });
}

TEST(MaskTest, OwnsItsTermsAndSharesThem) {
  const Data data;
  tandem::Problem problem = data.Problem();
  {
    tandem::Mask lengths = tandem::KvLengths(std::vector<int32_t>{4, 2});
    const tandem::Mask copy = lengths;
    problem.mask = copy;
    problem.mask &= tandem::Causal(Alignment::kBottomRight);
    lengths = {};
  }
  EXPECT_EQ(tandem::Visible(problem, 1, 0, kWhole),
            Truth([](int64_t i, int64_t j) { return j < 2 && j <= i - 1; }));  // kv_len 2, q_len 3
}

TEST(MaskTest, ClassifiesRectangles) {
  const Data data;
  tandem::Problem problem = data.Problem();
  problem.mask = tandem::Causal(Alignment::kTopLeft);
  EXPECT_EQ(tandem::Classify(problem, 0, 0, {0, 1, 2, 2}), tandem::TileClass::kEmpty);
  EXPECT_EQ(tandem::Classify(problem, 0, 0, {2, 1, 0, 2}), tandem::TileClass::kFull);
  EXPECT_EQ(tandem::Classify(problem, 0, 0, kWhole), tandem::TileClass::kPartial);
}

TEST(AttentionTest, MaskedRowsAreZeroWithMinusInfinity) {
  Data data;
  tandem::Problem problem = data.Problem();
  problem.mask = tandem::KvLengths({5, 0});
  tandem::Attention(problem, data.Outputs());
  EXPECT_NE(data.out[0], -7.0f);
  EXPECT_TRUE(std::isfinite(data.lse[0]));
  for (size_t i = data.out.size() / 2; i < data.out.size(); ++i) EXPECT_EQ(data.out[i], 0.0f);
  for (size_t i = data.lse.size() / 2; i < data.lse.size(); ++i) {
    EXPECT_EQ(data.lse[i], -INFINITY);
  }
}

TEST(AttentionTest, OptionalFieldsReachTheKernel) {
  Data data;
  tandem::Problem problem = data.Problem();
  problem.scale = 0.0f;  // a value: every visible key weighs the same
  tandem::Attention(problem, data.Out());
  float mean = 0;
  for (int64_t j = 0; j < kKeys; ++j) mean += data.v[static_cast<size_t>(j * kDim)] / kKeys;
  EXPECT_NEAR(data.out[0], mean, 1e-6f);

  const std::vector<float> sink = {50.0f, 0.0f}, slopes = {1.0f, 0.5f};
  const std::vector<float> bias(kQueries * kKeys, -INFINITY);
  problem.sink = Tensor(sink, {kHeads});
  problem.alibi_slopes = Tensor(slopes, {kHeads});
  problem.alibi_alignment = Alignment::kTopLeft;
  problem.bias = Tensor(bias, {kQueries, kKeys});
  tandem::Attention(problem, data.Outputs());
  EXPECT_EQ(data.out[0], 0.0f);
  EXPECT_EQ(data.lse[0], 50.0f);  // only the sink is seen
}

TEST(PlanTest, RunsAsOftenAsWantedAndMoves) {
  Data data;
  tandem::Problem problem = data.Problem();
  tandem::Attention(problem, data.Out());
  const std::vector<float> expected = data.out;

  tandem::Plan first(problem, data.Out());
  const tandem::Plan plan = std::move(first);
  EXPECT_FALSE(plan.kernel().empty());
  const tandem::HostBuffer workspace(plan.workspace_size());
  for (int run = 0; run < 2; ++run) {
    std::fill(data.out.begin(), data.out.end(), -7.0f);
    plan.Run(problem, data.Out(), workspace.data(), workspace.size());
    EXPECT_EQ(data.out, expected);
  }
}

TEST(PlanTest, NamedKernelIsUsed) {
  Data data;
  const tandem::Plan plan(data.Problem(), data.Out(), {.kernel = "reference.cpu"});
  EXPECT_EQ(plan.kernel(), "reference.cpu");
}

TEST(PlanTest, BackwardWritesTheGradientsOfOneCall) {
  Data data;
  const tandem::Problem problem = data.Problem();
  tandem::Attention(problem, data.Outputs());
  std::vector<float> dout(data.out.size(), 1.0f), dq(data.q.size(), NAN);
  tandem::Gradients gradients(Tensor(dout, {kBatch, kHeads, kQueries, kDim}));
  gradients.dq = Tensor(dq, {kBatch, kHeads, kQueries, kDim});
  tandem::AttentionBackward(problem, data.Outputs(), gradients);
  const std::vector<float> expected = dq;
  for (const float x : expected) EXPECT_TRUE(std::isfinite(x));
  const tandem::Plan plan(problem, data.Outputs(), gradients);
  tandem::HostBuffer workspace(plan.workspace_size());
  std::fill(dq.begin(), dq.end(), NAN);
  plan.Run(problem, data.Outputs(), gradients, workspace.data(), workspace.size());
  EXPECT_EQ(dq, expected);
}

TEST(PlanTest, BackwardNeedsTheLse) {
  Data data;
  const Tensor gradient(data.q, {kBatch, kHeads, kQueries, kDim});
  const tandem::Error error =
      Failure([&] { tandem::Plan(data.Problem(), data.Out(), tandem::Gradients(gradient)); });
  EXPECT_EQ(error.status(), tandem::Status::kInvalidArgument) << error.what();
  EXPECT_NE(std::string(error.what()).find("lse"), std::string::npos) << error.what();
}

TEST(MaskPlanTest, GivesTheSameBitsAndOutlivesTheMask) {
  Data data;
  tandem::Problem problem = data.Problem();
  std::optional<std::vector<uint8_t>> dense(std::in_place, kQueries * kKeys);
  for (size_t i = 0; i < dense->size(); ++i) (*dense)[i] = i % 3 != 0;
  problem.mask = tandem::Dense(Tensor(dense->data(), DType::kBool, {kQueries, kKeys})) &
                 tandem::KvLengths({4, 3});
  tandem::Attention(problem, data.Out());
  const std::vector<float> expected = data.out;

  EXPECT_GT(tandem::MaskPlanSize(problem), 0u);
  const tandem::MaskPlan plan(problem);
  dense.reset();
  problem.mask = {};
  problem.mask_plan = &plan;
  std::fill(data.out.begin(), data.out.end(), -7.0f);
  tandem::Attention(problem, data.Out());
  EXPECT_EQ(data.out, expected);
}

TEST(MergeTest, HalvesMakeAWhole) {
  Data data;
  tandem::Attention(data.Problem(), data.Outputs());
  const std::vector<float> expected = data.out;

  std::vector<float> out[2], lse[2];
  std::vector<Tensor> partial_out, partial_lse;
  for (int64_t half = 0; half < 2; ++half) {
    auto& half_out = out[half] = std::vector<float>(data.out.size());
    auto& half_lse = lse[half] = std::vector<float>(data.lse.size());
    tandem::Problem problem = data.Problem();
    const int32_t begin = half == 0 ? 0 : 2, end = half == 0 ? 2 : kKeys;
    const int32_t range[] = {begin, end};
    problem.mask = tandem::RowRanges(Tensor(range, {1, 1, 1, 1, 2}));
    partial_out.emplace_back(half_out.data(), DType::kF32,
                             std::initializer_list<int64_t>{kBatch, kHeads, kQueries, kDim});
    partial_lse.emplace_back(half_lse.data(), DType::kF32,
                             std::initializer_list<int64_t>{kBatch, kHeads, kQueries});
    tandem::Attention(problem, {partial_out.back(), partial_lse.back()});
  }
  tandem::Merge(Layout::kBHSD, partial_out, partial_lse, data.Outputs());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(data.out[i], expected[i], 1e-6f);
  EXPECT_EQ(
      Failure([&] { tandem::Merge(Layout::kBHSD, partial_out, {}, data.Outputs()); }).status(),
      tandem::Status::kInvalidArgument);
}

TEST(KvCacheTest, StandsInThePlaceOfKeysAndValues) {
  Data data;
  tandem::Attention(data.Problem(), data.Outputs());
  const std::vector<float> expected = data.out;
  tandem::KvCache cache({DType::kF32, kBatch, kHeads, kKeys + 7, kDim, kDim});
  cache.Append(Layout::kBHSD, data.Problem().k, data.Problem().v);
  EXPECT_EQ(cache.lengths(), std::vector<int32_t>(kBatch, kKeys));
  tandem::Problem problem(Layout::kBHSD, data.Problem().q, cache);
  tandem::Attention(problem, data.Outputs());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(data.out[i], expected[i], 1e-6f);
  cache.Truncate(std::vector<int32_t>(kBatch, 1));
  cache.Append(Layout::kBHSD, data.Problem().k, data.Problem().v, std::vector<int32_t>(kBatch, 2));
  EXPECT_EQ(cache.lengths(), std::vector<int32_t>(kBatch, 3));
  cache.Clear();
  EXPECT_EQ(cache.lengths(), std::vector<int32_t>(kBatch, 0));
  EXPECT_EQ(Failure([&] { cache.Append(Layout::kTHD, problem.q, problem.q); }).status(),
            tandem::Status::kInvalidArgument);
}

TEST(ExplainTest, NamesTheChosenKernelAndTheReasonsOfTheOthers) {
  Data data;
  const tandem::Explanation explanation = tandem::Explain(data.Problem(), data.Out());
  ASSERT_TRUE(explanation.chosen.has_value());
  EXPECT_FALSE(explanation.kernels[*explanation.chosen].reason.has_value());
  for (const tandem::Kernel& kernel : explanation.kernels) {
    EXPECT_FALSE(kernel.name.empty());
    EXPECT_NE(kernel.reason, "");
  }
  const Tensor gradient(data.q, {kBatch, kHeads, kQueries, kDim});
  const tandem::Gradients gradients(gradient);
  const tandem::Explanation backward =
      tandem::Explain(data.Problem(), data.Outputs(), {}, &gradients);
  ASSERT_TRUE(backward.chosen.has_value());
  EXPECT_FALSE(backward.kernels[*backward.chosen].reason.has_value());
}

TEST(DevicesTest, EitherDevicesOrAReason) {
  EXPECT_EQ(tandem::Devices(tandem::Device::kCpu).size(), 1u);
  EXPECT_FALSE(tandem::DeviceUnavailableReason(tandem::Device::kCpu).has_value());
  EXPECT_NE(tandem::Devices(tandem::Device::kCuda).empty(),
            !tandem::DeviceUnavailableReason(tandem::Device::kCuda).has_value());
  ASSERT_FALSE(tandem::Kernels().empty());
  bool reference = false;
  for (const tandem::Kernel& kernel : tandem::Kernels()) {
    reference = reference || (kernel.name == "reference.cpu" && !kernel.reason);
  }
  EXPECT_TRUE(reference);
}

TEST(ErrorTest, CarriesStatusAndSentence) {
  Data data;
  tandem::Problem problem = data.Problem();
  problem.softcap = -1.0f;
  const tandem::Error error = Failure([&] { tandem::Attention(problem, data.Out()); });
  EXPECT_EQ(error.status(), tandem::Status::kInvalidArgument);
  EXPECT_NE(std::string(error.what()).find("softcap"), std::string::npos) << error.what();
  EXPECT_EQ(data.out[0], -7.0f);
}

}  // namespace
