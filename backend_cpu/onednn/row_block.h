// The part of onednn.cpu between its two products: one block of query rows against all keys.
#ifndef TANDEM_BACKEND_CPU_ONEDNN_ROW_BLOCK_H_
#define TANDEM_BACKEND_CPU_ONEDNN_ROW_BLOCK_H_

#include <cstdint>

#include "backend_cpu/onednn/matmul.h"
#include "core/problem.h"

namespace tandem::cpu::onednn {

// Query rows of one block: fewer where keys are many, so that a block's scores stay small. It looks
// at the sequence's own length only.
inline constexpr int64_t kManyKeys = 16384;
inline int64_t RowsPerBlock(int64_t keys) { return keys <= kManyKeys ? kMaxRows : kRowStep; }

// One (sequence, key head)'s keys and values in dense f32, padded with zero rows to a multiple of
// kKeyStep. Values are finite: other ones are 0 here, and their tile of kKeyStep keys is marked.
struct DenseKeys {
  const float* k;             // [keys, qk_dim]
  const float* v;             // [keys, v_dim]
  const uint8_t* non_finite;  // [keys / kKeyStep]
};

// Floats, or 8-byte words, of scratch for one block against at most `keys` keys; see RowBlock.
struct BlockSizes {
  int64_t scores, q, out, words;
  int64_t bytes() const { return 4 * (scores + q + out) + 8 * words; }
};
BlockSizes SizesOfBlock(const core::Problem& problem, int64_t keys);

// One block of rows of one query head.
class RowBlock {
 public:
  // scratch: SizesOfBlock(...).bytes(), 64-byte aligned, and the products' own behind it.
  RowBlock(const core::Problem& problem, const core::Sequence& sequence, int64_t head,
           const DenseKeys& keys, const Products& products, void* scratch);

  // Computes and writes local rows [begin, begin + count), which exist; count <=
  // RowsPerBlock(keys).
  void Compute(dnnl::stream* stream, int64_t begin, int64_t count);

 private:
  // Scores lie chunk by chunk of kMaxKeys keys, each [padded rows, padded keys of the chunk].
  int64_t ChunkKeys(int64_t chunk) const;
  float* ChunkScores(int64_t chunk, int64_t row) const;
  uint64_t* Words(int64_t row) const { return words_ + row * word_count_; }

  void LoadQueries();
  void FinishScores(int64_t row, float* m);
  double Weigh(int64_t row, float m);
  void AddNonFiniteValues(int64_t row);
  void StoreRow(int64_t row, float m, float l);

  const core::Problem& p_;
  const core::Sequence& s_;
  const int64_t head_;
  const DenseKeys keys_;
  const Products& products_;
  const int64_t key_count_;   // of the sequence
  const int64_t word_count_;  // key_count_ / 64, rounded up
  float* scores_;
  float* q_;         // [padded rows, qk_dim]
  float* out_;       // [padded rows, v_dim], unnormalised
  uint64_t* words_;  // [rows, word_count_]: visible keys; after Weigh the ones with a weight
  void* product_scratch_;
  int64_t begin_ = 0;
  int64_t count_ = 0;
  int64_t padded_rows_ = 0;
  int64_t chunk_begin_ = 0;  // the chunks that some row may see
  int64_t chunk_end_ = 0;
};

}  // namespace tandem::cpu::onednn

#endif  // TANDEM_BACKEND_CPU_ONEDNN_ROW_BLOCK_H_
