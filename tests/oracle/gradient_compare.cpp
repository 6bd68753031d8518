#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "tests/oracle/gradient.h"
#include "tests/oracle/score.h"

namespace tandem::oracle {
namespace {

// where() is the element's place, in words.
template <typename Where>
void CompareElement(const GradientSum::Element& e, double actual, const Where& where,
                    GradientResult* result) {
  result->compared = true;
  double ratio = 0;
  bool wrong = false;
  switch (e.expect) {
    case Expect::kAny:
      return;
    case Expect::kNan:
    case Expect::kNonFinite:
      wrong = std::isfinite(actual);
      result->nonfinite_mismatches += wrong;
      break;
    case Expect::kExact:
      wrong = actual != 0.0 || std::signbit(actual);
      result->zero_mismatches += wrong;
      break;
    case Expect::kValue:
      if (!std::isfinite(actual)) {
        wrong = true;
        ++result->nonfinite_mismatches;
      } else {
        const double error = std::fabs(actual - e.value);
        ratio = error == 0 ? 0 : error / e.bound;
        result->max_error = std::max(result->max_error, error);
      }
  }
  const bool first_wrong = wrong && result->nonfinite_mismatches + result->zero_mismatches == 1;
  const bool none_wrong = result->nonfinite_mismatches + result->zero_mismatches == 0;
  if (first_wrong || (none_wrong && (ratio > result->error_over_bound || result->worst.empty()))) {
    char text[200];
    snprintf(text, sizeof(text), "%s: %.9g, expected %.9g, error/bound %.3g", where().c_str(),
             actual, e.value, ratio);
    result->worst = text;
  }
  result->error_over_bound = std::max(result->error_over_bound, ratio);
}

void Merge(const GradientResult& part, GradientResult* total) {
  const auto rank = [](const GradientResult& r) {
    return r.nonfinite_mismatches + r.zero_mismatches > 0 ? INFINITY : r.error_over_bound;
  };
  if (total->worst.empty() || rank(part) > rank(*total)) total->worst = part.worst;
  total->max_error = std::max(total->max_error, part.max_error);
  total->error_over_bound = std::max(total->error_over_bound, part.error_over_bound);
  total->nonfinite_mismatches += part.nonfinite_mismatches;
  total->zero_mismatches += part.zero_mismatches;
  total->compared = total->compared || part.compared;
}

std::string Where(int64_t b, int64_t head, int64_t row, int64_t column) {
  return "sequence " + std::to_string(b) + ", head " + std::to_string(head) + ", row " +
         std::to_string(row) + ", column " + std::to_string(column);
}

// The position of element (b, h, i, j) of a tensor broadcastable to [B, Hq, Sq, Sk].
struct BiasShape {
  explicit BiasShape(const tandem_tensor& t) : tensor(t) {
    for (int d = 0; d < t.rank; ++d) count *= t.shape[d];
  }
  void Split(int64_t b, int64_t h, int64_t i, int64_t j, int64_t* flat, int64_t* offset) const {
    const int64_t at[4] = {b, h, i, j};
    *flat = *offset = 0;
    for (int d = 0; d < tensor.rank; ++d) {
      // Ranks 2 and 3 lack the head, rank 2 the batch too.
      const int axis =
          tensor.rank == 4 ? d : (tensor.rank == 3 && d == 0 ? 0 : 4 - tensor.rank + d);
      const int64_t index = tensor.shape[d] == 1 ? 0 : at[axis];
      *flat = *flat * tensor.shape[d] + index;
      *offset += index * tensor.strides[d];
    }
  }
  const tandem_tensor& tensor;
  int64_t count = 1;
};

// At most `most` of [0, count), the first and last among them, scattered.
std::vector<int64_t> Choose(int64_t count, double part) {
  std::vector<int64_t> chosen;
  const int64_t wanted =
      part >= 1.0
          ? count
          : std::min(count,
                     std::max<int64_t>(8, static_cast<int64_t>(part * static_cast<double>(count))));
  for (int64_t n = 0; n < wanted; ++n) {
    chosen.push_back(wanted == 1 ? 0 : n * (count - 1) / (wanted - 1));
  }
  return chosen;
}

class Comparison {
 public:
  Comparison(const tandem_problem& problem, const tandem_outputs& outputs,
             const tandem_gradients& gradients, const GradientCompareOptions& options)
      : problem_(problem),
        outputs_(outputs),
        gradients_(gradients),
        options_(options),
        d_(DimensionsOf(problem)) {
    double pairs = 0;
    for (int64_t b = 0; b < SequenceCount(problem); ++b) {
      sequences_.push_back(SequenceOf(problem, b));
      pairs += static_cast<double>(sequences_.back().q_rows) *
               static_cast<double>(sequences_.back().kv_rows) * static_cast<double>(d_.q_heads);
    }
    part_ = pairs > static_cast<double>(options.max_pairs)
                ? static_cast<double>(options.max_pairs) / pairs
                : 1.0;
    if (whole() && gradients.dbias != nullptr) {
      dbias_.resize(static_cast<size_t>(BiasShape(*gradients.dbias).count));
    }
    dsink_.resize(static_cast<size_t>(d_.q_heads));
    dalibi_.resize(static_cast<size_t>(d_.batch * d_.q_heads));
  }

