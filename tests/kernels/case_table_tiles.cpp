// Cases of several tiles, and of head dimensions that have tiles of their own.
#include "tests/kernels/case_table_parts.h"

namespace tandem::test {
namespace {

struct Sizes {
  const char* name;
  int64_t q_rows, kv_rows, qk_dim, v_dim;
  std::vector<TermSpec> terms;
};

// The n-th case of a list, counted from 1: layouts, groups, sinks and types of the output take
// turns.
CaseSpec OfShape(const char* prefix, const Sizes& shape, tandem_dtype dtype, int n) {
  CaseSpec spec = Base(prefix + std::string(shape.name) + "_" + Name(dtype), dtype);
  spec.layout = n % 3 == 0 ? TANDEM_LAYOUT_BSHD : TANDEM_LAYOUT_BHSD;
  spec.q_rows = shape.q_rows;
  spec.kv_rows = shape.kv_rows;
  spec.qk_dim = shape.qk_dim;
  spec.v_dim = shape.v_dim;
  spec.terms = shape.terms;
  spec.kv_heads = n % 2 + 1;
  spec.sink = n % 4 == 0;
  spec.out_f32 = n % 5 == 0;
  return spec;
}

// Packed sequences of a type, causal, some without rows or keys.
CaseSpec SeveralPacked(CaseSpec spec) {
  spec.layout = TANDEM_LAYOUT_THD;
  spec.q_lens = {300, 70, 0, 129, 20, 400};
  spec.kv_lens = {300, 200, 33, 0, 140, 391};
  spec.terms = {Causal(kBottomRight)};
  return spec;
}

}  // namespace

// Several blocks of rows and of keys, for kernels of large tiles; sizes that divide nothing.
void AddSeveralTiles(Table* table) {
  TermSpec prefix = Causal(kBottomRight);
  prefix.prefix = true;
  const Sizes shapes[] = {
      {"none", 200, 333, 64, 64, {}},
      {"causal", 270, 270, 128, 128, {Causal(kTopLeft)}},
      {"causal_more_keys", 129, 450, 80, 48, {Causal(kBottomRight)}},
      {"window", 400, 400, 40, 120, {Band(kBottomRight, 150, 0)}},
      {"prefix", 257, 300, 64, 64, {prefix}},
      {"padding", 193, 390, 128, 64, {Lengths(true, true)}},
      {"dense", 210, 333, 72, 128, {Dense(4)}},
      {"dense_causal", 333, 333, 64, 40, {Dense(3, TANDEM_DTYPE_BIT), Causal(kBottomRight)}},
  };
  int n = 0;
  for (const auto& shape : shapes) {
    const tandem_dtype dtype = kTypes[++n % 2 + 1];
    table->Add(OfShape("tiles_", shape, dtype, n));
  }
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    // A row's maximum leaves that of its first tile far behind.
    CaseSpec spec = Base("tiles_spread_scores_" + Name(dtype), dtype);
    spec.q_rows = 150;
    spec.kv_rows = 600;
    spec.scale = 6.0f;
    table->Add(spec);
    spec.name = "tiles_spread_scores_dense_" + Name(dtype);
    spec.terms = {Dense(4)};
    spec.qk_dim = spec.v_dim = 128;
    table->Add(spec);
    table->Add(SeveralPacked(Base("tiles_packed_" + Name(dtype), dtype)));
  }
}

