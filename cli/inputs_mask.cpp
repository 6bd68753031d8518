// The mask terms of Inputs.
#include <algorithm>
#include <utility>

#include "cli/errors.h"
#include "cli/inputs.h"

namespace tandem::cli {

template <typename Term>
void Inputs::AddTerm(const Term& term, std::deque<Term>* terms) {
  terms->push_back(term);
  terms_.push_back(&terms->back().head);
}

Inputs::Extents Inputs::RowExtents() const {
  const int axis = problem_.layout == TANDEM_LAYOUT_BHSD ? 2 : 1;
  const auto extent = [&](const tandem_tensor& t) {
    if (t.rank != 4)
      throw BadInput("q and k have " + std::to_string(t.rank) + " dimensions, must have 4");
    return t.shape[axis];
  };
  if (problem_.layout != TANDEM_LAYOUT_THD) return {extent(*problem_.q), extent(*problem_.k)};
  const auto longest = [](const tandem_tensor& cu) {
    int64_t most = 0;
    const auto at = [&cu](int64_t n) {
      return cu.dtype == TANDEM_DTYPE_I64 ? static_cast<const int64_t*>(cu.data)[n]
                                          : int64_t{static_cast<const int32_t*>(cu.data)[n]};
    };
    for (int64_t b = 0; b + 1 < cu.shape[0]; ++b) {
      // The library has not checked them yet, and will refuse others.
      if (at(b) >= 0 && at(b) <= at(b + 1)) most = std::max(most, at(b + 1) - at(b));
    }
    return most;
  };
  return {longest(*packed_.front().cu_seqlens_q), longest(*packed_.front().cu_seqlens_k)};
}

void Inputs::AddMask(const MaskOptions& options) {
  if (!options.mask.empty()) {
    tandem_dense_term term = TANDEM_DENSE_TERM_INIT;
    term.mask = ReadMask("--mask", options.mask);
    AddTerm(term, &dense_);
  }
  AddBands(options);
  if (!options.row_ranges.empty()) {
    tandem_row_ranges_term term = TANDEM_ROW_RANGES_TERM_INIT;
    term.ranges = ReadInt32("--row-ranges", options.row_ranges);
    AddTerm(term, &row_ranges_);
  }
  AddLengths(options);
  AddBlocks(options);
  AddSegments(options);
}

void Inputs::AddBands(const MaskOptions& options) {
  const tandem_tensor* prefix = nullptr;
  if (!options.prefix.empty()) {
    if (options.causal.empty() == options.window.empty()) {
      throw BadInput("--prefix belongs to one band: give --causal or --window, one of them");
    }
    prefix = ReadInt32("--prefix", options.prefix);
  }
  if (!options.causal.empty()) {
    tandem_band_term term = TANDEM_BAND_TERM_INIT;
    term.alignment = ParseAlignment("--causal", options.causal);
    term.right = 0;
    term.prefix = prefix;
    AddTerm(term, &bands_);
  }
  if (!options.window.empty()) {
    const size_t comma = options.window.find_last_of(',');
    if (comma == std::string::npos) {
      throw BadInput("--window is '" + options.window + "'; it must be L,R,top_left|bottom_right");
    }
    const std::vector<int64_t> sides = ParseNumbers("--window", options.window.substr(0, comma));
    if (sides.size() != 2) {
      throw BadInput("--window is '" + options.window + "'; it must be L,R,top_left|bottom_right");
    }
    tandem_band_term term = TANDEM_BAND_TERM_INIT;
    term.alignment = ParseAlignment("--window", options.window.substr(comma + 1));
    term.left = NarrowToInt32("--window", sides[0]);
    term.right = NarrowToInt32("--window", sides[1]);
    term.prefix = prefix;
    AddTerm(term, &bands_);
  }
}

void Inputs::AddLengths(const MaskOptions& options) {
  if (options.q_lengths.empty() && options.kv_lengths.empty()) return;
  tandem_lengths_term term = TANDEM_LENGTHS_TERM_INIT;
  if (!options.q_lengths.empty()) term.q_lengths = ReadInt32("--q-lengths", options.q_lengths);
  if (!options.kv_lengths.empty()) term.kv_lengths = ReadInt32("--kv-lengths", options.kv_lengths);
  AddTerm(term, &lengths_);
}

// A table of visible blocks becomes the term's lists: for each row of blocks how many there are and
// which.
void Inputs::AddBlocks(const MaskOptions& options) {
  NeedBoth(options.blocks, "--blocks", options.block_size, "--block-size");
  if (options.blocks.empty()) return;
  const std::vector<int64_t> size = ParseNumbers("--block-size", options.block_size);
  if (size.size() != 2 || size[0] < 1 || size[1] < 1) {
    throw BadInput("--block-size is '" + options.block_size + "'; it must be M,N, both at least 1");
  }
  const tandem_tensor& table = *ReadMask("--blocks", options.blocks);
  const Extents extents = RowExtents();
  const int64_t q_blocks = extents.q_rows / size[0] + (extents.q_rows % size[0] != 0);
  const int64_t kv_blocks = extents.kv_rows / size[1] + (extents.kv_rows % size[1] != 0);
  if (table.rank != 4 || table.shape[2] != q_blocks || table.shape[3] != kv_blocks) {
    throw BadInput("--blocks " + options.blocks + " must be [B or 1, H or 1, " +
                   std::to_string(q_blocks) + ", " + std::to_string(kv_blocks) +
                   "] for this --block-size");
  }
  int32_t* counts;
  int32_t* indices;
  tandem_block_sparse_term term = TANDEM_BLOCK_SPARSE_TERM_INIT;
  term.q_block = NarrowToInt32("--block-size", size[0]);
  term.kv_block = NarrowToInt32("--block-size", size[1]);
  term.counts = NewInt32({table.shape[0], table.shape[1], q_blocks}, &counts);
  term.indices = NewInt32(ShapeOf(table), &indices);
  const unsigned char* visible = static_cast<const unsigned char*>(table.data);
  const int64_t rows = table.shape[0] * table.shape[1] * q_blocks;
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* listed = indices + row * kv_blocks;
    std::fill(listed, listed + kv_blocks, 0);
    counts[row] = 0;
    for (int64_t n = 0; n < kv_blocks; ++n) {
      if (visible[row * kv_blocks + n] != 0) listed[counts[row]++] = static_cast<int32_t>(n);
    }
  }
  AddTerm(term, &blocks_);
}

