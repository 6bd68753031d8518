#include "tests/kernels/poison.h"

#include <cmath>

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

}  // namespace

std::vector<CaseSpec> PoisonSpecs() {
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
  CaseSpec wide = Base("wide", {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Dense(2)});
  wide.qk_dim = 160;
  wide.v_dim = 192;
  specs.push_back(wide);
  wide.name = "wider_segments";
  wide.v_dim = 256;
  wide.terms = {Segments(4, true), Causal(TANDEM_ALIGN_TOP_LEFT)};
  specs.push_back(wide);
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
  CaseSpec terms = Base("softcap", {Causal(TANDEM_ALIGN_TOP_LEFT), Dense(2)});
  terms.softcap = 3.0f;
  specs.push_back(terms);
  terms.name = "dropout";
  terms.softcap = 0.0f;
  terms.dropout_rate = 0.4f;
  specs.push_back(terms);
  terms.name = "softcap_dropout_wide";
  terms.softcap = 3.0f;
  terms.v_dim = 192;
  specs.push_back(terms);
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

Invisible::Invisible(Case& c) {
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

}  // namespace tandem::test