  // One sequence and key head.
  void Plane(int64_t b, int64_t kv_head) {
    const SequenceRange& s = sequences_[static_cast<size_t>(b)];
    const int64_t group = d_.q_heads / d_.kv_heads;
    const std::vector<int64_t> rows = Choose(s.q_rows, part_), keys = Choose(s.kv_rows, part_);
    std::vector<GradientSum> dk(keys.size(), GradientSum(d_.qk_dim)),
        dv(keys.size(), GradientSum(d_.v_dim));
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      const HeadGradient head(problem_, outputs_, gradients_, s, b, h, options_.arithmetic);
      for (const int64_t i : rows) QueryRow(head, b, h, i);
      for (size_t n = 0; n < keys.size(); ++n) AddKey(head, keys[n], &dk[n], &dv[n]);
      if (gradients_.dsink == nullptr) continue;
      for (int64_t i = 0; i < s.q_rows; ++i) AddSink(head, h, i);
    }
    for (size_t n = 0; n < keys.size(); ++n) {
      const double scale = ScaleOf(problem_, d_.qk_dim);
      CompareRow(gradients_.dk, b, kv_head, s.kv_start, keys[n], dk[n], scale, &results.dk);
      CompareRow(gradients_.dv, b, kv_head, s.kv_start, keys[n], dv[n], 1.0, &results.dv);
    }
  }

  void MergeFrom(const Comparison& other) {
    for (size_t n = 0; n < dbias_.size(); ++n) dbias_[n].Merge(other.dbias_[n]);
    for (size_t n = 0; n < dsink_.size(); ++n) dsink_[n].Merge(other.dsink_[n]);
    for (size_t n = 0; n < dalibi_.size(); ++n) dalibi_[n].Merge(other.dalibi_[n]);
    Merge(other.results.dq, &results.dq);
    Merge(other.results.dk, &results.dk);
    Merge(other.results.dv, &results.dv);
  }

  // What is summed over all planes, and rows of no sequence.
  void Finish() {
    Arithmetic f32 = options_.arithmetic;
    f32.product_unit = kUnitF32;
    f32.product_underflow = 0x1p-126;
    if (gradients_.dbias != nullptr && whole()) CompareBias(f32);
    for (int64_t h = 0; gradients_.dsink != nullptr && h < d_.q_heads; ++h) {
      CompareElement(
          dsink_[static_cast<size_t>(h)].Get(0, 1.0, f32, TANDEM_DTYPE_F32),
          LoadReal(*gradients_.dsink, h * gradients_.dsink->strides[0]),
          [&] { return "head " + std::to_string(h); }, &results.dsink);
    }
    if (gradients_.dalibi != nullptr && whole()) CompareAlibi(f32);
    if (d_.packed) CompareOutside();
  }

