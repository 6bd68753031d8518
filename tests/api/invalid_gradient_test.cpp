// The backward pass at the C interface: everything that is not allowed about its tensors, and what
// a valid call does with them.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>

#include "tests/api/call.h"
#include "tests/support/backward_case.h"

namespace tandem::test {
namespace {

// A valid backward call whose descriptors may be changed.
class BackwardCall {
 public:
  explicit BackwardCall(const CaseSpec& spec)
      : case_(spec),
        problem(case_.forward().problem()),
        outputs(case_.forward().outputs()),
        gradients(case_.gradients()) {
    EXPECT_EQ(case_.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  }

  tandem_tensor& Own(const tandem_tensor** slot) {
    tensors_.push_back(**slot);
    *slot = &tensors_.back();
    return tensors_.back();
  }

  tandem_status Run() { return tandem_attention_backward(&problem, &outputs, &gradients, nullptr); }

  // One call and planning refuse alike, and nothing is written.
  void ExpectRefused(const std::vector<std::string>& parts) {
    case_.PrefillGradients(0xa5);
    EXPECT_EQ(Run(), TANDEM_STATUS_INVALID_ARGUMENT) << tandem_last_error();
    Call::ExpectMessage(parts);
    tandem_plan* plan = nullptr;
    EXPECT_EQ(tandem_plan_create(&problem, &outputs, &gradients, nullptr, &plan),
              TANDEM_STATUS_INVALID_ARGUMENT);
    Call::ExpectMessage(parts);
    EXPECT_TRUE(case_.GradientsHold(0xa5));
  }

  BackwardCase& valid() { return case_; }

 private:
  BackwardCase case_;
  std::deque<tandem_tensor> tensors_;

 public:
  tandem_problem problem;
  tandem_outputs outputs;
  tandem_gradients gradients;
};

struct BadGradient {
  const char* name;
  std::vector<std::string> says;
  std::function<void(BackwardCall&)> spoil;
};
std::ostream& operator<<(std::ostream& stream, const BadGradient& bad) {
  return stream << bad.name;
}

std::vector<BadGradient> BadGradients() {
  using C = BackwardCall;
  std::vector<BadGradient> bad = {
      {"struct_size", {"gradients", "struct_size"}, [](C& c) { c.gradients.struct_size = 8; }},
      {"outputs_size", {"outputs", "struct_size"}, [](C& c) { c.outputs.struct_size = 8; }},
      {"no_out", {"out is null"}, [](C& c) { c.outputs.out = nullptr; }},
      {"no_lse", {"lse is null", "forward"}, [](C& c) { c.outputs.lse = nullptr; }},
      {"no_dout", {"dout is null"}, [](C& c) { c.gradients.dout = nullptr; }},
      {"dout_dtype",
       {"dout", "bf16"},
       [](C& c) { c.Own(&c.gradients.dout).dtype = TANDEM_DTYPE_BF16; }},
      {"dout_rows",
       {"dout", "the rows of q"},
       [](C& c) { c.Own(&c.gradients.dout).shape[2] -= 1; }},
      {"dlse_dtype", {"dlse"}, [](C& c) { c.Own(&c.gradients.dlse).dtype = TANDEM_DTYPE_F64; }},
      {"dlse_heads",
       {"dlse", "the heads of q"},
       [](C& c) { c.Own(&c.gradients.dlse).shape[1] = 1; }},
      {"dq_dtype", {"dq", "f16"}, [](C& c) { c.Own(&c.gradients.dq).dtype = TANDEM_DTYPE_F16; }},
      {"dq_rank", {"dq", "rank"}, [](C& c) { c.Own(&c.gradients.dq).rank = 3; }},
      {"dq_null_data", {"dq", "null"}, [](C& c) { c.Own(&c.gradients.dq).data = nullptr; }},
      {"dq_device",
       {"dq", "device"},
       [](C& c) { c.Own(&c.gradients.dq).device_type = TANDEM_DEVICE_CUDA; }},
      {"dk_heads", {"dk", "that of k"}, [](C& c) { c.Own(&c.gradients.dk).shape[1] = 1; }},
      {"dk_broadcast", {"dk", "strides"}, [](C& c) { c.Own(&c.gradients.dk).strides[2] = 0; }},
      {"dv_dim", {"dv", "that of v"}, [](C& c) { c.Own(&c.gradients.dv).shape[3] += 1; }},
      {"dv_is_v", {"dv", "overlaps", "v"}, [](C& c) { c.gradients.dv = c.problem.v; }},
      {"dk_is_dq",
       {"dk", "overlaps", "dq"},
       [](C& c) { c.Own(&c.gradients.dk).data = c.gradients.dq->data; }},
      {"dq_is_dout",
       {"dq", "overlaps", "dout"},
       [](C& c) { c.Own(&c.gradients.dq).data = c.gradients.dout->data; }},
      {"dq_is_lse",
       {"dq", "overlaps", "lse"},
       [](C& c) { c.Own(&c.gradients.dq).data = c.outputs.lse->data; }},
      {"dbias_dtype",
       {"dbias", "f16"},
       [](C& c) { c.Own(&c.gradients.dbias).dtype = TANDEM_DTYPE_F16; }},
      {"dbias_shape",
       {"dbias", "that of bias"},
       [](C& c) { c.Own(&c.gradients.dbias).shape[0] = 1; }},
      {"dbias_alone", {"dbias", "bias"}, [](C& c) { c.problem.bias = nullptr; }},
      {"dsink_shape",
       {"dsink", "that of sink"},
       [](C& c) { c.Own(&c.gradients.dsink).shape[0] = 1; }},
      {"dsink_alone", {"dsink", "sink"}, [](C& c) { c.problem.sink = nullptr; }},
      {"dalibi_rank", {"dalibi", "rank"}, [](C& c) { c.Own(&c.gradients.dalibi).rank = 1; }},
      {"dalibi_alone", {"dalibi", "alibi_slopes"}, [](C& c) { c.problem.alibi_slopes = nullptr; }},
  };
  return bad;
}

class InvalidGradientSmall : public ::testing::TestWithParam<BadGradient> {};

TEST_P(InvalidGradientSmall, IsRefusedByName) {
  CaseSpec spec = FullSpec();
  BackwardCall call(spec);
  GetParam().spoil(call);
  call.ExpectRefused(GetParam().says);
}

INSTANTIATE_TEST_SUITE_P(Gradients, InvalidGradientSmall, ::testing::ValuesIn(BadGradients()),
                         [](const auto& info) { return info.param.name; });

TEST(BackwardCallSmall, NeedsGradients) {
  BackwardCall call(FullSpec());
  EXPECT_EQ(tandem_attention_backward(&call.problem, &call.outputs, nullptr, nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"gradients is null"});
}

TEST(BackwardCallSmall, EveryGradientMayBeLeftOut) {
  BackwardCall call(FullSpec());
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  const std::vector<uint8_t> all = call.valid().dk().Bytes();
  call.valid().PrefillGradients(0xa5);
  const tandem_tensor* const dk = call.gradients.dk;
  const tandem_tensor* const dout = call.gradients.dout;
  const tandem_tensor* const dlse = call.gradients.dlse;
  call.gradients = TANDEM_GRADIENTS_INIT;
  call.gradients.dout = dout;
  call.gradients.dlse = dlse;
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  EXPECT_TRUE(call.valid().GradientsHold(0xa5));
  call.gradients.dk = dk;
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  EXPECT_EQ(call.valid().dk().Bytes(), all);
}

// out and lse are inputs here: they may be read-only, broadcast, and lie anywhere.
TEST(BackwardCallSmall, OutputsAreNotWritten) {
  BackwardCall call(PackedSpec());
  const std::vector<uint8_t> before = call.valid().forward().OutputBytes();
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  EXPECT_EQ(call.valid().forward().OutputBytes(), before);
}

// dq, dk and dv as the parts of one [B, S, 3, H, D].
TEST(BackwardCallSmall, GradientsMayInterleave) {
  CaseSpec spec;
  spec.batch = 2;
  spec.q_heads = spec.kv_heads = 3;
  spec.q_rows = spec.kv_rows = 7;
  spec.qk_dim = spec.v_dim = 4;
  BackwardCall call(spec);
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  std::vector<float> together(2 * 7 * 3 * 3 * 4, NAN);
  const tandem_tensor** slots[] = {&call.gradients.dq, &call.gradients.dk, &call.gradients.dv};
  for (int part = 0; part < 3; ++part) {
    tandem_tensor& t = call.Own(slots[part]);
    t.data = together.data() + part * 12;
    const int64_t strides[] = {7 * 36, 4, 36, 1};
    std::copy(strides, strides + 4, t.strides);
  }
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  Tensor* const separate[] = {&call.valid().dq(), &call.valid().dk(), &call.valid().dv()};
  for (int part = 0; part < 3; ++part) {
    separate[part]->ForEach([&](std::span<const int64_t> at) {
      const int64_t n = ((at[0] * 7 + at[2]) * 3 + part) * 12 + at[1] * 4 + at[3];
      EXPECT_EQ(together[static_cast<size_t>(n)], separate[part]->Get(at));
    });
  }
  // One element into its neighbour's part.
  call.Own(&call.gradients.dk).data = together.data() + 11;
  call.ExpectRefused({"dk", "overlaps", "dq"});
}

TEST(BackwardCallSmall, PlansRunWithTheStructureTheyWereMadeFor) {
  BackwardCall call(FullSpec());
  ASSERT_EQ(call.Run(), TANDEM_STATUS_OK) << tandem_last_error();
  const std::vector<uint8_t> one_call = call.valid().GradientBytes();
  tandem_plan* raw = nullptr;
  ASSERT_EQ(tandem_plan_create(&call.problem, &call.outputs, &call.gradients, nullptr, &raw),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  const std::unique_ptr<tandem_plan, decltype(&tandem_plan_destroy)> plan(raw,
                                                                          &tandem_plan_destroy);
  const size_t size = tandem_plan_workspace_size(raw);
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(256, (size + 256) & ~size_t{255}), &std::free);
  std::memset(workspace.get(), 0x7f, size);
  call.valid().PrefillGradients();
  ASSERT_EQ(tandem_plan_run(raw, &call.problem, &call.outputs, &call.gradients, workspace.get(),
                            size, nullptr),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  EXPECT_EQ(call.valid().GradientBytes(), one_call);

  // Without gradients, or with fewer, it is another structure.
  EXPECT_EQ(
      tandem_plan_run(raw, &call.problem, &call.outputs, nullptr, workspace.get(), size, nullptr),
      TANDEM_STATUS_INVALID_ARGUMENT);
  call.gradients.dv = nullptr;
  EXPECT_EQ(tandem_plan_run(raw, &call.problem, &call.outputs, &call.gradients, workspace.get(),
                            size, nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace tandem::test
