// The oracle of the backward pass: docs/semantics.md section 6 in f64, pair by pair, for the O and
// LSE that are given, with the error bound of every element.
#ifndef TANDEM_TESTS_ORACLE_GRADIENT_H_
#define TANDEM_TESTS_ORACLE_GRADIENT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "tandem/tandem.h"
#include "tests/oracle/bounds.h"
#include "tests/oracle/oracle.h"
#include "tests/oracle/visibility.h"

namespace tandem::oracle {

// One (row, key) pair of a head. Where it is not visible, or its row is empty, nothing is set.
struct PairGradient {
  bool counts = false;
  bool kept = true;                     // by dropout
  double weight = 0, weight_error = 0;  // the factor of dO in dV
  double ds = 0, ds_error = 0;          // with respect to the score
  double dx = 0, dx_error = 0;          // with respect to scale * <q, k>
  bool weight_is_nan = false, ds_is_nan = false;
  bool overflows = false;  // in f32, or from infinities: nothing is compared
};

// sum factor * row over pairs, each element of it.
class GradientSum {
 public:
  explicit GradientSum(int64_t columns = 1);
  void Clear();
  void Add(const double* row, double factor, double factor_error, bool is_nan, bool overflows);

  struct Element {
    double value, bound;
    Expect expect;
  };
  // The element times `factor`; +0 exactly where nothing was added.
  Element Get(int64_t column, double factor, const Arithmetic& a, tandem_dtype dtype) const;

  void Merge(const GradientSum& other);

 private:
  struct Part {
    double value = 0, magnitude = 0, error = 0, operands = 0;
    bool nan = false, infinite = false;
  };
  std::vector<Part> parts_;
  int64_t terms_ = 0;
  bool nan_ = false, overflows_ = false;
};

// All pairs of one query head of one sequence.
class HeadGradient {
 public:
  HeadGradient(const tandem_problem& problem, const tandem_outputs& outputs,
               const tandem_gradients& gradients, const SequenceRange& sequence, int64_t b,
               int64_t h, const Arithmetic& arithmetic);

  PairGradient Pair(int64_t i, int64_t j) const;
  // |d - j| of ALiBi.
  double Distance(int64_t i, int64_t j) const;
  // The gradient of the sink that row i adds; false: none.
  bool Sink(int64_t i, double* value, double* error, bool* is_nan, bool* overflows) const;

  int64_t rows() const { return sequence_.q_rows; }
  int64_t keys() const { return sequence_.kv_rows; }
  const double* q(int64_t i) const { return &q_[static_cast<size_t>(i * qk_dim_)]; }
  const double* k(int64_t j) const { return &k_[static_cast<size_t>(j * qk_dim_)]; }
  const double* dout(int64_t i) const { return &dout_[static_cast<size_t>(i * v_dim_)]; }

 private:
  struct RowState {
    double lse = 0, dlse = 0;
    double d = 0, d_error = 0;  // D
  };
  bool Exists(int64_t i) const { return sequence_.q_offset + i < sequence_.q_len; }

  const tandem_problem& problem_;
  SequenceRange sequence_;
  Arithmetic arithmetic_;
  int64_t b_, h_, qk_dim_, v_dim_, q_heads_;
  double scale_;
  std::vector<double> q_, k_, v_, dout_;
  std::vector<RowState> states_;
  std::vector<RowVisibility> visibility_;
  std::vector<BiasRow> bias_;
};

struct GradientResult {
  double max_error = 0;
  double error_over_bound = 0;
  int64_t nonfinite_mismatches = 0;  // NaN or infinite where it may not be, or the other way round
  int64_t zero_mismatches = 0;       // not exactly +0 where no pair contributes
  bool compared = false;
  std::string worst;

  bool InContract() const {
    return error_over_bound <= 1.0 && nonfinite_mismatches == 0 && zero_mismatches == 0;
  }
};

struct GradientResults {
  GradientResult dq, dk, dv, dbias, dsink, dalibi;
  bool InContract() const;
  // The gradient that is worst off: its name and its worst element.
  std::string Worst() const;
  GradientResult Total() const;
};

struct GradientCompareOptions {
  Arithmetic arithmetic;
  // Above this many (row, key) pairs some rows of dq and some keys of dk and dv are compared, and
  // no dbias and dalibi.
  int64_t max_pairs = int64_t{1} << 24;
  int threads = 0;
};

// All gradients that are given. outputs holds the O and LSE that the backward pass was given.
GradientResults CompareGradients(const tandem_problem& problem, const tandem_outputs& outputs,
                                 const tandem_gradients& gradients,
                                 const GradientCompareOptions& options = {});

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_GRADIENT_H_
