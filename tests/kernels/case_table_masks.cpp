// Cases of every mask term, of their conjunctions, and of what is empty.
#include "tests/kernels/case_table_parts.h"

namespace tandem::test {

void AddTerms(Table* table) {
  std::vector<TermSpec> terms = {
      Causal(kTopLeft),
      Causal(kBottomRight),
      Band(kTopLeft, 20, 5),
      Band(kBottomRight, 40, 0),
      Band(kBottomRight, 0, 0),
      RowRanges(1),
      RowRanges(3),
      Lengths(true, true),
      Lengths(false, true),
      Segments(3, true),
      Segments(3, false),
      Dense(2),
      Dense(3),
      Dense(4),
      Dense(2, TANDEM_DTYPE_BIT),
      Dense(3, TANDEM_DTYPE_BIT),
      Dense(4, TANDEM_DTYPE_BIT),
      BlockSparse(64, 64),
      BlockSparse(7, 33),
      BlockSparse(128, 1),
  };
  TermSpec prefix = Causal(kBottomRight);
  prefix.prefix = true;
  terms.push_back(prefix);
  TermSpec heads = Band(kTopLeft, 0, 0);
  heads.widths_per_head = true;
  terms.push_back(heads);
  TermSpec padding = Dense(4);
  padding.per_head = padding.per_row = false;
  padding.density = 0.8;
  terms.push_back(padding);
  TermSpec transposed = Dense(4);
  transposed.strides.order = {1, 0, 3, 2};
  transposed.strides.padding = {0, 1, 2, 3};
  transposed.strides.negative = 8;
  terms.push_back(transposed);
  TermSpec full_lists = BlockSparse(32, 32);
  full_lists.full_lists = true;
  terms.push_back(full_lists);
  for (size_t n = 0; n < terms.size(); ++n) {
    const tandem_dtype dtype = kTypes[n % 3];
    CaseSpec spec =
        Base("term" + std::to_string(n) + "_" + Describe(terms[n]) + "_" + Name(dtype), dtype);
    spec.q_rows = 150;
    spec.kv_rows = 200;
    spec.terms = {terms[n]};
    table->Add(spec);
  }
  // Several tiles of rows and keys, some of them empty and some full by these terms.
  TermSpec window = Band(kBottomRight, 100, 0);
  window.prefix = true;
  const std::vector<TermSpec> conjunctions[] = {
      {window},
      {Segments(4, true), Causal(kTopLeft)},
      {Segments(3, false), Lengths(false, true)},
      {RowRanges(3), Dense(4)},
      {BlockSparse(96, 48), window},
      {Segments(2, true), RowRanges(1), BlockSparse(128, 128)},
  };
  for (size_t n = 0; n < std::size(conjunctions); ++n) {
    CaseSpec spec = Base("tiles_conjunction" + std::to_string(n),
                         n % 2 == 0 ? TANDEM_DTYPE_BF16 : TANDEM_DTYPE_F16);
    spec.q_rows = 400;
    spec.kv_rows = 700;
    spec.qk_dim = spec.v_dim = n % 3 == 0 ? 128 : 64;
    spec.terms = conjunctions[n];
    table->Add(spec);
  }
  for (uint64_t n = 0; n < 9; ++n) {
    Random random(n + 5);
    CaseSpec spec = Base("conjunction" + std::to_string(n), kTypes[n % 3]);
    spec.q_rows = 140;
    spec.kv_rows = 170;
    spec.q_heads = 4;
    for (uint64_t term = 0; term < 2 + n % 3; ++term) spec.terms.push_back(RandomTerm(random));
    if (n % 4 == 3) spec.terms.push_back(Lengths(true, true));
    table->Add(spec);
  }
}

void AddEmpty(Table* table) {
  for (const tandem_dtype dtype : kTypes) {
    CaseSpec spec = Base("nothing_visible_" + Name(dtype), dtype);
    TermSpec dense = Dense(2);
    dense.density = 0.0;
    dense.tiles = false;
    spec.terms = {dense};
    table->Add(spec);
    spec = Base("rows_before_the_keys_" + Name(dtype), dtype);  // bottom-right, more rows than keys
    spec.q_rows = 200;
    spec.kv_rows = 70;
    spec.terms = {Causal(kBottomRight)};
    table->Add(spec);
    spec = Base("zero_lengths_" + Name(dtype), dtype);
    spec.batch = 3;
    spec.q_lens = {65, 0, 10};
    spec.kv_lens = {0, 130, 129};
    spec.terms = {Lengths(true, true)};
    table->Add(spec);
    spec.name = "zero_lengths_sink_" + Name(dtype);
    spec.sink = true;
    table->Add(spec);
  }
}

}  // namespace tandem::test