// Head dimensions beyond 128, for which kernels have tiles of their own: each term that changes how
// a tile is evaluated, over several tiles of rows and keys.
void AddWideHeads(Table* table) {
  TermSpec prefix = Band(kBottomRight, 100, 0);
  prefix.prefix = true;
  const Sizes shapes[] = {
      {"none", 200, 333, 256, 256, {}},
      {"causal", 270, 270, 192, 128, {Causal(kTopLeft)}},
      {"more_keys", 129, 450, 136, 192, {Causal(kBottomRight)}},
      {"window", 400, 400, 256, 64, {Band(kBottomRight, 150, 0)}},
      {"padding", 193, 390, 160, 160, {Lengths(true, true)}},
      {"dense", 210, 333, 40, 256, {Dense(4)}},
      {"dense_causal", 333, 333, 192, 192, {Dense(3, TANDEM_DTYPE_BIT), Causal(kBottomRight)}},
      {"segments", 300, 300, 256, 256, {Segments(4, true), Causal(kTopLeft)}},
      {"ranges_dense", 300, 456, 192, 192, {RowRanges(3), Dense(3)}},
      {"blocks", 300, 456, 200, 256, {BlockSparse(128, 64), prefix}},
  };
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    int n = 0;
    for (const auto& shape : shapes) {
      CaseSpec spec = OfShape("wide_", shape, dtype, ++n);
      spec.scale = n == 4 ? -0.05f : spec.scale;
      table->Add(spec);
      if (n % 2 != 0) continue;
      spec.name = std::string("wide_bias_") + shape.name + "_" + Name(dtype);
      spec.kv_rows = 456;
      spec.bias.dtype = dtype;
      spec.bias.per_row = n % 4 != 0;
      spec.bias.hidden = 0.2;
      spec.bias.hidden_rows = spec.bias.lowest_rows = 0.2;
      table->Add(spec);
      spec.name = std::string("wide_alibi_") + shape.name + "_" + Name(dtype);
      spec.bias = {};
      spec.alibi_rank = 1;
      table->Add(spec);
    }
    // A row's maximum leaves that of its first tile far behind.
    CaseSpec spec = Base("wide_spread_scores_" + Name(dtype), dtype);
    spec.qk_dim = spec.v_dim = dtype == TANDEM_DTYPE_F16 ? 192 : 256;
    spec.q_rows = 150;
    spec.kv_rows = 600;
    spec.scale = 6.0f;
    table->Add(spec);
    spec.name = "wide_packed_" + Name(dtype);
    spec.scale = 0.1f;
    table->Add(SeveralPacked(spec));
  }
}

// Softcap and dropout over several tiles, alone and together, with every kind of mask term.
void AddScoreTerms(Table* table) {
  const struct {
    Sizes sizes;
    float softcap;
    float dropout_rate;
  } shapes[] = {
      {{"none", 200, 333, 64, 64, {}}, 20.0f, 0.2f},
      {{"causal", 270, 270, 128, 128, {Causal(kTopLeft)}}, 0.0f, 0.1f},
      {{"dense_causal", 333, 333, 64, 40, {Dense(3), Causal(kBottomRight)}}, 0.0f, 0.5f},
      {{"segments", 300, 300, 256, 256, {Segments(4, true), Causal(kTopLeft)}}, 30.0f, 0.0f},
      {{"padding", 193, 390, 192, 160, {Lengths(true, true)}}, 0.0f, 0.3f},
      {{"ranges", 210, 456, 128, 72, {RowRanges(2)}}, 2.0f, 0.1f},
      {{"dense", 200, 333, 128, 128, {Dense(4)}}, 5.0f, 0.0f},
      {{"blocks", 300, 456, 256, 128, {BlockSparse(128, 128)}}, 1000.0f, 0.9f},
  };
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    int n = 0;
    for (const auto& shape : shapes) {
      CaseSpec spec = OfShape("terms_", shape.sizes, dtype, ++n);
      spec.softcap = shape.softcap;
      spec.dropout_rate = shape.dropout_rate;
      spec.scale = n == 6 ? -0.7f : spec.scale;
      table->Add(spec);
    }
    // A row's maximum leaves that of its first tile far behind.
    CaseSpec spec = Base("terms_spread_scores_" + Name(dtype), dtype);
    spec.q_rows = 150;
    spec.kv_rows = 600;
    spec.scale = 6.0f;
    spec.dropout_rate = 0.2f;
    table->Add(spec);
    spec.name = "terms_spread_softcap_" + Name(dtype);
    spec.softcap = 100.0f;
    spec.qk_dim = spec.v_dim = 128;
    table->Add(spec);
    spec.name = "terms_packed_" + Name(dtype);
    spec.scale = 0.1f;
    table->Add(SeveralPacked(spec));
    spec.name = "terms_shard_" + Name(dtype);
    spec.q_rows = 140;
    spec.kv_rows = 210;
    spec.q_offset = 70;
    spec.kv_offset = 36;
    spec.global_q_len = 230;
    spec.global_kv_len = 260;
    table->Add(spec);
  }
}

}  // namespace tandem::test
