#include "tests/oracle/compare.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "tests/oracle/tensor.h"

namespace tandem::oracle {
namespace {

// One row to compare.
struct Place {
  int64_t sequence;  // -1: a packed row outside every sequence
  int64_t head;
  int64_t row;  // local; of the tensor where sequence is -1
};

int ThreadCount(int threads) { return threads > 0 ? threads : omp_get_max_threads(); }

std::vector<SequenceRange> AllSequences(const tandem_problem& problem) {
  std::vector<SequenceRange> sequences;
  const int64_t count = SequenceCount(problem);
  for (int64_t b = 0; b < count; ++b) sequences.push_back(SequenceOf(problem, b));
  return sequences;
}

// Packed rows that no sequence owns: before the first and after the last.
std::vector<int64_t> RowsOutside(const Dimensions& d, const std::vector<SequenceRange>& sequences) {
  std::vector<int64_t> rows;
  if (!d.packed) return rows;
  int64_t begin = 0, end = 0;
  if (!sequences.empty()) {
    begin = sequences.front().q_start;
    end = sequences.back().q_start + sequences.back().q_rows;
  }
  for (int64_t row = 0; row < begin; ++row) rows.push_back(row);
  for (int64_t row = std::max(begin, end); row < d.q_rows; ++row) rows.push_back(row);
  return rows;
}

// A fixed hash, so that the rows chosen do not march in step with any tile.
uint64_t Scatter(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9u;
  return x ^ (x >> 32);
}

std::vector<Place> ChoosePlaces(const Dimensions& d, const std::vector<SequenceRange>& sequences,
                                int64_t max_pairs) {
  double pairs = 0;
  for (const SequenceRange& s : sequences) {
    pairs += static_cast<double>(s.q_rows) * static_cast<double>(s.kv_rows);
  }
  pairs *= static_cast<double>(d.q_heads);
  const double part = pairs > static_cast<double>(max_pairs) ? max_pairs / pairs : 1.0;
  std::vector<Place> places;
  for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b) {
    const int64_t rows = sequences[static_cast<size_t>(b)].q_rows;
    const int64_t count = std::min(
        rows, std::max<int64_t>(2, static_cast<int64_t>(part * static_cast<double>(rows))));
    for (int64_t h = 0; h < d.q_heads; ++h) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t begin = n * rows / count;
        const int64_t end = (n + 1) * rows / count;
        int64_t row = begin + static_cast<int64_t>(
                                  Scatter(static_cast<uint64_t>((b * d.q_heads + h) * rows + n)) %
                                  static_cast<uint64_t>(end - begin));
        if (n == 0) row = 0;
        if (n == count - 1) row = rows - 1;
        places.push_back({b, h, row});
      }
    }
  }
  for (const int64_t row : RowsOutside(d, sequences)) {
    for (int64_t h = 0; h < d.q_heads; ++h) places.push_back({-1, h, row});
  }
  return places;
}

// Where row `row` of the outputs lies: local rows of a sequence, or rows of a packed tensor.
struct OutputRow {
  int64_t out_offset;
  int64_t out_stride;
  int64_t lse_offset;
};

OutputRow LocateRow(const tandem_problem& problem, const tandem_outputs& outputs, int64_t b,
                    int64_t h, int64_t row) {
  const tandem_tensor& out = *outputs.out;
  const tandem_tensor* lse = outputs.lse;
  OutputRow place = {};
  if (problem.layout == TANDEM_LAYOUT_THD) {
    place.out_offset = row * out.strides[0] + h * out.strides[1];
    place.out_stride = out.strides[2];
    if (lse != nullptr) place.lse_offset = h * lse->strides[0] + row * lse->strides[1];
    return place;
  }
  const bool heads_first = problem.layout == TANDEM_LAYOUT_BHSD;
  place.out_offset = b * out.strides[0] + h * out.strides[heads_first ? 1 : 2] +
                     row * out.strides[heads_first ? 2 : 1];
  place.out_stride = out.strides[3];
  if (lse != nullptr) {
    place.lse_offset = b * lse->strides[0] + h * lse->strides[1] + row * lse->strides[2];
  }
  return place;
}

