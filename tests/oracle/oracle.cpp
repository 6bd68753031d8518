#include "tests/oracle/oracle.h"

#include <algorithm>
#include <cmath>

#include "tests/oracle/score.h"
#include "tests/oracle/tensor.h"

namespace tandem::oracle {
namespace {

constexpr double kInfinity = INFINITY;

// One visible score and what its error is made of.
struct Score {
  int64_t key;  // local; -1: the sink
  double value;
  double error;
};

// Collects the scores of a row's visible keys.
class ScoreCollector {
 public:
  ScoreCollector(const tandem_problem& problem, const SequenceRange& sequence, int64_t b, int64_t h,
                 int64_t i, const Arithmetic& arithmetic)
      : problem_(problem),
        sequence_(sequence),
        arithmetic_(arithmetic),
        dimensions_(DimensionsOf(problem)),
        b_(b),
        h_(h),
        i_(i) {}

  void Collect(std::vector<Score>* scores);
  bool has_nan() const { return has_nan_; }
  bool overflows() const { return overflows_; }

 private:
  void AddKey(int64_t j, double bias, std::vector<Score>* scores);

  const tandem_problem& problem_;
  const SequenceRange& sequence_;
  const Arithmetic& arithmetic_;
  const Dimensions dimensions_;
  const int64_t b_, h_, i_;
  double scale_ = 0;
  std::vector<double> query_;
  std::vector<double> key_;
  bool has_nan_ = false;
  bool overflows_ = false;
};

void ScoreCollector::Collect(std::vector<Score>* scores) {
  const int64_t dim = dimensions_.qk_dim;
  scale_ = ScaleOf(problem_, dim);
  query_.resize(static_cast<size_t>(dim));
  key_.resize(static_cast<size_t>(dim));
  const RowVisibility visibility(problem_, sequence_, b_, h_, i_);
  const BiasRow bias = BiasRowOf(problem_, sequence_, b_, h_, i_);
  bool query_loaded = false;
  for (int64_t j = visibility.begin(); j < visibility.end(); ++j) {
    if (!visibility.Allows(j)) continue;
    const double bias_value = bias.tensor != nullptr ? bias.At(sequence_.kv_offset + j) : 0.0;
    if (bias_value == -kInfinity) continue;
    if (!query_loaded) {
      const RowAddress a = AddressOf(problem_.layout, *problem_.q, b_, h_, sequence_.q_start + i_);
      LoadRow(*problem_.q, a.offset, a.column_stride, dim, query_.data());
      query_loaded = true;
    }
    AddKey(j, bias_value, scores);
  }
}

void ScoreCollector::AddKey(int64_t j, double bias, std::vector<Score>* scores) {
  const int64_t dim = dimensions_.qk_dim;
  const int64_t kv_head = h_ / (dimensions_.q_heads / dimensions_.kv_heads);
  const RowAddress a = AddressOf(problem_.layout, *problem_.k, b_, kv_head, sequence_.kv_start + j);
  LoadRow(*problem_.k, a.offset, a.column_stride, dim, key_.data());
  double dot = 0;
  double magnitude = 0;
  Dot(query_, key_, &dot, &magnitude);
  double score = scale_ * dot;
  if (problem_.softcap > 0) {
    const double cap = problem_.softcap;
    score = cap * std::tanh(score / cap);
  }
  const double alibi =
      problem_.alibi_slopes != nullptr ? AlibiTerm(problem_, sequence_, b_, h_, i_, j) : 0.0;
  const double total = score + bias - alibi;
  const bool finite_input = std::isfinite(magnitude) && std::isfinite(bias) && std::isfinite(alibi);
  if (finite_input) {
    overflows_ = overflows_ || OverflowsF32(magnitude) ||
                 OverflowsF32(std::fabs(scale_) * magnitude) || OverflowsF32(score + bias) ||
                 OverflowsF32(score - alibi) || OverflowsF32(bias - alibi) || OverflowsF32(total);
  }
  // +inf counts as NaN: exp(inf - inf).
  if (std::isnan(total) || total == kInfinity) has_nan_ = true;
  scores->push_back(
      {j, total, ScoreError(arithmetic_, dim, std::fabs(scale_) * magnitude, score, bias, alibi)});
}

// The largest error among the scores that can contribute (bounds.h).
double RelevantError(const std::vector<Score>& scores, const Score& largest) {
  double error = largest.error;
  for (const Score& s : scores) {
    if (s.value == -kInfinity) continue;
    if (s.value + s.error >= largest.value - largest.error - kUnderflowGap) {
      error = std::max(error, s.error);
    }
  }
  return error;
}

void MarkAll(Expect expect, Row* row) {
  std::fill(row->out_expect.begin(), row->out_expect.end(), expect);
  row->lse_expect = expect;
}

// sum p v, sum p |v| and sum |v|, with what the non-finite elements of V make of them.
class ValueSums {
 public:
  explicit ValueSums(int64_t v_dim)
      : sum(Size(v_dim)),
        weighted(Size(v_dim)),
        magnitude(Size(v_dim)),
        special(Size(v_dim), Expect::kValue),
        value_(Size(v_dim)) {}

