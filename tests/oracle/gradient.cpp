#include "tests/oracle/gradient.h"

#include <algorithm>
#include <cmath>

#include "tests/oracle/score.h"

namespace tandem::oracle {
namespace {

constexpr double kInfinity = INFINITY;

// Rows [start, start + count) of one head in f64.
std::vector<double> LoadRows(const tandem_problem& problem, const tandem_tensor& t, int64_t b,
                             int64_t head, int64_t start, int64_t count, int64_t columns) {
  std::vector<double> rows(static_cast<size_t>(count * columns));
  for (int64_t i = 0; i < count; ++i) {
    const RowAddress a = AddressOf(problem.layout, t, b, head, start + i);
    LoadRow(t, a.offset, a.column_stride, columns, rows.data() + i * columns);
  }
  return rows;
}

// Element (b, head, row) of a tensor of LSE's shape; packed rows count from the tensor's start.
double LoadStatistic(const tandem_problem& problem, const tandem_tensor* t, int64_t b, int64_t head,
                     int64_t row) {
  if (t == nullptr) return 0.0;
  const int64_t offset = problem.layout == TANDEM_LAYOUT_THD
                             ? head * t->strides[0] + row * t->strides[1]
                             : b * t->strides[0] + head * t->strides[1] + row * t->strides[2];
  return LoadReal(*t, offset);
}

struct DotResult {
  double value = 0;
  double magnitude = 0;
};
DotResult DotOf(const double* a, const double* b, int64_t count) {
  DotResult dot;
  for (int64_t d = 0; d < count; ++d) {
    const double product = a[d] * b[d];
    dot.value += product;
    dot.magnitude += std::fabs(product);
  }
  return dot;
}

}  // namespace

GradientSum::GradientSum(int64_t columns) : parts_(static_cast<size_t>(columns)) {}

void GradientSum::Clear() {
  std::fill(parts_.begin(), parts_.end(), Part{});
  terms_ = 0;
  nan_ = overflows_ = false;
}

void GradientSum::Add(const double* row, double factor, double factor_error, bool is_nan,
                      bool overflows) {
  ++terms_;
  nan_ = nan_ || is_nan;
  overflows_ = overflows_ || overflows;
  for (size_t d = 0; d < parts_.size(); ++d) {
    Part& part = parts_[d];
    const double size = std::fabs(row[d]);
    part.value += factor * row[d];
    part.magnitude += std::fabs(factor) * size;
    part.error += factor_error * size;
    part.operands += size;
    part.nan = part.nan || std::isnan(row[d]);
    part.infinite = part.infinite || size == kInfinity;
  }
}

void GradientSum::Merge(const GradientSum& other) {
  terms_ += other.terms_;
  nan_ = nan_ || other.nan_;
  overflows_ = overflows_ || other.overflows_;
  for (size_t d = 0; d < parts_.size(); ++d) {
    Part& part = parts_[d];
    const Part& more = other.parts_[d];
    part.value += more.value;
    part.magnitude += more.magnitude;
    part.error += more.error;
    part.operands += more.operands;
    part.nan = part.nan || more.nan;
    part.infinite = part.infinite || more.infinite;
  }
}

GradientSum::Element GradientSum::Get(int64_t column, double factor, const Arithmetic& a,
                                      tandem_dtype dtype) const {
  if (terms_ == 0) return {0.0, 0.0, Expect::kExact};
  const Part& part = parts_[static_cast<size_t>(column)];
  if (overflows_) return {0.0, 0.0, Expect::kAny};
  if (nan_) return {NAN, 0.0, Expect::kNan};
  if (part.infinite) return {0.0, 0.0, Expect::kAny};
  if (part.nan) return {NAN, 0.0, Expect::kNan};
  const double value = factor * part.value;
  const double bound =
      SumBound(a, dtype, terms_, factor, part.error, part.magnitude, part.operands, value);
  if (OverflowsF32(part.magnitude) || OverflowsF32(part.operands) ||
      std::fabs(value) + bound > LargestFinite(dtype)) {
    return {0.0, 0.0, Expect::kAny};
  }
  return {value, bound, Expect::kValue};
}

HeadGradient::HeadGradient(const tandem_problem& problem, const tandem_outputs& outputs,
                           const tandem_gradients& gradients, const SequenceRange& sequence,
                           int64_t b, int64_t h, const Arithmetic& arithmetic)
    : problem_(problem), sequence_(sequence), arithmetic_(arithmetic), b_(b), h_(h) {
  const Dimensions d = DimensionsOf(problem);
  qk_dim_ = d.qk_dim;
  v_dim_ = d.v_dim;
  q_heads_ = d.q_heads;
  scale_ = ScaleOf(problem, d.qk_dim);
  const int64_t kv_head = h / (d.q_heads / d.kv_heads);
  const SequenceRange& s = sequence_;
  q_ = LoadRows(problem, *problem.q, b, h, s.q_start, s.q_rows, qk_dim_);
  k_ = LoadRows(problem, *problem.k, b, kv_head, s.kv_start, s.kv_rows, qk_dim_);
  v_ = LoadRows(problem, *problem.v, b, kv_head, s.kv_start, s.kv_rows, v_dim_);
  dout_ = LoadRows(problem, *gradients.dout, b, h, s.q_start, s.q_rows, v_dim_);
  const std::vector<double> out =
      LoadRows(problem, *outputs.out, b, h, s.q_start, s.q_rows, v_dim_);
  for (int64_t i = 0; i < s.q_rows; ++i) {
    const DotResult d_i = DotOf(dout(i), out.data() + i * v_dim_, v_dim_);
    RowState state;
    state.lse = LoadStatistic(problem, outputs.lse, b, h, s.q_start + i);
    state.dlse = LoadStatistic(problem, gradients.dlse, b, h, s.q_start + i);
    state.d = d_i.value;
    state.d_error =
        (Gamma(arithmetic_, v_dim_ + 8) + OutputUnit(outputs.out->dtype)) * d_i.magnitude;
    if (OverflowsF32(d_i.magnitude)) state.d_error = kInfinity;
    states_.push_back(state);
    visibility_.emplace_back(problem, sequence_, b, h, i);
    bias_.push_back(BiasRowOf(problem, sequence_, b, h, i));
  }
}

double HeadGradient::Distance(int64_t i, int64_t j) const {
  const int64_t query = sequence_.q_offset + i;
  const int64_t d = problem_.alibi_alignment == TANDEM_ALIGN_BOTTOM_RIGHT
                        ? query + (sequence_.kv_len - sequence_.q_len)
                        : query;
  return static_cast<double>(std::abs(d - (sequence_.kv_offset + j)));
}

PairGradient HeadGradient::Pair(int64_t i, int64_t j) const {
  PairGradient pair;
  const size_t row = static_cast<size_t>(i);
  const RowState& state = states_[row];
  if (!Exists(i) || !visibility_[row].Allows(j)) return pair;
  const double bias = bias_[row].tensor != nullptr ? bias_[row].At(sequence_.kv_offset + j) : 0.0;
  if (bias == -kInfinity || state.lse == -kInfinity) return pair;
  pair.counts = true;

  // The score, as in the forward oracle.
  const DotResult qk = DotOf(q(i), k(j), qk_dim_);
  const double magnitude = std::fabs(scale_) * qk.magnitude;
  double score = scale_ * qk.value;
  double slope = 1.0, slope_error = 0.0;
  if (problem_.softcap > 0) {
    const double cap = problem_.softcap;
    const double t = std::tanh(score / cap);
    score = cap * t;
    slope = 1.0 - t * t;
    const double t_error = Gamma(arithmetic_, qk_dim_ + 8) * magnitude / cap + 4 * kUnitF32;
    slope_error = std::fmin(2 * std::fabs(t) * t_error + t_error * t_error + 4 * kUnitF32, 1.0);
  }
  const double alibi =
      problem_.alibi_slopes != nullptr ? AlibiTerm(problem_, sequence_, b_, h_, i, j) : 0.0;
  const double total = score + bias - alibi;
  const double score_error = ScoreError(arithmetic_, qk_dim_, magnitude, score, bias, alibi);

  // P.
  const bool p_is_nan = std::isnan(total) || std::isnan(state.lse);
  const double p = p_is_nan ? NAN : std::exp(std::fmin(total - state.lse, 0.0));
  const double p_error = ProbabilityBound(score_error, state.lse, p);

  // dS.
  const double keep_scale = 1.0 / (1.0 - static_cast<double>(problem_.dropout_rate));
  pair.kept =
      DropoutKeeps(problem_, b_ * q_heads_ + h_, sequence_.q_offset + i, sequence_.kv_offset + j);
  const DotResult dov =
      pair.kept ? DotOf(dout(i), &v_[static_cast<size_t>(j * v_dim_)], v_dim_) : DotResult{};
  const double dp = keep_scale * dov.value;
  const double dp_error = Gamma(arithmetic_, v_dim_ + 8) * keep_scale * dov.magnitude;
  const double difference = dp - state.d + state.dlse;
  const double difference_error =
      dp_error + state.d_error +
      4 * kUnitF32 * (std::fabs(dp) + std::fabs(state.d) + std::fabs(state.dlse));
  pair.ds = p * difference;
  pair.ds_error = p_error * std::fabs(difference) + (p + p_error) * difference_error;
  pair.dx = pair.ds * slope;
  pair.dx_error = pair.ds_error * slope + (std::fabs(pair.ds) + pair.ds_error) * slope_error;
  pair.weight = pair.kept ? keep_scale * p : 0.0;
  pair.weight_error = pair.kept ? keep_scale * p_error + 2 * kUnitF32 * pair.weight : 0.0;
  pair.weight_is_nan = p_is_nan;
  pair.ds_is_nan = p_is_nan || std::isnan(difference);

  const auto no_f32 = [](double x) { return OverflowsF32(x); };
  const bool finite_sums = std::isfinite(qk.magnitude) && std::isfinite(dov.magnitude);
  if (!pair.ds_is_nan || finite_sums) {
    pair.overflows = no_f32(qk.magnitude) || no_f32(magnitude) || no_f32(score + bias) ||
                     no_f32(bias - alibi) || no_f32(total) || no_f32(state.lse) ||
                     no_f32(dov.magnitude) || no_f32(keep_scale * dov.magnitude) ||
                     no_f32(state.d) || no_f32(state.d_error) || no_f32(state.dlse) ||
                     no_f32(difference);
  }
  if (arithmetic_.product_unit == kUnitF16 && std::fabs(pair.dx) + pair.dx_error > 65504.0) {
    pair.overflows = true;
  }
  return pair;
}

bool HeadGradient::Sink(int64_t i, double* value, double* error, bool* is_nan,
                        bool* overflows) const {
  const RowState& state = states_[static_cast<size_t>(i)];
  if (!Exists(i) || state.lse == -kInfinity) return false;
  const double sink = LoadReal(*problem_.sink, h_ * problem_.sink->strides[0]);
  const double difference = state.dlse - state.d;
  *is_nan = std::isnan(sink) || std::isnan(state.lse) || std::isnan(difference);
  const double p = *is_nan ? NAN : std::exp(std::fmin(sink - state.lse, 0.0));
  const double p_error = ProbabilityBound(4 * kUnitF32 * std::fabs(sink), state.lse, p);
  *value = p * difference;
  *error =
      p_error * std::fabs(difference) +
      (p + p_error) * (state.d_error + 4 * kUnitF32 * (std::fabs(state.d) + std::fabs(state.dlse)));
  // A sink of -inf adds 0 whatever the row holds; a kernel that multiplies is as right.
  *overflows = OverflowsF32(difference) || OverflowsF32(state.d_error) || OverflowsF32(sink) ||
               OverflowsF32(state.lse) || (*is_nan && sink == -kInfinity);
  return true;
}

}  // namespace tandem::oracle