struct Element {
  double expected;
  double bound;
  Expect expect;
  double actual;
};

// Compares one element; *ratio is its error / bound.
void CompareElement(const Element& e, CompareResult* result, double* error, double* ratio) {
  *error = 0;
  *ratio = 0;
  switch (e.expect) {
    case Expect::kAny:
      return;
    case Expect::kNan:
      if (!std::isnan(e.actual)) ++result->nonfinite_mismatches;
      return;
    case Expect::kNonFinite:
      if (std::isfinite(e.actual)) ++result->nonfinite_mismatches;
      return;
    case Expect::kExact:
      if (e.actual != e.expected || std::signbit(e.actual) != std::signbit(e.expected)) {
        ++result->empty_row_mismatches;
      }
      return;
    case Expect::kValue:
      if (!std::isfinite(e.actual)) {
        ++result->nonfinite_mismatches;
        return;
      }
      *error = std::fabs(e.actual - e.expected);
      *ratio = *error == 0 ? 0 : *error / e.bound;
  }
}

std::string DescribeElement(const Place& place, int64_t column, const Element& e, double ratio) {
  char text[256];
  char where[32];
  if (column >= 0) {
    snprintf(where, sizeof(where), "out column %lld", static_cast<long long>(column));
  } else {
    snprintf(where, sizeof(where), "lse");
  }
  snprintf(text, sizeof(text),
           "sequence %lld, head %lld, row %lld, %s: %.9g, expected %.9g, error/bound %.3g",
           static_cast<long long>(place.sequence), static_cast<long long>(place.head),
           static_cast<long long>(place.row), where, e.actual, e.expected, ratio);
  return text;
}

// Keeps the worst element, or the first that is wrong in kind.
void NoteElement(const Place& place, int64_t column, const Element& e, double error, double ratio,
                 int64_t wrong_before, CompareResult* result) {
  double& part = column >= 0 ? result->out_error_over_bound : result->lse_error_over_bound;
  double& largest = column >= 0 ? result->max_error : result->lse_max_error;
  largest = std::max(largest, error);
  part = std::max(part, ratio);
  const int64_t wrong = result->nonfinite_mismatches + result->empty_row_mismatches;
  if ((wrong > wrong_before && wrong_before == 0) ||
      (wrong == 0 && (ratio > result->error_over_bound || result->worst.empty()))) {
    result->worst = DescribeElement(place, column, e, ratio);
  }
  result->error_over_bound = std::max(result->error_over_bound, ratio);
}

void CompareRow(const tandem_problem& problem, const tandem_outputs& outputs, const Place& place,
                const SequenceRange* sequence, const Row& expected, CompareResult* result) {
  const int64_t row = sequence != nullptr && problem.layout == TANDEM_LAYOUT_THD
                          ? sequence->q_start + place.row
                          : place.row;
  const OutputRow output = LocateRow(problem, outputs, place.sequence, place.head, row);
  double error, ratio;
  for (int64_t d = 0; d < static_cast<int64_t>(expected.out.size()); ++d) {
    const size_t n = static_cast<size_t>(d);
    const Element e = {expected.out[n], expected.out_bound[n], expected.out_expect[n],
                       LoadReal(*outputs.out, output.out_offset + d * output.out_stride)};
    const int64_t wrong = result->nonfinite_mismatches + result->empty_row_mismatches;
    CompareElement(e, result, &error, &ratio);
    NoteElement(place, d, e, error, ratio, wrong, result);
  }
  if (outputs.lse != nullptr) {
    const Element e = {expected.lse, expected.lse_bound, expected.lse_expect,
                       LoadReal(*outputs.lse, output.lse_offset)};
    const int64_t wrong = result->nonfinite_mismatches + result->empty_row_mismatches;
    CompareElement(e, result, &error, &ratio);
    NoteElement(place, -1, e, error, ratio, wrong, result);
  }
  ++result->rows_compared;
  if (expected.visible_keys == 0) ++result->empty_rows;
}

