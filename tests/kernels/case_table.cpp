#include "tests/kernels/case_table.h"

#include "tests/kernels/case_table_parts.h"

namespace tandem::test {
namespace {

void AddShapes(Table* table) {
  const std::array<int64_t, 8> sizes = {1, 17, 63, 64, 65, 127, 129, 1023};
  for (size_t n = 0; n < sizes.size(); ++n) {
    CaseSpec spec = Base("rows_" + std::to_string(sizes[n]), kTypes[n % 3]);
    spec.batch = 1;
    spec.q_rows = sizes[n];
    spec.kv_rows = sizes[(n * 5 + 3) % sizes.size()];
    table->Add(spec);
    spec.name += "_causal";
    spec.terms = {Causal(n % 2 == 0 ? kBottomRight : kTopLeft)};
    spec.kv_rows = sizes[(n * 3 + 6) % sizes.size()];
    table->Add(spec);
  }
  for (const tandem_dtype dtype : kTypes) {
    for (const int64_t dim : {1, 3, 8, 40, 64, 80, 96, 128, 160, 256, 512}) {
      CaseSpec spec = Base("dim_" + std::to_string(dim) + "_" + Name(dtype), dtype);
      spec.batch = 1;
      spec.q_rows = 33;
      spec.kv_rows = 70;
      spec.qk_dim = spec.v_dim = dim;
      table->Add(spec);
    }
  }
  const int64_t unequal[][2] = {{64, 128}, {128, 64}, {192, 128}, {3, 40}, {1, 200}, {256, 8}};
  for (const auto& [qk_dim, v_dim] : unequal) {
    CaseSpec spec = Base("dims_" + std::to_string(qk_dim) + "_" + std::to_string(v_dim),
                         qk_dim == 192 ? TANDEM_DTYPE_BF16 : TANDEM_DTYPE_F32);
    spec.qk_dim = qk_dim;
    spec.v_dim = v_dim;
    table->Add(spec);
  }
  for (const int64_t group : {2, 3, 4, 8}) {
    for (const tandem_layout layout : {TANDEM_LAYOUT_BHSD, TANDEM_LAYOUT_BSHD}) {
      CaseSpec spec =
          Base("gqa_" + std::to_string(group) + (layout == TANDEM_LAYOUT_BHSD ? "_bhsd" : "_bshd"),
               kTypes[group % 3]);
      spec.layout = layout;
      spec.kv_heads = group == 8 ? 1 : 2;
      spec.q_heads = group * spec.kv_heads;
      spec.q_rows = group == 8 ? 1 : 20;
      spec.terms = {Causal(kBottomRight)};
      table->Add(spec);
    }
  }
  for (const tandem_dtype dtype : kTypes) {
    CaseSpec spec = Base("bshd_" + Name(dtype), dtype);
    spec.layout = TANDEM_LAYOUT_BSHD;
    table->Add(spec);
    spec = Base("no_lse_" + Name(dtype), dtype);
    spec.lse = false;
    table->Add(spec);
    spec = Base("out_f32_" + Name(dtype), dtype);
    spec.out_f32 = true;
    table->Add(spec);
  }
  // Few rows and many keys: split over the keys.
  for (const tandem_dtype dtype : kTypes) {
    CaseSpec spec = Base("decode_" + Name(dtype), dtype);
    spec.q_heads = 8;
    spec.q_rows = 1;
    spec.kv_rows = 1300;
    spec.qk_dim = spec.v_dim = 64;
    spec.terms = {Lengths(false, true)};
    table->Add(spec);
    spec.name = "decode_window_" + Name(dtype);
    spec.q_rows = 3;
    spec.qk_dim = 72;
    spec.v_dim = 40;
    spec.terms = {Band(kBottomRight, 600, 0)};
    spec.sink = true;
    table->Add(spec);
    spec.name = "decode_dense_" + Name(dtype);
    spec.terms = {Dense(4)};
    spec.dropout_rate = 0.2f;
    table->Add(spec);
  }
  CaseSpec nothing = Base("no_keys");
  nothing.kv_rows = 0;
  table->Add(nothing);
  nothing = Base("no_rows");
  nothing.q_rows = 0;
  table->Add(nothing);
  nothing = Base("no_batch");
  nothing.batch = 0;
  table->Add(nothing);
}
void AddScores(Table* table) {
  for (const tandem_dtype dtype : kTypes) {
    for (const float scale : {0.0f, -0.3f, 1e4f, 1e-20f}) {
      CaseSpec spec = Base("scale_" + std::to_string(static_cast<int>(scale * 10)) + "_" +
                               (scale == 1e-20f ? "tiny_" : "") + Name(dtype),
                           dtype);
      spec.scale = scale;
      table->Add(spec);
    }
    for (const float softcap : {2.0f, 50.0f}) {
      CaseSpec spec =
          Base("softcap_" + std::to_string(static_cast<int>(softcap)) + "_" + Name(dtype), dtype);
      spec.softcap = softcap;
      spec.scale = softcap == 2.0f ? -1.0f : 0.5f;
      spec.terms = {Causal(kTopLeft)};
      table->Add(spec);
    }
    for (const tandem_alignment alignment : {kTopLeft, kBottomRight}) {
      CaseSpec spec =
          Base((alignment == kTopLeft ? "alibi_tl_" : "alibi_br_") + Name(dtype), dtype);
      spec.alibi_rank = alignment == kTopLeft ? 1 : 2;
      spec.alibi_alignment = alignment;
      spec.terms = {Lengths(true, true)};
      table->Add(spec);
    }
    CaseSpec spec = Base("large_scores_" + Name(dtype), dtype);
    spec.magnitude = 6.0;
    table->Add(spec);
    spec = Base("sink_" + Name(dtype), dtype);
    spec.sink = true;
    spec.terms = {Lengths(true, true), Causal(kBottomRight)};
    table->Add(spec);
    spec = Base("dropout_" + Name(dtype), dtype);
    spec.dropout_rate = 0.3f;
    spec.terms = {Causal(kBottomRight)};
    table->Add(spec);
  }
  CaseSpec spec = Base("dropout_almost_all_sink");
  spec.dropout_rate = 0.99f;
  spec.sink = true;
  table->Add(spec);
}

void AddBiases(Table* table) {
  const struct {
    const char* name;
    int rank;
    bool batch, head, row, key;
  } shapes[] = {
      {"full", 4, true, true, true, true},   {"heads", 4, false, true, true, true},
      {"keys", 4, true, false, false, true}, {"rows", 4, false, false, true, false},
      {"rank3", 3, true, true, true, true},  {"rank2", 2, true, true, true, true},
  };
  int n = 0;
  for (const auto& shape : shapes) {
    for (const bool hidden : {false, true}) {
      ++n;
      const tandem_dtype bias_dtype = kTypes[n % 3];
      CaseSpec spec = Base(
          std::string("bias_") + shape.name + "_" + Name(bias_dtype) + (hidden ? "_hidden" : ""),
          kTypes[(n / 3) % 3]);
      spec.bias = {bias_dtype, shape.rank, shape.batch, shape.head, shape.row,
                   shape.key,  0,          0,           0,          {}};
      if (hidden) {
        spec.bias.hidden = 0.3;
        spec.bias.hidden_rows = 0.2;
        spec.bias.lowest_rows = 0.2;
      }
      table->Add(spec);
    }
  }
  // Of the type of q, rows of whole 16-byte chunks, several tiles, beside each kind of mask.
  TermSpec prefix = Band(kBottomRight, 100, 0);
  prefix.prefix = true;
  const std::vector<TermSpec> masks[] = {
      {},
      {Causal(kBottomRight)},
      {Lengths(true, true), Band(kTopLeft, 150, 20)},
      {Segments(3, true), Causal(kTopLeft)},
      {RowRanges(2), Dense(3)},
      {BlockSparse(48, 80), prefix},
  };
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    for (size_t m = 0; m < std::size(masks); ++m) {
      CaseSpec spec = Base("bias_tiles" + std::to_string(m) + "_" + Name(dtype), dtype);
      const auto& shape = shapes[(m + (dtype == TANDEM_DTYPE_F16 ? 0 : 1)) % 3];
      spec.bias = {dtype,     shape.rank, shape.batch, shape.head, shape.row,
                   shape.key, 0.0,        0.0,         0.0,        {}};
      spec.qk_dim = spec.v_dim = m % 2 == 0 ? 64 : 128;
      spec.q_heads = 4;
      spec.q_rows = 333;
      spec.kv_rows = 456;
      spec.terms = masks[m];
      table->Add(spec);
      spec.name += "_hidden";
      spec.bias.hidden = 0.3;
      spec.bias.hidden_rows = 0.2;
      spec.bias.lowest_rows = 0.2;
      table->Add(spec);
    }
  }
  CaseSpec spec = Base("bias_transposed_conjunction", TANDEM_DTYPE_BF16);
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.hidden = 0.2;
  spec.bias.strides.order = {0, 1, 3, 2};
  spec.bias.strides.negative = 4;
  spec.terms = {Causal(kBottomRight), Segments(2, true)};
  table->Add(spec);
}

void AddPacked(Table* table) {
  for (const tandem_dtype dtype : kTypes) {
    CaseSpec spec = Base("packed_" + Name(dtype), dtype);
    spec.layout = TANDEM_LAYOUT_THD;
    spec.q_lens = {70, 0, 1, 130, 64, 5};
    spec.kv_lens = {90, 33, 0, 130, 65, 200};
    spec.q_heads = 4;
    table->Add(spec);
    spec.name = "packed_gaps_" + Name(dtype);
    spec.packed_lead = 3;
    spec.packed_tail = 7;
    spec.cu_dtype = TANDEM_DTYPE_I64;
    spec.terms = {Causal(kBottomRight), Lengths(true, true)};
    table->Add(spec);
    spec.name = "packed_tree_" + Name(dtype);
    TermSpec tree = Dense(2, dtype == TANDEM_DTYPE_F16 ? TANDEM_DTYPE_BOOL : TANDEM_DTYPE_BIT);
    tree.offsets = true;
    spec.terms = {tree};
    table->Add(spec);
    spec.name = "packed_everything_" + Name(dtype);
    spec.terms = {Segments(2, true), Dense(4), Band(kBottomRight, 60, 10)};
    spec.bias.dtype = TANDEM_DTYPE_F16;
    spec.bias.hidden = 0.1;
    spec.alibi_rank = 2;
    spec.sink = true;
    spec.dropout_rate = 0.1f;
    table->Add(spec);
  }
}

void AddMemory(Table* table) {
  for (const tandem_dtype dtype : kTypes) {
    CaseSpec spec = Base("permuted_" + Name(dtype), dtype);
    spec.q_strides.order = {3, 1, 0, 2};
    spec.k_strides.order = {1, 0, 3, 2};
    spec.v_strides.order = {2, 3, 0, 1};
    spec.out_strides.order = {3, 2, 1, 0};
    spec.lse_strides.order = {2, 0, 1};
    table->Add(spec);
    spec = Base("padded_negative_" + Name(dtype), dtype);
    spec.q_strides = {{}, {1, 2, 3, 5}, 0b1111, 0};
    spec.k_strides = {{}, {0, 1, 0, 3}, 0b0100, 0};
    spec.v_strides = {{}, {2, 0, 1, 0}, 0b1000, 0};
    spec.out_strides = {{}, {1, 3, 2, 7}, 0b0101, 0};
    spec.lse_strides = {{}, {1, 1, 1}, 0b111, 0};
    table->Add(spec);
    spec = Base("broadcast_inputs_" + Name(dtype), dtype);
    spec.q_strides.broadcast = 0b0010;
    spec.k_strides.broadcast = 0b0101;
    spec.v_strides.broadcast = 0b0011;
    table->Add(spec);
    spec = Base("misaligned_" + Name(dtype), dtype);
    spec.placement = Placement::kMisaligned;
    spec.qk_dim = 65;
    spec.v_dim = 33;
    spec.bias.dtype = dtype;
    table->Add(spec);
  }
}

}  // namespace

