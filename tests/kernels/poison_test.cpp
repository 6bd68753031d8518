// Masked means absent: whatever lies at invisible places of q, k, v and bias changes no output bit;
// a NaN or infinity at a visible place shows in exactly the rows (and, of V, columns) that see it.
#include "tests/kernels/poison.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

using Parameter = std::tuple<Kernel, CaseSpec>;
class PoisonSmall : public ::testing::TestWithParam<Parameter> {
 protected:
  const Kernel& kernel() const { return std::get<0>(GetParam()); }
  CaseSpec Spec(tandem_dtype dtype) const {
    CaseSpec spec = std::get<1>(GetParam());
    spec.dtype = dtype;
    return spec;
  }
};

TEST_P(PoisonSmall, InvisiblePlacesChangeNoBit) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    Case c(Spec(dtype));
    if (!RunOrCountDeclined(kernel(), c)) continue;
    const std::vector<uint8_t> clean = c.OutputBytes();
    const Invisible invisible(c);
    for (int kind = 0; kind < 4; ++kind) {
      PoisonInvisible(c, invisible, kind);
      ASSERT_TRUE(RunOrCountDeclined(kernel(), c));
      EXPECT_EQ(c.OutputBytes(), clean) << "kind of poison " << kind << ", dtype " << dtype;
    }
  }
}

struct RowBytes {
  std::vector<float> out;
  float lse;
};

RowBytes ReadRow(Case& c, int64_t b, int64_t h, int64_t i) {
  RowBytes row;
  for (int64_t d = 0; d < c.spec().v_dim; ++d) {
    row.out.push_back(static_cast<float>(c.out().Get(c.QueryIndex(b, h, i, d))));
  }
  row.lse = static_cast<float>(c.lse()->Get(c.LseIndex(b, h, i)));
  return row;
}

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// One bad value in key row j of (b, key head), in K or in V: rows that do not see j keep every bit,
// rows that see it show it, in V in its column alone.
class OneBadValue {
 public:
  OneBadValue(const Kernel& kernel, const CaseSpec& spec) : kernel_(kernel), case_(spec) {}

  void Check(bool in_v, float bad, int64_t b, int64_t kv_head, int64_t j) {
    Case& c = case_;
    if (!RunOrCountDeclined(kernel_, c)) return;
    std::vector<RowBytes> clean;
    VisitRows(
        [&](int64_t row_b, int64_t h, int64_t i) { clean.push_back(ReadRow(c, row_b, h, i)); });
    const int64_t column = (in_v ? c.spec().v_dim : c.spec().qk_dim) / 2;
    Tensor& tensor = in_v ? c.v() : c.k();
    const Index place = c.KeyIndex(b, kv_head, j, column);
    const double before = tensor.Get(place);
    tensor.Set(place, bad);
    ASSERT_TRUE(RunOrCountDeclined(kernel_, c));
    ExpectAgreement(kernel_, c);
    const int64_t group = c.spec().q_heads / c.spec().kv_heads;
    size_t n = 0;
    VisitRows([&](int64_t row_b, int64_t h, int64_t i) {
      const RowBytes row = ReadRow(c, row_b, h, i);
      const RowBytes& was = clean[n++];
      const bool sees = row_b == b && h / group == kv_head && c.Visible(row_b, h, i, j);
      for (int64_t d = 0; d < c.spec().v_dim; ++d) {
        if (!sees) {
          ASSERT_TRUE(SameBits(row.out[d], was.out[d])) << Where(row_b, h, i) << " column " << d;
        } else if (in_v && d != column) {
          ASSERT_TRUE(std::isfinite(row.out[d])) << Where(row_b, h, i) << " column " << d;
        } else if (std::isnan(bad)) {
          ASSERT_TRUE(std::isnan(row.out[d])) << Where(row_b, h, i) << " column " << d;
        } else if (in_v) {
          ASSERT_FALSE(std::isfinite(row.out[d])) << Where(row_b, h, i) << " column " << d;
        }
      }
      if (!sees || in_v) {
        ASSERT_TRUE(SameBits(row.lse, was.lse)) << Where(row_b, h, i);
      } else if (std::isnan(bad)) {
        ASSERT_TRUE(std::isnan(row.lse)) << Where(row_b, h, i);
      }
    });
    tensor.Set(place, before);
  }

  Case& problem() { return case_; }

 private:
  template <typename Visit>
  void VisitRows(const Visit& visit) {
    for (int64_t b = 0; b < case_.batch(); ++b) {
      for (int64_t h = 0; h < case_.spec().q_heads; ++h) {
        for (int64_t i = 0; i < case_.sequence(b).q_rows; ++i) visit(b, h, i);
      }
    }
  }
  static std::string Where(int64_t b, int64_t h, int64_t i) {
    return "b " + std::to_string(b) + " head " + std::to_string(h) + " row " + std::to_string(i);
  }
  const Kernel& kernel_;
  Case case_;
};

TEST_P(PoisonSmall, VisibleBadValuesShowWhereTheyAreSeen) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    CaseSpec spec = Spec(dtype);
    spec.dropout_rate = 0.0f;  // a dropped pair need not show what it would have added
    OneBadValue test(kernel(), spec);
    Random random(spec.seed);
    for (const bool in_v : {false, true}) {
      for (const float bad : {__builtin_nanf(""), HUGE_VALF, -HUGE_VALF}) {
        const int64_t b = random.Below(test.problem().batch());
        if (test.problem().sequence(b).kv_rows == 0) continue;
        const int64_t j = random.Below(test.problem().sequence(b).kv_rows);
        test.Check(in_v, bad, b, random.Below(2), j);
        if (HasFailure())
          FAIL() << (in_v ? "V " : "K ") << bad << " dtype " << dtype << " key " << j;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Terms, PoisonSmall,
                         ::testing::Combine(::testing::ValuesIn(ForwardKernels()),
                                            ::testing::ValuesIn(PoisonSpecs())),
                         KernelAndCaseName());

}  // namespace
}  // namespace tandem::test