bool IsWorse(const CompareResult& a, const CompareResult& b) {
  const int64_t wrong_a = a.nonfinite_mismatches + a.empty_row_mismatches;
  const int64_t wrong_b = b.nonfinite_mismatches + b.empty_row_mismatches;
  if ((wrong_a > 0) != (wrong_b > 0)) return wrong_a > 0;
  return a.error_over_bound > b.error_over_bound || b.worst.empty();
}

void Accumulate(const CompareResult& part, CompareResult* total) {
  if (IsWorse(part, *total)) total->worst = part.worst;
  total->max_error = std::max(total->max_error, part.max_error);
  total->error_over_bound = std::max(total->error_over_bound, part.error_over_bound);
  total->out_error_over_bound = std::max(total->out_error_over_bound, part.out_error_over_bound);
  total->lse_max_error = std::max(total->lse_max_error, part.lse_max_error);
  total->lse_error_over_bound = std::max(total->lse_error_over_bound, part.lse_error_over_bound);
  total->nonfinite_mismatches += part.nonfinite_mismatches;
  total->empty_row_mismatches += part.empty_row_mismatches;
  total->empty_rows += part.empty_rows;
  total->rows_compared += part.rows_compared;
}

}  // namespace

MaskCount CountMask(const tandem_problem& problem, int threads) {
  const Dimensions d = DimensionsOf(problem);
  const std::vector<SequenceRange> sequences = AllSequences(problem);
  const int64_t heads = VisibilityDependsOnHead(problem) ? d.q_heads : 1;
  const int64_t repeats = d.q_heads / heads;
  MaskCount count;
  count.rows = d.q_heads * d.q_rows * (d.packed ? 1 : d.batch);
  count.empty_rows = d.q_heads * static_cast<int64_t>(RowsOutside(d, sequences).size());
  for (int64_t b = 0; b < d.batch; ++b) {
    const SequenceRange& s = sequences[static_cast<size_t>(b)];
    int64_t empty = 0, pairs = 0;
#pragma omp parallel for schedule(dynamic, 16) num_threads(ThreadCount(threads)) \
    reduction(+ : empty, pairs)
    for (int64_t n = 0; n < heads * s.q_rows; ++n) {
      const int64_t keys = CountVisibleKeys(problem, s, b, n / s.q_rows, n % s.q_rows);
      pairs += keys;
      empty += keys == 0 ? 1 : 0;
    }
    count.visible_pairs += pairs * repeats;
    count.empty_rows += empty * repeats;
  }
  return count;
}

CompareResult Compare(const tandem_problem& problem, const tandem_outputs& outputs,
                      const CompareOptions& options) {
  const Dimensions d = DimensionsOf(problem);
  const std::vector<SequenceRange> sequences = AllSequences(problem);
  const std::vector<Place> places = ChoosePlaces(d, sequences, options.max_pairs);
  const int64_t place_count = static_cast<int64_t>(places.size());
  CompareResult total;
  total.rows = d.q_heads * d.q_rows * (d.packed ? 1 : d.batch);
  int64_t done = 0;
#pragma omp parallel num_threads(ThreadCount(options.threads))
  {
    CompareResult part;
    Row expected;
#pragma omp for schedule(dynamic, 16)
    for (int64_t n = 0; n < place_count; ++n) {
      const Place& place = places[static_cast<size_t>(n)];
      const SequenceRange* sequence =
          place.sequence < 0 ? nullptr : &sequences[static_cast<size_t>(place.sequence)];
      if (sequence == nullptr) {
        EmptyRow(d.v_dim, &expected);
      } else {
        ComputeRow(problem, *sequence, place.sequence, place.head, place.row, options.arithmetic,
                   outputs.out->dtype, &expected);
      }
      CompareRow(problem, outputs, place, sequence, expected, &part);
      if (options.progress && n % 64 == 0) {
#pragma omp critical(tandem_oracle_progress)
        {
          done = std::max(done, n);
          options.progress(static_cast<double>(done) / static_cast<double>(place_count));
        }
      }
    }
#pragma omp critical(tandem_oracle_total)
    Accumulate(part, &total);
  }
  return total;
}

}  // namespace tandem::oracle
