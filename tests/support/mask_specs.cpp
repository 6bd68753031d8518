// The vocabulary of term specs: short names for tables of cases, and random ones.
#include <sstream>

#include "tests/support/mask_terms.h"

namespace tandem::test {

TermSpec Band(tandem_alignment alignment, int32_t left, int32_t right) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_BAND;
  spec.alignment = alignment;
  spec.left = left;
  spec.right = right;
  return spec;
}

TermSpec Causal(tandem_alignment alignment) { return Band(alignment, -1, 0); }

TermSpec RowRanges(int64_t ranges) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_ROW_RANGES;
  spec.ranges = ranges;
  return spec;
}

TermSpec Lengths(bool q, bool kv) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_LENGTHS;
  spec.q_lengths = q;
  spec.kv_lengths = kv;
  return spec;
}

TermSpec Segments(int32_t segments, bool sorted) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_SEGMENTS;
  spec.segments = segments;
  spec.sorted = sorted;
  return spec;
}

TermSpec Dense(int rank, tandem_dtype dtype) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_DENSE;
  spec.rank = rank;
  spec.dtype = dtype;
  return spec;
}

TermSpec BlockSparse(int32_t q_block, int32_t kv_block) {
  TermSpec spec;
  spec.kind = TANDEM_MASK_BLOCK_SPARSE;
  spec.q_block = q_block;
  spec.kv_block = kv_block;
  return spec;
}

TermSpec RandomTerm(Random& random) {
  TermSpec spec;
  switch (random.Below(5)) {
    case 0: {
      spec = Band(random.Pick({TANDEM_ALIGN_TOP_LEFT, TANDEM_ALIGN_BOTTOM_RIGHT}),
                  random.Pick({-1, 0, 5, 64, 100}), random.Pick({-1, 0, 0, 3, 80}));
      spec.widths_per_head = random.Chance(0.25);
      spec.prefix = random.Chance(0.3);
      break;
    }
    case 1:
      spec = RowRanges(random.Range(1, 3));
      break;
    case 2:
      spec = Segments(static_cast<int32_t>(random.Range(1, 5)), random.Chance(0.6));
      break;
    case 3:
      spec = Dense(static_cast<int>(random.Range(2, 4)),
                   random.Pick({TANDEM_DTYPE_BOOL, TANDEM_DTYPE_BIT}));
      spec.density = random.Pick({0.02, 0.5, 0.98});
      spec.tiles = random.Chance(0.7);
      break;
    default:
      spec =
          BlockSparse(random.Pick({1, 7, 16, 64, 65, 128}), random.Pick({1, 7, 16, 64, 65, 128}));
      spec.full_lists = random.Chance(0.3);
      break;
  }
  spec.per_batch = random.Chance(0.6);
  spec.per_head = random.Chance(0.5);
  spec.per_row = spec.kind == TANDEM_MASK_BAND || random.Chance(0.8);
  return spec;
}

std::string Describe(const TermSpec& spec) {
  std::ostringstream text;
  switch (spec.kind) {
    case TANDEM_MASK_BAND:
      text << (spec.alignment == TANDEM_ALIGN_TOP_LEFT ? "band_tl" : "band_br");
      if (spec.widths_per_head) {
        text << "_per_head";
      } else {
        text << '_' << spec.left << '_' << spec.right;
      }
      if (spec.prefix) text << "_prefix";
      break;
    case TANDEM_MASK_ROW_RANGES:
      text << "ranges" << spec.ranges;
      break;
    case TANDEM_MASK_LENGTHS:
      text << "lengths";
      break;
    case TANDEM_MASK_SEGMENTS:
      text << (spec.sorted ? "segments_sorted" : "segments");
      break;
    case TANDEM_MASK_DENSE:
      text << (spec.dtype == TANDEM_DTYPE_BIT ? "bits" : "bools") << spec.rank;
      if (spec.offsets) text << "_offsets";
      break;
    default:
      text << "blocks_" << spec.q_block << '_' << spec.kv_block;
      break;
  }
  return text.str();
}

}  // namespace tandem::test