CaseSpec SizedCase(const char* name, tandem_layout layout, int64_t q_rows, int64_t kv_rows,
                   int64_t qk_dim, int64_t v_dim, std::vector<TermSpec> terms, uint64_t seed) {
  CaseSpec spec;
  spec.name = name;
  spec.layout = layout;
  spec.q_heads = 2;
  spec.q_rows = q_rows;
  spec.kv_rows = kv_rows;
  spec.qk_dim = qk_dim;
  spec.v_dim = v_dim;
  spec.terms = std::move(terms);
  spec.seed = seed;
  return spec;
}

std::vector<CaseSpec> CasesWithEdges() {
  const tandem_layout bhsd = TANDEM_LAYOUT_BHSD, bshd = TANDEM_LAYOUT_BSHD;
  const TermSpec causal = Causal(TANDEM_ALIGN_BOTTOM_RIGHT);
  CaseSpec ragged = SizedCase("ragged_bshd", bshd, 65, 67, 64, 33, {causal}, 40);
  CaseSpec packed = SizedCase("packed", TANDEM_LAYOUT_THD, 65, 67, 37, 5, {causal}, 41);
  packed.q_lens = {33, 0, 65};
  packed.kv_lens = {67, 5, 0};
  CaseSpec bias = SizedCase("bias_f32_keys", bhsd, 66, 131, 40, 40, {}, 42);
  bias.bias.dtype = TANDEM_DTYPE_F32;
  bias.bias.per_row = bias.bias.per_head = false;
  CaseSpec columns = SizedCase("columns", bhsd, 66, 70, 40, 40, {}, 43);
  columns.k_strides.order = columns.v_strides.order = {0, 1, 3, 2};
  columns.q_strides.order = columns.out_strides.order = {3, 0, 1, 2};
  return {SizedCase("one", bhsd, 1, 1, 1, 1, {}, 44),
          SizedCase("ragged", bhsd, 65, 67, 37, 5, {}, 45),
          ragged,
          SizedCase("wide", bhsd, 7, 129, 257, 300, {}, 46),
          bias,
          columns,
          packed};
}

