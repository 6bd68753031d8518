// A case as kernels see it: validated, with its mask prepared by the plainest loop over
// core/mask_prepare.h.
#ifndef TANDEM_TESTS_CORE_PREPARED_PROBLEM_H_
#define TANDEM_TESTS_CORE_PREPARED_PROBLEM_H_

#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/mask_prepare.h"
#include "core/problem.h"
#include "core/validate.h"
#include "tests/support/case.h"

namespace tandem::test {

class PreparedProblem {
 public:
  // device_type decides the layout of the prepared bits; 0: that of the case.
  explicit PreparedProblem(const Case& source, int32_t device_type = 0) {
    status_ = core::Validate(&source.problem(), &source.outputs(), nullptr, &problem_, &error_);
    if (status_ != TANDEM_STATUS_OK) return;
    if (device_type != 0) problem_.device_type = device_type;
    layout_ = core::LayOutPreparation(problem_);
    // Not zeroed: preparation must write every byte that is read later.
    buffer_.reset(static_cast<uint8_t*>(
        std::aligned_alloc(core::kBufferAlignment, layout_.size + core::kBufferAlignment)));
    std::memset(buffer_.get(), 0xdb, layout_.size);
    core::BindPreparation(layout_, buffer_.get(), &problem_);
    PrepareDense();
    PrepareBlocks();
  }

  tandem_status status() const { return status_; }
  const char* error() const { return error_.data; }
  const core::Problem& problem() const { return problem_; }
  const core::PreparationLayout& layout() const { return layout_; }
  const uint8_t* buffer() const { return buffer_.get(); }
  int32_t device_status() const { return device_status_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };

  void PrepareDense() {
    const core::MaskSources& sources = problem_.sources;
    if (sources.dense_count == 0) return;
    for (int64_t b = 0; b < sources.dense_batch_extent; ++b) {
      for (int64_t h = 0; h < sources.dense_head_extent; ++h) {
        for (int64_t tile = 0; tile < core::DenseTileRows(problem_); ++tile) {
          for (int64_t word = 0; word < core::DenseWordsPerRow(problem_); ++word) {
            PrepareTile(b, h, tile, word);
          }
        }
      }
    }
  }

  void PrepareTile(int64_t b, int64_t h, int64_t tile, int64_t word) {
    const int64_t end = core::Min<int64_t>((tile + 1) * 64, problem_.sources.dense_row_extent);
    const uint64_t capacity = core::DenseWordCapacity(problem_, word);
    bool any = false, all = true;
    for (int64_t i = tile * 64; i < end; ++i) {
      const uint64_t bits =
          core::PrepareDenseRow(problem_, layout_, buffer_.get(), b, h, i, word, &device_status_);
      any = any || bits != 0;
      all = all && bits == capacity;
    }
    core::FinishDenseTile(problem_, layout_, buffer_.get(), b, h, tile, word, any, all);
  }

  void PrepareBlocks() {
    for (int t = 0; t < problem_.sources.block_sparse_count; ++t) {
      const core::BlockSparseSource& source = problem_.sources.block_sparse[t];
      for (int64_t b = 0; b < source.batch_extent; ++b) {
        for (int64_t h = 0; h < source.head_extent; ++h) {
          for (int64_t q = 0; q < source.q_blocks; ++q) {
            core::PrepareBlockRow(problem_, layout_, buffer_.get(), t, b, h, q, &device_status_);
          }
        }
      }
    }
  }

  core::Problem problem_ = {};
  core::PreparationLayout layout_ = {};
  core::Text error_ = {};
  tandem_status status_ = TANDEM_STATUS_INTERNAL;
  int32_t device_status_ = 0;
  std::unique_ptr<uint8_t, Free> buffer_;
};

}  // namespace tandem::test

#endif  // TANDEM_TESTS_CORE_PREPARED_PROBLEM_H_
