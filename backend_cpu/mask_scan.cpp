#include "backend_cpu/mask_scan.h"

#include <emmintrin.h>

#include <atomic>
#include <cstring>

#include "backend_cpu/parallel.h"

namespace tandem::cpu {
namespace {

using core::DenseSource;
using core::DType;
using core::Problem;

constexpr int64_t kWordsPerTask = 64;  // columns of canonical tiles that one task scans

// Whether 64 keys of a row lie in consecutive bytes or bits, so that Consecutive64 reads them.
bool IsConsecutive(const Problem& p) {
  for (int t = 0; t < p.sources.dense_count; ++t) {
    const DenseSource& source = p.sources.dense[t];
    if (source.per_sequence || source.column_stride != 1) return false;
  }
  return true;
}

// What core::DenseSourceAllows says of elements [index, index + 64).
uint64_t Consecutive64(const DenseSource& source, int64_t index) {
  uint64_t word = 0;
  if (source.dtype == DType::kBit) {
    const uint8_t* bytes = source.data + (index >> 3);
    const int shift = static_cast<int>(index & 7);
    std::memcpy(&word, bytes, 8);
    return shift == 0 ? word : (word >> shift) | (uint64_t{bytes[8]} << (64 - shift));
  }
  for (int part = 0; part < 4; ++part) {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(source.data + index + 16 * part));
    const int is_false = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    word |= uint64_t{static_cast<uint16_t>(~is_false)} << (16 * part);
  }
  return word;
}

struct DenseScan {
  const Problem& problem;
  const core::PreparationLayout& layout;
  void* buffer;
  bool is_consecutive;
  std::atomic<int32_t> status;

  // As core::PrepareDenseRow, 64 consecutive keys at a time where they are all there.
  uint64_t ScanRow(int64_t batch, int64_t head, int64_t i, int64_t word_index, int32_t* bits) {
    const Problem& p = problem;
    if (!is_consecutive || word_index * 64 + 64 > p.global_kv_len) {
      return core::PrepareDenseRow(p, layout, buffer, batch, head, i, word_index, bits);
    }
    uint64_t word = ~uint64_t{0};
    for (int t = 0; t < p.sources.dense_count; ++t) {
      const DenseSource& source = p.sources.dense[t];
      word &= Consecutive64(source, batch * source.batch_stride + head * source.head_stride +
                                        i * source.row_stride + word_index * 64);
    }
    core::StoreDenseWord(p, layout, buffer, batch, head, i, word_index, word);
    return word;
  }

  // Rows of one tile row, row by row so that each is read from end to end.
  void ScanTiles(int64_t plane, int64_t tile_row, int64_t word_begin) {
    const Problem& p = problem;
    const int64_t batch = plane / p.sources.dense_head_extent;
    const int64_t head = plane % p.sources.dense_head_extent;
    const int64_t word_end = core::Min(word_begin + kWordsPerTask, core::DenseWordsPerRow(p));
    const int64_t row_end = core::Min((tile_row + 1) * core::kTile, p.sources.dense_row_extent);
    bool any[kWordsPerTask] = {};
    bool some_hidden[kWordsPerTask] = {};
    int32_t bits = 0;
    for (int64_t i = tile_row * core::kTile; i < row_end; ++i) {
      for (int64_t w = word_begin; w < word_end; ++w) {
        const uint64_t word = ScanRow(batch, head, i, w, &bits);
        any[w - word_begin] |= word != 0;
        some_hidden[w - word_begin] |= word != core::DenseWordCapacity(p, w);
      }
    }
    for (int64_t w = word_begin; w < word_end; ++w) {
      core::FinishDenseTile(p, layout, buffer, batch, head, tile_row, w, any[w - word_begin],
                            !some_hidden[w - word_begin]);
    }
    if (bits != 0) status.fetch_or(bits, std::memory_order_relaxed);
  }
};

void PrepareDense(const Problem& p, const core::PreparationLayout& layout, void* buffer,
                  const core::Context& context, std::atomic<int32_t>* status) {
  DenseScan scan = {p, layout, buffer, IsConsecutive(p), {0}};
  const int64_t planes = p.sources.dense_batch_extent * p.sources.dense_head_extent;
  const int64_t tile_rows = core::DenseTileRows(p);
  const int64_t parts = core::CeilDiv(core::DenseWordsPerRow(p), kWordsPerTask);
  auto task = [&scan, tile_rows, parts](int64_t index, int) {
    const int64_t row = index / parts;
    scan.ScanTiles(row / tile_rows, row % tile_rows, index % parts * kWordsPerTask);
  };
  ParallelForEach(context, planes * tile_rows * parts, task);
  status->fetch_or(scan.status, std::memory_order_relaxed);
}

void PrepareBlocks(const Problem& p, const core::PreparationLayout& layout, void* buffer, int t,
                   const core::Context& context, std::atomic<int32_t>* status) {
  const core::BlockSparseSource& source = p.sources.block_sparse[t];
  auto task = [&, t](int64_t plane, int) {
    int32_t bits = 0;
    for (int64_t q_block = 0; q_block < source.q_blocks; ++q_block) {
      core::PrepareBlockRow(p, layout, buffer, t, plane / source.head_extent,
                            plane % source.head_extent, q_block, &bits);
    }
    if (bits != 0) status->fetch_or(bits, std::memory_order_relaxed);
  };
  ParallelForEach(context, source.batch_extent * source.head_extent, task);
}

}  // namespace

tandem_status PrepareMask(const Problem& problem, const core::PreparationLayout& layout,
                          void* buffer, const core::Context& context) {
  std::atomic<int32_t> status = 0;
  if (problem.sources.dense_count > 0) PrepareDense(problem, layout, buffer, context, &status);
  for (int t = 0; t < problem.sources.block_sparse_count; ++t) {
    PrepareBlocks(problem, layout, buffer, t, context, &status);
  }
  if (problem.device_status != nullptr) *problem.device_status |= status.load();
  return TANDEM_STATUS_OK;
}

}  // namespace tandem::cpu
