// Host and device compile the same headers of core/: what they make of them is compared here.
// Visibility, tile classes, prepared masks, Philox words and conversions are equal bit for bit; the
// softmax's special cases are exact, its ordinary values within 4 ulp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/philox.h"
#include "core/validate.h"
#include "dispatch/error.h"
#include "dispatch/registry.h"
#include "dispatch/staging.h"
#include "tests/core/prepared_problem.h"
#include "tests/cuda/core_on_device.h"
#include "tests/cuda/on_gpu.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

class CoreEquality : public OnGpu {};

// The facts of one sequence and head on the host.
MaskFacts MaskFactsOnHost(const core::Problem& p, const MaskQuery& query) {
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, query.batch, &status);
  MaskFacts facts;
  for (int64_t n = 0; n < query.rows * query.words_per_row; ++n) {
    facts.words.push_back(WordFact(p, s, query, n));
  }
  for (int64_t n = 0; n < query.tile_rows * query.words_per_row; ++n) {
    facts.classes.push_back(ClassFact(p, s, query, n));
  }
  for (int64_t n = 0; n < 2 * query.tile_rows; ++n) facts.hulls.push_back(HullFact(p, s, query, n));
  return facts;
}

// Compares a case's mask; returns how many words were compared.
int64_t CompareMask(const Case& source) {
  const PreparedProblem host(source);
  EXPECT_EQ(host.status(), TANDEM_STATUS_OK) << host.error();
  const core::Backend& backend = *dispatch::StateOf(TANDEM_DEVICE_CUDA).backend;
  const core::Context context = {0, 0, nullptr, nullptr, &dispatch::LastError()};
  dispatch::Staging staging(backend, context, 0);
  EXPECT_EQ(staging.Upload(source.problem(), source.outputs(), nullptr, host.problem()),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  core::Problem device;
  EXPECT_EQ(core::Validate(&staging.problem(), &staging.outputs(), nullptr, &device,
                           &dispatch::LastError()),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  const core::PreparationLayout layout = core::LayOutPreparation(device);
  void* buffer = nullptr;
  EXPECT_EQ(staging.Allocate(layout.size, &buffer), TANDEM_STATUS_OK);
  core::BindPreparation(layout, buffer, &device);
  if (layout.size > 0) {
    EXPECT_EQ(backend.prepare_mask(device, layout, buffer, context), TANDEM_STATUS_OK);
  }
  EXPECT_EQ(backend.synchronize(context), TANDEM_STATUS_OK);

  int64_t compared = 0;
  for (int64_t b = 0; b < host.problem().batch; ++b) {
    int32_t status = 0;
    const core::Sequence s = core::ResolveSequence(host.problem(), b, &status);
    const MaskQuery query = {b, host.problem().q_heads - 1, s.q_rows,
                             core::CeilDiv<int64_t>(s.kv_rows, 64),
                             core::CeilDiv<int64_t>(s.q_rows, 64)};
    if (query.rows * query.words_per_row == 0) continue;
    const MaskFacts on_host = MaskFactsOnHost(host.problem(), query);
    const MaskFacts on_device = MaskFactsOnDevice(device, query);
    EXPECT_EQ(on_host.words, on_device.words) << source.spec().name;
    EXPECT_EQ(on_host.classes, on_device.classes) << source.spec().name;
    EXPECT_EQ(on_host.hulls, on_device.hulls) << source.spec().name;
    compared += static_cast<int64_t>(on_host.words.size());
  }
  return compared;
}

TEST_F(CoreEquality, VisibilityAndTileClassesOfRandomMasks) {
  int64_t compared = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    Case source(RandomCase(seed));
    if (source.spec().layout == TANDEM_LAYOUT_THD && source.problem().q->shape[0] == 0) continue;
    compared += CompareMask(source);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(compared, 10000);
}

std::vector<float> InterestingFloats() {
  std::vector<float> values;
  Random random(1);
  for (int n = 0; n < 200000; ++n) {
    values.push_back(core::BitsToFloat(static_cast<uint32_t>(random.Next())));
  }
  for (uint32_t n = 0; n < 65536; ++n) {  // every f16, and its neighbours: all ties
    for (int32_t step : {-1, 0, 1}) {
      const uint32_t bits = core::FloatToBits(core::F16ToFloat(static_cast<uint16_t>(n)));
      values.push_back(core::BitsToFloat(bits + static_cast<uint32_t>(step)));
      values.push_back(core::BitsToFloat(bits + 0x1000 + static_cast<uint32_t>(step)));
      values.push_back(core::BitsToFloat((n << 16) + 0x8000 + static_cast<uint32_t>(step)));
    }
  }
  return values;
}

TEST_F(CoreEquality, Conversions) {
  const std::vector<float> values = InterestingFloats();
  std::vector<uint16_t> f16, bf16;
  std::vector<uint32_t> patterns;
  ConvertOnDevice(values, &f16, &bf16, &patterns);
  for (size_t n = 0; n < values.size(); ++n) {
    ASSERT_EQ(f16[n], core::FloatToF16(values[n])) << values[n];
    ASSERT_EQ(bf16[n], core::FloatToBf16(values[n])) << values[n];
  }
  for (uint32_t n = 0; n < 65536; ++n) {
    const uint16_t bits = static_cast<uint16_t>(n);
    ASSERT_EQ(patterns[n], core::FloatToBits(core::F16ToFloat(bits))) << n;
    ASSERT_EQ(patterns[65536 + n], core::FloatToBits(core::Bf16ToFloat(bits))) << n;
  }
}

TEST_F(CoreEquality, PhiloxWords) {
  Random random(2);
  std::vector<PhiloxInput> inputs;
  for (int n = 0; n < 20000; ++n) {
    inputs.push_back({random.Next(), random.Next() >> 32, random.Below(int64_t{1} << 32),
                      random.Below(int64_t{1} << 31), random.Below(int64_t{1} << 31)});
  }
  const std::vector<uint32_t> words = PhiloxOnDevice(inputs);
  for (size_t n = 0; n < inputs.size(); ++n) {
    const core::Dropout dropout = {inputs[n].seed, inputs[n].offset, 0, 1.0f, 1};
    const core::Philox4 drawn =
        core::DropoutWords(dropout, inputs[n].head_index, inputs[n].i, inputs[n].j);
    for (int w = 0; w < 4; ++w) ASSERT_EQ(words[4 * n + w], drawn.word[w]);
  }
}

// Equal special values, or within 4 ulp of the larger of the result and `operand`, the largest
// number that was added to make it.
bool Agree(float a, float b, float operand) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b) || a == 0.0f || b == 0.0f) {
    const float smallest = 0x1p-126f;  // the device may flush what is below
    return a == b || (std::fabs(a) < smallest && std::fabs(b) < smallest);
  }
  const float size = std::max(std::fabs(a), std::isfinite(operand) ? std::fabs(operand) : 0.0f);
  return std::fabs(a - b) <= 4 * (std::nextafter(size, INFINITY) - size);
}

