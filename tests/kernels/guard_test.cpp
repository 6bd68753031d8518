// Memory beside the tensors: every input, mask array and output lies against a page that may not be
// touched, first at its left end, then at its right.
#include <gtest/gtest.h>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs;
  const auto add = [&](const char* name, tandem_layout layout, int64_t q_rows, int64_t kv_rows,
                       int64_t qk_dim, int64_t v_dim, std::vector<TermSpec> terms) {
    specs.push_back(SizedCase(name, layout, q_rows, kv_rows, qk_dim, v_dim, std::move(terms),
                              specs.size() + 40));
  };
  const tandem_layout bhsd = TANDEM_LAYOUT_BHSD, bshd = TANDEM_LAYOUT_BSHD;
  add("one", bhsd, 1, 1, 1, 1, {});
  add("ragged", bhsd, 65, 67, 37, 5, {});
  add("ragged_bshd", bshd, 65, 67, 64, 33, {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)});
  add("wide", bhsd, 7, 129, 257, 300, {});
  add("bools", bhsd, 66, 131, 8, 8, {Dense(4)});
  add("bits", bhsd, 66, 131, 8, 8, {Dense(4, TANDEM_DTYPE_BIT)});
  add("ranges", bhsd, 66, 131, 8, 8, {RowRanges(2)});
  add("segments", bshd, 66, 131, 8, 8, {Segments(3, true)});
  add("blocks", bhsd, 66, 131, 8, 8, {BlockSparse(17, 33)});
  TermSpec band = Band(TANDEM_ALIGN_TOP_LEFT, 0, 0);
  band.widths_per_head = band.prefix = true;
  add("band", bhsd, 66, 131, 8, 8, {band, Lengths(true, true)});
  add("bias", bhsd, 66, 131, 40, 40, {});
  specs.back().bias.dtype = TANDEM_DTYPE_F16;
  add("bias_f32_keys", bhsd, 66, 131, 40, 40, {});
  specs.back().bias.dtype = TANDEM_DTYPE_F32;
  specs.back().bias.per_row = specs.back().bias.per_head = false;
  add("columns", bhsd, 66, 70, 40, 40, {});
  specs.back().k_strides.order = specs.back().v_strides.order = {0, 1, 3, 2};
  specs.back().q_strides.order = specs.back().out_strides.order = {3, 0, 1, 2};
  CaseSpec packed = specs[1];
  packed.name = "packed";
  packed.layout = TANDEM_LAYOUT_THD;
  packed.q_lens = {33, 0, 65};
  packed.kv_lens = {67, 5, 0};
  packed.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
  specs.push_back(packed);
  return specs;
}

using Parameter = std::tuple<Kernel, CaseSpec>;
class GuardSmall : public ::testing::TestWithParam<Parameter> {};

TEST_P(GuardSmall, NothingBesideTheTensorsIsTouched) {
  for (const Placement placement : {Placement::kGuardBefore, Placement::kGuardAfter}) {
    for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
      CaseSpec spec = std::get<1>(GetParam());
      spec.dtype = dtype;
      spec.placement = placement;
      CheckKernel(std::get<0>(GetParam()), spec);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Placements, GuardSmall,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(Specs())),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
