// Shards: parts of the queries and keys of one problem, with their global coordinates, merged by
// tandem_merge, are the whole within its bound.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>

#include "oracle/compare.h"
#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

constexpr int kRowAxis = 2;  // of [B, H, S, D]

tandem_tensor Rows(const tandem_tensor& tensor, int axis, int64_t begin, int64_t end) {
  tandem_tensor part = tensor;
  part.shape[axis] = end - begin;
  part.data = static_cast<char*>(tensor.data) + begin * tensor.strides[axis] * SizeOf(tensor.dtype);
  return part;
}

CaseSpec Base(const char* name, std::vector<TermSpec> terms) {
  CaseSpec spec;
  spec.name = name;
  spec.batch = 2;
  spec.q_heads = 4;
  spec.kv_heads = 2;
  spec.q_rows = 150;
  spec.kv_rows = 220;
  spec.terms = std::move(terms);
  spec.out_f32 = true;
  return spec;
}

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs = {
      Base("plain", {}),
      Base("causal", {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)}),
      Base("window_lengths", {Band(TANDEM_ALIGN_BOTTOM_RIGHT, 30, 3), Lengths(true, true)}),
      Base("dense_blocks", {Dense(4), BlockSparse(48, 40)}),
      Base("segments_ranges", {Segments(3, true), RowRanges(2)}),
      Base("scores", {Lengths(false, true)}),
  };
  specs.back().bias.dtype = TANDEM_DTYPE_BF16;
  specs.back().bias.hidden = 0.2;
  specs.back().alibi_rank = 2;
  specs.back().softcap = 20.0f;
  specs.back().dropout_rate = 0.2f;
  specs.back().sink = true;
  return specs;
}

using Parameter = std::tuple<Kernel, CaseSpec>;
class ShardSmall : public ::testing::TestWithParam<Parameter> {
 protected:
  // Rows [q0, q1) from all keys, cut at the given places.
  void RunPart(const Kernel& kernel, Case& whole, int64_t q0, int64_t q1,
               const std::vector<int64_t>& cuts) {
    const int64_t count = static_cast<int64_t>(cuts.size()) - 1;
    std::deque<Tensor> outs, lses;
    std::vector<const tandem_tensor*> out_pointers, lse_pointers;
    const CaseSpec& spec = whole.spec();
    for (int64_t n = 0; n < count; ++n) {
      tandem_problem part = whole.problem();
      const tandem_tensor q = Rows(*part.q, kRowAxis, q0, q1);
      const tandem_tensor k = Rows(*part.k, kRowAxis, cuts[n], cuts[n + 1]);
      const tandem_tensor v = Rows(*part.v, kRowAxis, cuts[n], cuts[n + 1]);
      part.q = &q;
      part.k = &k;
      part.v = &v;
      part.q_offset = q0;
      part.kv_offset = cuts[n];
      part.global_q_len = spec.q_rows;
      part.global_kv_len = spec.kv_rows;
      if (n != 0) part.sink = nullptr;  // the sink counts once
      outs.emplace_back(TANDEM_DTYPE_F32, Shape{spec.batch, spec.q_heads, q1 - q0, spec.v_dim});
      lses.emplace_back(TANDEM_DTYPE_F32, Shape{spec.batch, spec.q_heads, q1 - q0});
      tandem_outputs outputs = TANDEM_OUTPUTS_INIT;
      outputs.out = outs.back().get();
      outputs.lse = lses.back().get();
      tandem_options options = TANDEM_OPTIONS_INIT;
      options.device_type = kernel.device;
      options.kernel = kernel.name.c_str();
      ASSERT_EQ(tandem_attention(&part, &outputs, &options), TANDEM_STATUS_OK)
          << tandem_last_error();
      out_pointers.push_back(outputs.out);
      lse_pointers.push_back(outputs.lse);
    }
    const tandem_tensor out = Rows(*whole.outputs().out, kRowAxis, q0, q1);
    const tandem_tensor lse = Rows(*whole.outputs().lse, kRowAxis, q0, q1);
    tandem_outputs merged = TANDEM_OUTPUTS_INIT;
    merged.out = &out;
    merged.lse = &lse;
    ASSERT_EQ(tandem_merge(TANDEM_LAYOUT_BHSD, static_cast<int32_t>(count), out_pointers.data(),
                           lse_pointers.data(), &merged, nullptr),
              TANDEM_STATUS_OK)
        << tandem_last_error();
  }
};

TEST_P(ShardSmall, MergedShardsAreTheWhole) {
  const Kernel& kernel = std::get<0>(GetParam());
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_BF16}) {
    CaseSpec spec = std::get<1>(GetParam());
    spec.dtype = dtype;
    Case whole(spec);
    if (!RunOrCountDeclined(kernel, whole)) continue;
    whole.PrefillOutputs();
    RunPart(kernel, whole, 0, 67, {0, 64, 128, 220});
    RunPart(kernel, whole, 67, 150, {0, 1, 77, 77, 200, 220});
    if (HasFatalFailure()) return;
    ExpectAgreement(kernel, whole);
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, ShardSmall,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(Specs())),
                         KernelAndCaseName());

TEST(MergeSmall, EmptyPartialsChangeNoBit) {
  const Shape shape = {1, 2, 5, 3};
  Random random(3);
  Tensor full(TANDEM_DTYPE_F32, shape), empty(TANDEM_DTYPE_F32, shape);
  Tensor lse(TANDEM_DTYPE_F32, {1, 2, 5}), empty_lse(TANDEM_DTYPE_F32, {1, 2, 5});
  full.FillNormal(random);
  lse.FillNormal(random, 100.0);
  lse.Set({0, 1, 2}, -HUGE_VAL);  // a row that is empty in every part
  full.Set({0, 1, 2, 0}, __builtin_nan(""));
  empty.Fill(__builtin_nan(""));  // of an empty partial nothing is looked at
  empty_lse.Fill(-HUGE_VAL);
  for (const auto& order : {std::vector<int>{0, 1, 1}, {1, 0, 1}, {1, 1, 0}}) {
    Tensor out(TANDEM_DTYPE_F32, shape), out_lse(TANDEM_DTYPE_F32, {1, 2, 5});
    std::vector<const tandem_tensor*> parts, lses;
    for (const int which : order) {
      parts.push_back(which == 0 ? full.get() : empty.get());
      lses.push_back(which == 0 ? lse.get() : empty_lse.get());
    }
    tandem_outputs outputs = TANDEM_OUTPUTS_INIT;
    outputs.out = out.get();
    outputs.lse = out_lse.get();
    ASSERT_EQ(tandem_merge(TANDEM_LAYOUT_BHSD, 3, parts.data(), lses.data(), &outputs, nullptr),
              TANDEM_STATUS_OK)
        << tandem_last_error();
    EXPECT_EQ(out_lse.ElementBytes(), lse.ElementBytes());
    Tensor expected(TANDEM_DTYPE_F32, shape);
    expected.ForEach([&](std::span<const int64_t> index) {
      const bool empty_row = index[1] == 1 && index[2] == 2;
      expected.Set(index, empty_row ? 0.0 : full.Get(index));
    });
    EXPECT_EQ(out.ElementBytes(), expected.ElementBytes());
  }
}

}  // namespace
}  // namespace tandem::test
