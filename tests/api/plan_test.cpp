// Plans, mask plans and explanations.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>

#include "tests/api/call.h"
#include "tests/support/kernels.h"

namespace tandem::test {
namespace {

struct AlignedFree {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<void, AlignedFree>;

AlignedMemory Allocate(size_t size) {
  AlignedMemory memory(std::aligned_alloc(256, (size + 511) / 256 * 256));
  std::memset(memory.get(), 0x5a, size);
  return memory;
}

struct PlanDelete {
  void operator()(tandem_plan* plan) const { tandem_plan_destroy(plan); }
  void operator()(tandem_mask_plan* plan) const { tandem_mask_plan_destroy(plan); }
  void operator()(tandem_explanation* e) const { tandem_explanation_destroy(e); }
};
using Plan = std::unique_ptr<tandem_plan, PlanDelete>;
using MaskPlan = std::unique_ptr<tandem_mask_plan, PlanDelete>;
using Explanation = std::unique_ptr<tandem_explanation, PlanDelete>;

Plan MakePlan(Call& call) {
  tandem_plan* plan = nullptr;
  EXPECT_EQ(tandem_plan_create(&call.problem, &call.outputs, nullptr, &call.options, &plan),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  return Plan(plan);
}

class PlanSmall : public ::testing::Test {
 protected:
  PlanSmall() : call_(FullSpec()), plan_(MakePlan(call_)) {
    size_ = tandem_plan_workspace_size(plan_.get());
    workspace_ = Allocate(size_);
  }
  tandem_status Run(Call& call) {
    return tandem_plan_run(plan_.get(), &call.problem, &call.outputs, nullptr, workspace_.get(),
                           size_, nullptr);
  }
  void ExpectRefused(tandem_status status, const std::vector<std::string>& parts,
                     tandem_status expected) {
    EXPECT_EQ(status, expected);
    Call::ExpectMessage(parts);
  }

  Call call_;
  Plan plan_;
  size_t size_ = 0;
  AlignedMemory workspace_;
};

TEST_F(PlanSmall, RunsOtherDataOfTheSameStructure) {
  CaseSpec spec = FullSpec();
  spec.seed = 99;
  Call other(spec);
  other.problem.has_scale = 1;
  other.problem.scale = 0.25f;
  ASSERT_EQ(other.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  const std::vector<uint8_t> expected = other.valid().OutputBytes();
  other.valid().PrefillOutputs();
  ASSERT_EQ(Run(other), TANDEM_STATUS_OK) << tandem_last_error();
  EXPECT_EQ(other.valid().OutputBytes(), expected);
}

TEST_F(PlanSmall, AnotherStructureIsRefused) {
  const auto refused = [&](const char* what, auto change) {
    CaseSpec spec = FullSpec();
    change(spec);
    Call other(spec);
    other.valid().PrefillOutputs(0xa5);
    const std::vector<uint8_t> before = other.valid().OutputBytes();
    EXPECT_EQ(Run(other), TANDEM_STATUS_INVALID_ARGUMENT) << what;
    Call::ExpectMessage({"plan"});
    EXPECT_EQ(other.valid().OutputBytes(), before) << what;
  };
  refused("rows", [](CaseSpec& s) { ++s.q_rows; });
  refused("keys", [](CaseSpec& s) { --s.kv_rows; });
  refused("batch", [](CaseSpec& s) { s.batch = 1; });
  refused("heads", [](CaseSpec& s) { s.kv_heads = 4; });
  refused("dims", [](CaseSpec& s) { s.qk_dim = 7; });
  refused("dtype", [](CaseSpec& s) { s.dtype = TANDEM_DTYPE_F16; });
  refused("bias dtype", [](CaseSpec& s) { s.bias.dtype = TANDEM_DTYPE_BF16; });
  refused("no bias", [](CaseSpec& s) { s.bias.dtype = TANDEM_DTYPE_UNSET; });
  refused("no sink", [](CaseSpec& s) { s.sink = false; });
  refused("no alibi", [](CaseSpec& s) { s.alibi_rank = 0; });
  refused("softcap", [](CaseSpec& s) { s.softcap = 3.0f; });
  refused("dropout", [](CaseSpec& s) { s.dropout_rate = 0.5f; });
  refused("layout", [](CaseSpec& s) { s.layout = TANDEM_LAYOUT_BSHD; });
  refused("strides", [](CaseSpec& s) { s.k_strides.padding = {0, 0, 0, 1}; });
  refused("term left out", [](CaseSpec& s) { s.terms.pop_back(); });
  refused("term alignment", [](CaseSpec& s) { s.terms[0].alignment = TANDEM_ALIGN_TOP_LEFT; });
  refused("term block size", [](CaseSpec& s) { s.terms.back().kv_block = 4; });
}

TEST_F(PlanSmall, WorkspaceIsChecked) {
  ASSERT_GT(size_, 0u);  // the dense mask
  const auto run = [&](void* workspace, size_t size) {
    return tandem_plan_run(plan_.get(), &call_.problem, &call_.outputs, nullptr, workspace, size,
                           nullptr);
  };
  ExpectRefused(run(workspace_.get(), size_ - 1), {"workspace_size", std::to_string(size_)},
                TANDEM_STATUS_WORKSPACE_TOO_SMALL);
  ExpectRefused(run(workspace_.get(), 0), {"workspace_size", "0"},
                TANDEM_STATUS_WORKSPACE_TOO_SMALL);
  ExpectRefused(run(nullptr, size_), {"workspace"}, TANDEM_STATUS_INVALID_ARGUMENT);
  ExpectRefused(run(static_cast<char*>(workspace_.get()) + 64, size_), {"workspace", "256"},
                TANDEM_STATUS_INVALID_ARGUMENT);
  EXPECT_EQ(run(workspace_.get(), size_), TANDEM_STATUS_OK) << tandem_last_error();
}

TEST_F(PlanSmall, WorkspaceIsNotOverrun) {
  const Memory exact(static_cast<int64_t>((size_ + 4095) / 4096 * 4096), 1, Placement::kGuardAfter);
  EXPECT_EQ(tandem_plan_run(plan_.get(), &call_.problem, &call_.outputs, nullptr,
                            exact.data() + (exact.size() - static_cast<int64_t>(size_)) / 256 * 256,
                            size_, nullptr),
            TANDEM_STATUS_OK)
      << tandem_last_error();
}

// Longer packed sequences than planned, in tensors of the same shape, need more than was planned.
TEST(PlanSmallPacked, OtherLengthsEitherRunOrAreRefused) {
  CaseSpec spec = PackedSpec();
  spec.terms = {Dense(4)};
  spec.terms[0].per_row = false;
  spec.terms[0].per_head = spec.terms[0].per_batch = false;
  Call planned(spec);
  const Plan plan = MakePlan(planned);
  const size_t size = tandem_plan_workspace_size(plan.get());
  const AlignedMemory workspace = Allocate(size);
  ASSERT_EQ(tandem_plan_run(plan.get(), &planned.problem, &planned.outputs, nullptr,
                            workspace.get(), size, nullptr),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  spec.q_lens = {6, 4};
  spec.kv_lens = {7, 5};
  Call other(spec);
  const tandem_status status = tandem_plan_run(plan.get(), &other.problem, &other.outputs, nullptr,
                                               workspace.get(), size, nullptr);
  EXPECT_TRUE(status == TANDEM_STATUS_OK || status == TANDEM_STATUS_INVALID_ARGUMENT ||
              status == TANDEM_STATUS_WORKSPACE_TOO_SMALL)
      << tandem_last_error();
  if (status == TANDEM_STATUS_OK) {
    const std::vector<uint8_t> planned_bytes = other.valid().OutputBytes();
    ASSERT_EQ(other.Attention(), TANDEM_STATUS_OK);
    EXPECT_EQ(other.valid().OutputBytes(), planned_bytes);
  }
}

TEST(MaskPlanSmall, EqualsTheMaskBitForBitAndOutlivesItsArrays) {
  std::vector<CaseSpec> specs = {FullSpec(), PackedSpec()};
  for (const TermSpec& term :
       {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), RowRanges(2), Lengths(true, true), Segments(3, false),
        Dense(2), Dense(3, TANDEM_DTYPE_BIT), BlockSparse(64, 16)}) {
    CaseSpec spec;
    spec.batch = 2;
    spec.q_heads = 2;
    spec.q_rows = 100;
    spec.kv_rows = 150;
    spec.terms = {term};
    specs.push_back(spec);
    spec.dtype = TANDEM_DTYPE_BF16;
    spec.global_q_len = 120;
    spec.global_kv_len = 200;
    spec.q_offset = 20;
    spec.kv_offset = 50;
    specs.push_back(spec);
  }
  for (const Kernel& kernel : AvailableKernels()) {
    if (kernel.device != TANDEM_DEVICE_CPU) continue;
    for (const CaseSpec& spec : specs) {
      Call direct(spec);
      direct.options.kernel = kernel.name.c_str();
      if (direct.Attention() == TANDEM_STATUS_UNSUPPORTED) continue;
      const std::vector<uint8_t> expected = direct.valid().OutputBytes();
      direct.valid().PrefillOutputs();

      MaskPlan plan;
      AlignedMemory memory;
      {
        Call gone(spec);  // its arrays are freed before the plan is used
        size_t size = 0;
        ASSERT_EQ(tandem_mask_plan_size(&gone.problem, nullptr, &size), TANDEM_STATUS_OK)
            << tandem_last_error();
        memory = Allocate(size);
        tandem_mask_plan* made = nullptr;
        if (size > 0) {
          EXPECT_EQ(tandem_mask_plan_create(&gone.problem, nullptr, memory.get(), size - 1, nullptr,
                                            &made),
                    TANDEM_STATUS_WORKSPACE_TOO_SMALL);
          Call::ExpectMessage({"size", std::to_string(size)});
        }
        ASSERT_EQ(
            tandem_mask_plan_create(&gone.problem, nullptr, memory.get(), size, nullptr, &made),
            TANDEM_STATUS_OK)
            << tandem_last_error();
        plan.reset(made);
      }
      tandem_problem planned = direct.problem;
      planned.mask_terms = nullptr;
      planned.mask_term_count = 0;
      planned.mask_plan = plan.get();
      for (int run = 0; run < 2; ++run) {  // it is reused
        ASSERT_EQ(tandem_attention(&planned, &direct.outputs, &direct.options), TANDEM_STATUS_OK)
            << tandem_last_error();
        EXPECT_EQ(direct.valid().OutputBytes(), expected)
            << kernel << " " << (spec.terms.empty() ? "" : Describe(spec.terms[0]));
      }
    }
  }
}

TEST(MaskPlanSmall, OfAnotherShapeIsRefused) {
  Call call(FullSpec());
  size_t size = 0;
  ASSERT_EQ(tandem_mask_plan_size(&call.problem, nullptr, &size), TANDEM_STATUS_OK);
  const AlignedMemory memory = Allocate(size);
  tandem_mask_plan* made = nullptr;
  ASSERT_EQ(tandem_mask_plan_create(&call.problem, nullptr, memory.get(), size, nullptr, &made),
            TANDEM_STATUS_OK)
      << tandem_last_error();
  const MaskPlan plan(made);
  CaseSpec spec = FullSpec();
  spec.kv_rows += 1;
  Call other(spec);
  other.problem.mask_plan = plan.get();
  other.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, {"mask_term_count"});
  other.problem.mask_term_count = 0;
  other.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, {"mask_plan", "key rows"});
}

TEST(ExplainSmall, EveryKernelHasAVerdict) {
  Call call(FullSpec());
  tandem_explanation* made = nullptr;
  ASSERT_EQ(tandem_explain(&call.problem, &call.outputs, nullptr, nullptr, &made), TANDEM_STATUS_OK)
      << tandem_last_error();
  const Explanation explanation(made);
  const int32_t count = tandem_explanation_count(made);
  const int32_t chosen = tandem_explanation_chosen(made);
  ASSERT_GE(chosen, 0);
  EXPECT_EQ(tandem_explanation_reason(made, chosen), nullptr);
  EXPECT_EQ(tandem_explanation_kernel(made, chosen),
            std::string(tandem_plan_kernel(MakePlan(call).get())));
  for (const Kernel& kernel : RegisteredKernels()) {
    int found = 0;
    for (int32_t n = 0; n < count; ++n) {
      if (tandem_explanation_kernel(made, n) != kernel.name) continue;
      ++found;
      const char* reason = tandem_explanation_reason(made, n);
      EXPECT_EQ(tandem_explanation_device(made, n), kernel.device);
      if (!kernel.Available()) {
        ASSERT_NE(reason, nullptr) << kernel;
        EXPECT_EQ(reason, kernel.unavailable);
      }
      // Its verdict is what happens when it is asked for.
      Call named(FullSpec());
      named.options.kernel = kernel.name.c_str();
      if (kernel.device != TANDEM_DEVICE_CPU) continue;
      EXPECT_EQ(named.Attention(), reason == nullptr ? TANDEM_STATUS_OK : TANDEM_STATUS_UNSUPPORTED)
          << kernel;
      if (reason != nullptr) Call::ExpectMessage({kernel.name, reason});
    }
    EXPECT_EQ(found, 1) << kernel;
  }
  EXPECT_EQ(tandem_explanation_kernel(made, count), nullptr);
  EXPECT_EQ(tandem_explanation_reason(made, -1), nullptr);
}

TEST(InspectSmall, ShowsTheDefinition) {
  Call call(FullSpec());
  const int64_t rows = 10, keys = 12;
  std::vector<uint8_t> visible(rows * keys);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < 4; ++h) {
      ASSERT_EQ(tandem_mask_inspect(&call.problem, b, h, 0, rows, 0, keys, visible.data(), nullptr),
                TANDEM_STATUS_OK)
          << tandem_last_error();
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < keys; ++j) {
          EXPECT_EQ(visible[i * keys + j], call.valid().TermsAllow(b, h, i, j));
        }
      }
    }
  }
  EXPECT_EQ(tandem_mask_inspect(&call.problem, 0, 4, 0, 1, 0, 1, visible.data(), nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  EXPECT_EQ(tandem_mask_inspect(&call.problem, 0, 0, 5, 6, 0, 1, visible.data(), nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"q_begin", "5", "6"});
}

}  // namespace
}  // namespace tandem::test