CaseSpec SequencesOfKeys(const char* name, tandem_dtype dtype, int64_t q_rows, int64_t kv_rows,
                         int64_t qk_dim, int64_t v_dim) {
  CaseSpec spec = SizedCase(name, TANDEM_LAYOUT_BSHD, q_rows, kv_rows, qk_dim, v_dim,
                            {Causal(TANDEM_ALIGN_BOTTOM_RIGHT), Lengths(true, true)}, 7);
  spec.dtype = dtype;
  spec.batch = 4;
  spec.q_heads = 6;
  spec.kv_heads = 2;
  spec.q_lens = std::vector<int64_t>(4, q_rows);
  spec.kv_lens = {kv_rows, 0, 65, 321};
  return spec;
}

CaseSpec WithBatch(CaseSpec spec, int64_t batch) {
  spec.batch = batch;
  if (spec.layout != TANDEM_LAYOUT_THD) return spec;
  for (std::vector<int64_t>* lens : {&spec.q_lens, &spec.kv_lens}) {
    while (static_cast<int64_t>(lens->size()) < batch) lens->push_back(17);
    lens->resize(static_cast<size_t>(batch));
  }
  return spec;
}

std::vector<CaseSpec> CaseTable() {
  Table table;
  AddShapes(&table);
  AddScores(&table);
  AddBiases(&table);
  AddTerms(&table);
  AddEmpty(&table);
  AddPacked(&table);
  AddMemory(&table);
  AddSeveralTiles(&table);
  AddWideHeads(&table);
  AddScoreTerms(&table);
  return table.Take();
}

std::ostream& operator<<(std::ostream& stream, const CaseSpec& spec) { return stream << spec.name; }

}  // namespace tandem::test