  bool whole() const { return part_ >= 1.0; }
  GradientResults results;

 private:
  void QueryRow(const HeadGradient& head, int64_t b, int64_t h, int64_t i) {
    static const double one = 1.0;
    const SequenceRange& s = sequences_[static_cast<size_t>(b)];
    GradientSum dq(d_.qk_dim);
    for (int64_t j = 0; j < s.kv_rows; ++j) {
      const PairGradient pair = head.Pair(i, j);
      if (!pair.counts) continue;
      dq.Add(head.k(j), pair.dx, pair.dx_error, pair.ds_is_nan, pair.overflows);
      if (!dbias_.empty()) {
        int64_t flat, offset;
        BiasShape(*gradients_.dbias).Split(b, h, s.q_offset + i, s.kv_offset + j, &flat, &offset);
        dbias_[static_cast<size_t>(flat)].Add(&one, pair.ds, pair.ds_error, pair.ds_is_nan,
                                              pair.overflows);
      }
      if (gradients_.dalibi != nullptr) {
        const double distance = -head.Distance(i, j);
        dalibi_[static_cast<size_t>(b * d_.q_heads + h)].Add(&distance, pair.ds, pair.ds_error,
                                                             pair.ds_is_nan, pair.overflows);
      }
    }
    CompareRow(gradients_.dq, b, h, s.q_start, i, dq, ScaleOf(problem_, d_.qk_dim), &results.dq);
  }

  void AddKey(const HeadGradient& head, int64_t j, GradientSum* dk, GradientSum* dv) {
    for (int64_t i = 0; i < head.rows(); ++i) {
      const PairGradient pair = head.Pair(i, j);
      if (!pair.counts) continue;
      dk->Add(head.q(i), pair.dx, pair.dx_error, pair.ds_is_nan, pair.overflows);
      if (!pair.kept) continue;
      dv->Add(head.dout(i), pair.weight, pair.weight_error, pair.weight_is_nan, pair.overflows);
    }
  }

  void AddSink(const HeadGradient& head, int64_t h, int64_t i) {
    static const double one = 1.0;
    double value, error;
    bool is_nan, overflows;
    if (!head.Sink(i, &value, &error, &is_nan, &overflows)) return;
    dsink_[static_cast<size_t>(h)].Add(&one, value, error, is_nan, overflows);
  }

  void CompareRow(const tandem_tensor* t, int64_t b, int64_t head, int64_t start, int64_t row,
                  const GradientSum& sum, double factor, GradientResult* result) {
    if (t == nullptr) return;
    const RowAddress a = AddressOf(problem_.layout, *t, b, head, start + row);
    const int64_t columns = t->shape[t->rank - 1];
    for (int64_t c = 0; c < columns; ++c) {
      CompareElement(
          sum.Get(c, factor, options_.arithmetic, t->dtype),
          LoadReal(*t, a.offset + c * a.column_stride), [&] { return Where(b, head, row, c); },
          result);
    }
  }

  void CompareBias(const Arithmetic& f32) {
    const tandem_tensor& t = *gradients_.dbias;
    for (int64_t flat = 0; flat < static_cast<int64_t>(dbias_.size()); ++flat) {
      int64_t offset = 0, rest = flat;
      for (int d = t.rank - 1; d >= 0; --d) {
        offset += rest % t.shape[d] * t.strides[d];
        rest /= t.shape[d];
      }
      CompareElement(
          dbias_[static_cast<size_t>(flat)].Get(0, 1.0, f32, TANDEM_DTYPE_F32), LoadReal(t, offset),
          [&] { return "element " + std::to_string(flat); }, &results.dbias);
    }
  }

