// Comparing a kernel's outputs with the oracle.
#ifndef TANDEM_TESTS_ORACLE_COMPARE_H_
#define TANDEM_TESTS_ORACLE_COMPARE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "tandem/tandem.h"
#include "tests/oracle/bounds.h"
#include "tests/oracle/oracle.h"

namespace tandem::oracle {

// What the mask alone says of a problem, over all rows of all query heads.
struct MaskCount {
  int64_t rows = 0;
  int64_t empty_rows = 0;  // rows that see no key
  int64_t visible_pairs = 0;
};
// threads 0: OpenMP's default.
MaskCount CountMask(const tandem_problem& problem, int threads = 0);

struct CompareOptions {
  Arithmetic arithmetic;
  // Above this many (row, key) pairs only some rows are compared, the same ones every time: the
  // first and the last of every sequence and head, and one of each stretch between.
  int64_t max_pairs = int64_t{1} << 24;
  int threads = 0;
  // Called now and then, from any thread but never from two at once, with the part done in [0, 1].
  std::function<void(double)> progress;
};

struct CompareResult {
  double max_error = 0;         // of O, over elements that have a value
  double error_over_bound = 0;  // of O and LSE together
  double out_error_over_bound = 0;
  double lse_max_error = 0;
  double lse_error_over_bound = 0;
  // Elements of O or LSE that are NaN or infinite where they may not be, or the other way round.
  int64_t nonfinite_mismatches = 0;
  // Elements of O or LSE of empty rows that are not exactly +0 or -inf.
  int64_t empty_row_mismatches = 0;
  int64_t empty_rows = 0;  // rows compared that see no key
  int64_t rows_compared = 0;
  int64_t rows = 0;
  std::string worst;  // the worst element in words; "" when nothing was compared

  bool InContract() const {
    return error_over_bound <= 1.0 && nonfinite_mismatches == 0 && empty_row_mismatches == 0;
  }
};

// outputs: host tensors of `problem`; lse may be null.
CompareResult Compare(const tandem_problem& problem, const tandem_outputs& outputs,
                      const CompareOptions& options = {});

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_COMPARE_H_