  void Add(const tandem_tensor& v, const RowAddress& address, double p, double keep_scale) {
    const int64_t count = static_cast<int64_t>(value_.size());
    LoadRow(v, address.offset, address.column_stride, count, value_.data());
    bool finite = true;
    for (size_t d = 0; d < value_.size(); ++d) {
      const double magnitude_d = std::fabs(value_[d]);
      finite = finite && magnitude_d < kInfinity;
      sum[d] += p * value_[d];
      weighted[d] += p * magnitude_d;
      magnitude[d] += keep_scale * magnitude_d;
    }
    if (finite) return;
    for (size_t d = 0; d < value_.size(); ++d) {
      if (std::isnan(value_[d])) {
        special[d] = Expect::kNan;
      } else if (std::isinf(value_[d]) && special[d] != Expect::kNan) {
        special[d] = Expect::kNonFinite;
      }
    }
  }

  std::vector<double> sum, weighted, magnitude;
  std::vector<Expect> special;

 private:
  static size_t Size(int64_t v_dim) { return static_cast<size_t>(v_dim); }
  std::vector<double> value_;
};

}  // namespace

void Philox(uint64_t key, const uint32_t counter[4], uint32_t result[4]) {
  uint64_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint64_t key_low = key & 0xffffffffu;
  uint64_t key_high = key >> 32;
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {
      key_low = (key_low + 0x9E3779B9u) & 0xffffffffu;
      key_high = (key_high + 0xBB67AE85u) & 0xffffffffu;
    }
    const uint64_t product_0 = x[0] * 0xD2511F53u;
    const uint64_t product_2 = x[2] * 0xCD9E8D57u;
    const uint64_t next[4] = {(product_2 >> 32) ^ x[1] ^ key_low, product_2 & 0xffffffffu,
                              (product_0 >> 32) ^ x[3] ^ key_high, product_0 & 0xffffffffu};
    std::copy(next, next + 4, x);
  }
  for (int word = 0; word < 4; ++word) result[word] = static_cast<uint32_t>(x[word]);
}

bool DropoutKeeps(const tandem_problem& problem, int64_t head_index, int64_t i, int64_t j) {
  if (problem.dropout_rate == 0.0f) return true;
  const uint32_t counter[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                               static_cast<uint32_t>(head_index),
                               static_cast<uint32_t>(problem.dropout_offset)};
  uint32_t words[4];
  Philox(problem.dropout_seed, counter, words);
  return words[j % 4] >= std::floor(static_cast<double>(problem.dropout_rate) * 4294967296.0);
}

void EmptyRow(int64_t v_dim, Row* row) {
  row->out.assign(static_cast<size_t>(v_dim), 0.0);
  row->out_bound.assign(static_cast<size_t>(v_dim), 0.0);
  row->out_expect.assign(static_cast<size_t>(v_dim), Expect::kExact);
  row->lse = -kInfinity;
  row->lse_bound = 0.0;
  row->lse_expect = Expect::kExact;
  row->visible_keys = 0;
  row->empty = true;
}