void Inputs::AddSegments(const MaskOptions& options) {
  NeedBoth(options.q_segments, "--q-segments", options.kv_segments, "--kv-segments");
  if (options.q_segments.empty()) return;
  tandem_segments_term term = TANDEM_SEGMENTS_TERM_INIT;
  term.q_segments = ReadInt32("--q-segments", options.q_segments);
  term.kv_segments = ReadInt32("--kv-segments", options.kv_segments);
  AddTerm(term, &segments_);
}

void Inputs::AddPacked(const MaskOptions& options) {
  if (problem_.layout != TANDEM_LAYOUT_THD) return;
  const auto read = [&](const std::string& option, const std::string& path) {
    NpyArray array = ReadNpy(path);
    if (array.type != NpyType::kI32 && array.type != NpyType::kI64) {
      throw BadInput(option + " " + path + " holds " + NpyTypeName(array.type) +
                     "; it may hold int32 or int64");
    }
    if (array.shape.size() != 1 || array.shape[0] < 1) {
      throw BadInput(option + " " + path + " must have one dimension, [B + 1]");
    }
    const tandem_dtype dtype = array.type == NpyType::kI32 ? TANDEM_DTYPE_I32 : TANDEM_DTYPE_I64;
    return Own(std::move(array), dtype);
  };
  tandem_packed_term term = TANDEM_PACKED_TERM_INIT;
  term.cu_seqlens_q = read("--cu-seqlens-q", options.cu_seqlens_q);
  term.cu_seqlens_k = read("--cu-seqlens-k", options.cu_seqlens_k);
  AddTerm(term, &packed_);
}

}  // namespace tandem::cli
