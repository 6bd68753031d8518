// Masked means absent: whatever lies at invisible places of q, k, v and bias changes no output bit;
// a NaN or infinity at a visible place shows in exactly the rows (and, of V, columns) that see it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/kernels/agreement.h"
#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

CaseSpec Base(const char* name, std::vector<TermSpec> terms) {
  CaseSpec spec;
  spec.name = name;
  spec.batch = 2;
  spec.q_heads = 4;
  spec.kv_heads = 2;
  spec.q_rows = 100;
  spec.kv_rows = 150;
  spec.qk_dim = 40;
  spec.v_dim = 24;
  spec.terms = std::move(terms);
  spec.seed = 11;
  return spec;
}

std::vector<CaseSpec> Specs() {
  TermSpec heads = Dense(4);
  TermSpec prefix = Band(TANDEM_ALIGN_BOTTOM_RIGHT, 3, 0);
  prefix.prefix = true;
  std::vector<CaseSpec> specs = {
      Base("lengths", {Lengths(true, true)}),
      Base("causal", {Causal(TANDEM_ALIGN_TOP_LEFT)}),
      Base("window", {Band(TANDEM_ALIGN_BOTTOM_RIGHT, 9, 0)}),
      Base("prefix", {prefix}),
      Base("ranges", {RowRanges(2)}),
      Base("segments", {Segments(4, true)}),
      Base("dense", {Dense(2)}),
      Base("dense_heads", {heads}),
      Base("bits", {Dense(3, TANDEM_DTYPE_BIT)}),
      Base("blocks", {BlockSparse(16, 48)}),
      Base("conjunction", {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Dense(2), Segments(2, false)}),
  };
  CaseSpec bias = Base("bias", {Causal(TANDEM_ALIGN_TOP_LEFT)});
  bias.bias.dtype = TANDEM_DTYPE_F32;
  bias.bias.hidden = 0.2;
  bias.bias.hidden_rows = 0.1;
  specs.push_back(bias);
  bias.name = "bias_f16_sink_dropout";
  bias.bias.dtype = TANDEM_DTYPE_F16;
  bias.bias.per_head = false;
  bias.sink = true;
  bias.dropout_rate = 0.3f;
  specs.push_back(bias);
  CaseSpec packed = Base("packed", {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Lengths(true, true)});
  packed.layout = TANDEM_LAYOUT_THD;
  packed.q_lens = {70, 0, 40};
  packed.kv_lens = {90, 33, 64};
  packed.packed_lead = 3;
  packed.packed_tail = 5;
  specs.push_back(packed);
  CaseSpec shard = Base("shard", {Dense(2), Causal(TANDEM_ALIGN_TOP_LEFT)});
  shard.global_q_len = 190;
  shard.global_kv_len = 230;
  shard.q_offset = 70;
  shard.kv_offset = 33;
  specs.push_back(shard);
  return specs;
}

// Which key rows (of a key head) and query rows nobody needs, and which bias elements.
struct Invisible {
  explicit Invisible(Case& c) {
    const int64_t group = c.spec().q_heads / c.spec().kv_heads;
    // Rows that no sequence owns are never needed.
    key_is_needed.assign(c.k().Count(), false);
    query_is_needed.assign(c.q().Count(), false);
    if (c.bias()) bias_is_needed.assign(c.bias()->Count(), false);
    for (int64_t b = 0; b < c.batch(); ++b) {
      for (int64_t h = 0; h < c.spec().q_heads; ++h) {
        for (int64_t i = 0; i < c.sequence(b).q_rows; ++i) {
          for (int64_t j = 0; j < c.sequence(b).kv_rows; ++j) {
            if (!c.TermsAllow(b, h, i, j)) continue;
            if (c.bias()) bias_is_needed[Flat(*c.bias(), c.BiasIndex(b, h, i, j))] = true;
            if (!c.Visible(b, h, i, j)) continue;
            key_is_needed[Flat(c.k(), c.KeyIndex(b, h / group, j, 0))] = true;
            query_is_needed[Flat(c.q(), c.QueryIndex(b, h, i, 0))] = true;
          }
        }
      }
    }
  }
  // Position of an index in row-major order.
  static int64_t Flat(const Tensor& tensor, std::span<const int64_t> index) {
    int64_t flat = 0;
    for (size_t d = 0; d < index.size(); ++d) flat = flat * tensor.shape()[d] + index[d];
    return flat;
  }
  static int64_t FlatRow(const Tensor& tensor, std::span<const int64_t> index) {
    std::vector<int64_t> row(index.begin(), index.end());
    row.back() = 0;
    return Flat(tensor, row);
  }
  std::vector<bool> key_is_needed, query_is_needed, bias_is_needed;
};

float Poison(int kind, Random& random) {
  switch (kind) {
    case 0:
      return __builtin_nanf("");
    case 1:
      return HUGE_VALF;
    case 2:
      return -HUGE_VALF;
    default:
      return random.Pick({__builtin_nanf("0x12345"), HUGE_VALF, -HUGE_VALF, 3e38f});
  }
}

void PoisonInvisible(Case& c, const Invisible& invisible, int kind) {
  Random random(static_cast<uint64_t>(kind));
  c.q().ForEach([&](std::span<const int64_t> index) {
    if (!invisible.query_is_needed[Invisible::FlatRow(c.q(), index)]) {
      c.q().Set(index, Poison(kind, random));
    }
  });
  c.k().ForEach([&](std::span<const int64_t> index) {
    if (!invisible.key_is_needed[Invisible::FlatRow(c.k(), index)]) {
      c.k().Set(index, Poison(kind, random));
    }
  });
  c.v().ForEach([&](std::span<const int64_t> index) {
    std::vector<int64_t> key(index.begin(), index.end());
    key.back() = 0;
    if (!invisible.key_is_needed[Invisible::Flat(c.k(), key)]) {
      c.v().Set(index, Poison(kind, random));
    }
  });
  if (!c.bias()) return;
  c.bias()->ForEach([&](std::span<const int64_t> index) {
    if (!invisible.bias_is_needed[Invisible::Flat(*c.bias(), index)]) {
      c.bias()->Set(index, Poison(kind, random));
    }
  });
}

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
    const std::vector<int64_t> place = c.KeyIndex(b, kv_head, j, column);
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
                         ::testing::Combine(::testing::ValuesIn(AvailableKernels()),
                                            ::testing::ValuesIn(Specs())),
                         [](const ::testing::TestParamInfo<Parameter>& info) {
                           return TestName(std::get<0>(info.param).name + "__" +
                                           std::get<1>(info.param).name);
                         });

}  // namespace
}  // namespace tandem::test