void ComputeRow(const tandem_problem& problem, const SequenceRange& sequence, int64_t b, int64_t h,
                int64_t i, const Arithmetic& arithmetic, tandem_dtype out_dtype, Row* row) {
  const Dimensions dimensions = DimensionsOf(problem);
  EmptyRow(dimensions.v_dim, row);
  if (sequence.q_offset + i >= sequence.q_len) return;  // outside its sequence: no sink

  std::vector<Score> scores;
  ScoreCollector collector(problem, sequence, b, h, i, arithmetic);
  collector.Collect(&scores);
  row->visible_keys = static_cast<int64_t>(scores.size());
  bool has_nan = collector.has_nan();
  if (problem.sink != nullptr) {
    const double sink = LoadReal(*problem.sink, h * problem.sink->strides[0]);
    if (std::isnan(sink) || sink == kInfinity) has_nan = true;
    scores.push_back({-1, sink, 4 * kUnitF32 * std::fabs(sink)});
  }
  if (has_nan || collector.overflows()) {
    row->empty = false;
    MarkAll(collector.overflows() ? Expect::kAny : Expect::kNan, row);
    return;
  }

  Score largest = {-1, -kInfinity, 0};
  for (const Score& s : scores) {
    if (s.value > largest.value) largest = s;
  }
  ValueSums sums(dimensions.v_dim);
  double l = 0;
  if (largest.value != -kInfinity) {
    for (const Score& s : scores) l += std::exp(s.value - largest.value);
  }
  row->empty = l == 0;
  const double keep_scale = 1.0 / (1.0 - static_cast<double>(problem.dropout_rate));
  const int64_t kv_head = h / (dimensions.q_heads / dimensions.kv_heads);
  const int64_t head_index = b * dimensions.q_heads + h;
  for (const Score& s : scores) {
    if (s.key < 0) continue;
    if (!DropoutKeeps(problem, head_index, sequence.q_offset + i, sequence.kv_offset + s.key)) {
      continue;
    }
    const double p = l == 0 ? 0.0 : std::exp(s.value - largest.value) / l;
    const RowAddress address =
        AddressOf(problem.layout, *problem.v, b, kv_head, sequence.kv_start + s.key);
    sums.Add(*problem.v, address, p * keep_scale, keep_scale);
  }
  if (row->empty) {
    // Every visible score is -inf: the rule says +0, but a kernel that multiplies a visible
    // non-finite value by p = 0 is as right.
    for (size_t d = 0; d < sums.special.size(); ++d) {
      if (sums.special[d] != Expect::kValue) row->out_expect[d] = Expect::kAny;
    }
    return;
  }

  const double score_error = RelevantError(scores, largest);
  const int64_t terms = static_cast<int64_t>(scores.size());
  row->lse = largest.value + std::log(l);
  row->lse_bound = LseBound(arithmetic, terms, score_error, row->lse);
  row->lse_expect = Expect::kValue;
  for (size_t d = 0; d < sums.sum.size(); ++d) {
    row->out[d] = sums.sum[d];
    if (row->visible_keys == 0) continue;  // only the sink: exactly +0
    row->out_expect[d] = sums.special[d];
    if (sums.special[d] != Expect::kValue) continue;
    row->out_bound[d] = OutputBound(arithmetic, out_dtype, terms, score_error, sums.weighted[d],
                                    sums.magnitude[d], row->out[d]);
    // Sums that a kernel may hold unnormalised, or the result itself, beyond the largest number.
    if (OverflowsF32(sums.weighted[d] * l) || OverflowsF32(sums.magnitude[d]) ||
        std::fabs(row->out[d]) + row->out_bound[d] > LargestFinite(out_dtype)) {
      row->out_expect[d] = Expect::kAny;
    }
  }
}

}  // namespace tandem::oracle