TEST_F(CoreEquality, SafeSoftmax) {
  const float infinity = INFINITY, nan = NAN;
  std::vector<SoftmaxInput> inputs;
  const float special[] = {-infinity, infinity, nan, 0.0f, -0.0f, 1.0f, -88.7f, -3.4e38f, 3.4e38f};
  for (float m : special) {
    for (float l : special) {
      for (float sink : special) {
        for (float other : special) inputs.push_back({m, l, sink, other});
      }
    }
  }
  Random random(3);
  for (int n = 0; n < 20000; ++n) {
    inputs.push_back(
        {static_cast<float>(30 * random.Normal()), static_cast<float>(1 + 1000 * random.Uniform()),
         static_cast<float>(30 * random.Normal()), static_cast<float>(30 * random.Normal())});
  }
  const std::vector<float> facts = SoftmaxFactsOnDevice(inputs);
  for (size_t n = 0; n < inputs.size(); ++n) {
    float expected[kSoftmaxFacts];
    SoftmaxFacts(inputs[n], expected);
    for (int f = 0; f < kSoftmaxFacts; ++f) {
      const SoftmaxInput& in = inputs[n];
      float operand = 0.0f;
      if (f == 4 || f == 10) operand = std::max(std::fabs(in.m), std::fabs(in.other));
      if (f == 11) operand = std::max(std::fabs(in.l), std::fabs(in.sink));
      ASSERT_TRUE(Agree(expected[f], facts[kSoftmaxFacts * n + f], operand))
          << "fact " << f << " of m " << in.m << " l " << in.l << " sink " << in.sink << " other "
          << in.other << ": host " << expected[f] << " device " << facts[kSoftmaxFacts * n + f];
    }
  }
}

}  // namespace
}  // namespace tandem::test
