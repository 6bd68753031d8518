// The functions of core/ evaluated on a GPU, for comparison with the host's.
#ifndef TANDEM_TESTS_CUDA_CORE_ON_DEVICE_H_
#define TANDEM_TESTS_CUDA_CORE_ON_DEVICE_H_

#include <cstdint>
#include <vector>

#include "core/mask_prepare.h"
#include "core/mask_tiles.h"
#include "core/problem.h"
#include "core/softmax.h"

namespace tandem::test {

// What one row or one tile of a mask gives.
struct MaskFacts {
  std::vector<uint64_t> words;   // [rows][words per row]
  std::vector<int32_t> classes;  // [tile rows][tile columns] of canonical tiles
  std::vector<int64_t> hulls;    // [tile rows][2]
};

struct MaskQuery {
  int64_t batch;
  int64_t head;
  int64_t rows;
  int64_t words_per_row;
  int64_t tile_rows;
};

// Element n of each fact, by the same code on either side.
TANDEM_HD uint64_t WordFact(const core::Problem& p, const core::Sequence& s, const MaskQuery& q,
                            int64_t n) {
  return core::VisibleWord(p.mask, s, q.head, n / q.words_per_row, n % q.words_per_row * 64);
}
TANDEM_HD int32_t ClassFact(const core::Problem& p, const core::Sequence& s, const MaskQuery& q,
                            int64_t n) {
  const int64_t i = n / q.words_per_row * core::kTile, j = n % q.words_per_row * core::kTile;
  return static_cast<int32_t>(core::ClassifyTile(
      p.mask, s, q.head, i, core::Min<int64_t>(i + core::kTile, s.q_rows), j, j + core::kTile));
}
TANDEM_HD int64_t HullFact(const core::Problem& p, const core::Sequence& s, const MaskQuery& q,
                           int64_t n) {
  const int64_t i = n / 2 * core::kTile;
  const core::Interval hull =
      core::VisibleKeyHull(p.mask, s, q.head, i, core::Min<int64_t>(i + core::kTile, s.q_rows));
  return n % 2 == 0 ? hull.begin : hull.end;
}

// `problem` is bound to device memory.
MaskFacts MaskFactsOnDevice(const core::Problem& problem, const MaskQuery& query);

// f16 and bf16 bits of each value, and the values of all 65536 bit patterns (f16, then bf16).
void ConvertOnDevice(const std::vector<float>& values, std::vector<uint16_t>* f16,
                     std::vector<uint16_t>* bf16, std::vector<uint32_t>* patterns);

// Four words for each (seed, head index, row, key).
struct PhiloxInput {
  uint64_t seed, offset;
  int64_t head_index, i, j;
};
std::vector<uint32_t> PhiloxOnDevice(const std::vector<PhiloxInput>& inputs);

// Everything core/softmax.h makes of four numbers.
struct SoftmaxInput {
  float m, l, sink, other;
};
inline constexpr int kSoftmaxFacts = 12;
TANDEM_HD void SoftmaxFacts(const SoftmaxInput& in, float* out) {
  out[0] = core::SoftmaxReference(in.m);
  out[1] = core::SoftmaxRescale(in.m, core::MaxKeepNan(in.m, in.other));
  out[2] = core::SoftmaxRowIsEmpty(in.m, in.l) ? 1.0f : 0.0f;
  out[3] = core::SoftmaxInverse(in.l);
  out[4] = core::SoftmaxLse(in.m, in.l);
  float m = in.m, l = in.l, rescale = 0.0f;
  core::SoftmaxAddSink(in.sink, &m, &l, &rescale);
  out[5] = m;
  out[6] = l;
  out[7] = rescale;
  const core::MergeWeights weights = core::MergePartials(in.m, in.other);
  out[8] = weights.weight_a;
  out[9] = weights.weight_b;
  out[10] = weights.lse;
  out[11] = core::MergeValue(weights, in.l, in.sink);
}
std::vector<float> SoftmaxFactsOnDevice(const std::vector<SoftmaxInput>& inputs);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_CUDA_CORE_ON_DEVICE_H_