  void CompareAlibi(const Arithmetic& f32) {
    const tandem_tensor& t = *gradients_.dalibi;
    for (int64_t h = 0; h < d_.q_heads; ++h) {
      GradientSum all(1);
      for (int64_t b = 0; b < d_.batch; ++b) {
        const GradientSum& one = dalibi_[static_cast<size_t>(b * d_.q_heads + h)];
        if (t.rank == 1) {
          all.Merge(one);
          continue;
        }
        CompareElement(
            one.Get(0, 1.0, f32, TANDEM_DTYPE_F32),
            LoadReal(t, b * t.strides[0] + h * t.strides[1]),
            [&] { return "sequence " + std::to_string(b) + ", head " + std::to_string(h); },
            &results.dalibi);
      }
      if (t.rank == 1) {
        CompareElement(
            all.Get(0, 1.0, f32, TANDEM_DTYPE_F32), LoadReal(t, h * t.strides[0]),
            [&] { return "head " + std::to_string(h); }, &results.dalibi);
      }
    }
  }

  // Packed rows of no sequence have no gradient.
  void CompareOutside() {
    const auto outside = [&](const tandem_tensor* t, int64_t heads, int64_t rows, bool query,
                             GradientResult* result) {
      for (int64_t row = 0; t != nullptr && row < rows; ++row) {
        const bool inside =
            std::any_of(sequences_.begin(), sequences_.end(), [&](const SequenceRange& s) {
              const int64_t start = query ? s.q_start : s.kv_start;
              return row >= start && row < start + (query ? s.q_rows : s.kv_rows);
            });
        if (inside) continue;
        const GradientSum nothing(t->shape[2]);
        for (int64_t h = 0; h < heads; ++h) CompareRow(t, 0, h, 0, row, nothing, 1.0, result);
      }
    };
    outside(gradients_.dq, d_.q_heads, d_.q_rows, true, &results.dq);
    outside(gradients_.dk, d_.kv_heads, d_.kv_rows, false, &results.dk);
    outside(gradients_.dv, d_.kv_heads, d_.kv_rows, false, &results.dv);
  }

  const tandem_problem& problem_;
  const tandem_outputs& outputs_;
  const tandem_gradients& gradients_;
  const GradientCompareOptions& options_;
  const Dimensions d_;
  std::vector<SequenceRange> sequences_;
  double part_ = 1.0;
  std::vector<GradientSum> dbias_, dsink_, dalibi_;
};

struct Named {
  const char* name;
  const GradientResult* result;
};
std::vector<Named> AllOf(const GradientResults& r) {
  return {{"dq", &r.dq},       {"dk", &r.dk},       {"dv", &r.dv},
          {"dbias", &r.dbias}, {"dsink", &r.dsink}, {"dalibi", &r.dalibi}};
}

}  // namespace

bool GradientResults::InContract() const {
  const std::vector<Named> all = AllOf(*this);
  return std::all_of(all.begin(), all.end(), [](const Named& n) { return n.result->InContract(); });
}

GradientResult GradientResults::Total() const {
  GradientResult total;
  for (const Named& n : AllOf(*this)) {
    GradientResult part = *n.result;
    if (!part.worst.empty()) part.worst = std::string(n.name) + ", " + part.worst;
    Merge(part, &total);
  }
  return total;
}

std::string GradientResults::Worst() const { return Total().worst; }

GradientResults CompareGradients(const tandem_problem& problem, const tandem_outputs& outputs,
                                 const tandem_gradients& gradients,
                                 const GradientCompareOptions& options) {
  const Dimensions d = DimensionsOf(problem);
  Comparison total(problem, outputs, gradients, options);
#pragma omp parallel num_threads(options.threads > 0 ? options.threads : omp_get_max_threads())
  {
    Comparison part(problem, outputs, gradients, options);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < d.batch * d.kv_heads; ++n) part.Plane(n / d.kv_heads, n % d.kv_heads);
#pragma omp critical(tandem_gradient_total)
    total.MergeFrom(part);
  }
  total.Finish();
  return total.results;
}

}  // namespace tandem::oracle
