// What the reference's forward and backward pass have in common: a row, and the score of a pair, in
// f64.
#ifndef TANDEM_BACKEND_CPU_REFERENCE_ROW_H_
#define TANDEM_BACKEND_CPU_REFERENCE_ROW_H_

#include <cmath>
#include <limits>

#include "core/element.h"
#include "core/problem.h"

namespace tandem::cpu {

inline constexpr int64_t kColumns = 512;  // head dimensions are worked on in parts of this many
inline constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

// One row of the problem.
struct Row {
  const core::Problem& problem;
  core::Sequence sequence;
  int64_t head;
  int64_t local;  // row of the tensors
  int64_t global() const { return sequence.q_offset + local; }
  int64_t kv_head() const { return head / problem.group; }
  int64_t head_index() const { return sequence.batch * problem.q_heads + head; }
};

inline int FirstBit(uint64_t word) { return __builtin_ctzll(word); }

// |d - j|.
inline double AlibiDistance(const Row& row, int64_t local_j) {
  const int64_t d = row.global() + core::DiagonalOffset(row.problem.alibi_alignment, row.sequence);
  const int64_t j = row.sequence.kv_offset + local_j;
  return static_cast<double>(d < j ? j - d : d - j);
}

struct Score {
  double value;
  double slope;  // its derivative by scale * <q, k>
  bool hidden;   // by a bias of -inf
};

// The score of a pair from its dot product.
inline Score FinishScore(const Row& row, int64_t local_j, double dot) {
  const core::Problem& p = row.problem;
  Score score = {double{p.scale} * dot, 1.0, false};
  if (p.softcap > 0.0f) {
    const double t = std::tanh(score.value / p.softcap);
    score.value = p.softcap * t;
    score.slope = 1.0 - t * t;
  }
  if (p.bias.data != nullptr) {
    const double bias =
        core::LoadFloat(p.bias.data, p.bias.dtype,
                        core::BiasOffset(p.bias, row.sequence, row.head, row.global(),
                                         row.sequence.kv_offset + local_j));
    score.hidden = bias == kNegativeInfinity;
    score.value += bias;
  }
  if (p.alibi_slopes != nullptr) {
    score.value -=
        double{core::AlibiSlope(p, row.sequence, row.head)} * AlibiDistance(row, local_j);
  }
  return score;
}

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_REFERENCE_ROW_H_
