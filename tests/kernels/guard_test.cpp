// Memory beside the tensors: every input, mask array and output lies against a page that may not be
// touched, first at its left end, then at its right.
#include <gtest/gtest.h>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

std::vector<CaseSpec> Specs() {
  std::vector<CaseSpec> specs = CasesWithEdges();
  const auto add = [&](const char* name, tandem_layout layout, int64_t dim,
                       std::vector<TermSpec> terms) {
    specs.push_back(
        SizedCase(name, layout, 66, 131, dim, dim, std::move(terms), specs.size() + 50));
  };
  const tandem_layout bhsd = TANDEM_LAYOUT_BHSD;
  add("bools", bhsd, 8, {Dense(4)});
  add("bits", bhsd, 8, {Dense(4, TANDEM_DTYPE_BIT)});
  add("ranges", bhsd, 8, {RowRanges(2)});
  add("segments", TANDEM_LAYOUT_BSHD, 8, {Segments(3, true)});
  add("blocks", bhsd, 8, {BlockSparse(17, 33)});
  TermSpec band = Band(TANDEM_ALIGN_TOP_LEFT, 0, 0);
  band.widths_per_head = band.prefix = true;
  add("band", bhsd, 8, {band, Lengths(true, true)});
  add("bias", bhsd, 40, {});
  specs.back().bias.dtype = TANDEM_DTYPE_F16;
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
