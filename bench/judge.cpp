// The f64 oracle of the tests behind a C interface, so that the Python scripts can hold the answers
// of Tandem and of its peers against the same bounds.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tandem/tandem.h"
#include "tests/oracle/bounds.h"
#include "tests/oracle/compare.h"

namespace oracle = tandem::oracle;

extern "C" {

struct tandem_bench_judgement {
  double max_error;
  double error_over_bound;  // of O and LSE together
  double out_error_over_bound;
  double lse_error_over_bound;
  int64_t nonfinite_mismatches;  // NaN or infinite where it may not be, or the other way round
  int64_t empty_row_mismatches;  // elements of empty rows that are not exactly +0 (LSE: -inf)
  int64_t empty_rows;            // among the rows compared
  int64_t rows_compared;
  int64_t rows;
  char worst[256];  // the worst element in words
};

// Holds `outputs` against the oracle. All tensors in host memory, the mask given as terms. Above
// max_pairs only some rows are compared; threads 0 is OpenMP's default.
TANDEM_API void tandem_bench_judge(const tandem_problem* problem, const tandem_outputs* outputs,
                                   int32_t on_tensor_cores, int64_t max_pairs, int32_t threads,
                                   tandem_bench_judgement* judgement) {
  oracle::CompareOptions options;
  options.arithmetic = oracle::ArithmeticFor(problem->q->dtype, on_tensor_cores != 0);
  options.max_pairs = max_pairs;
  options.threads = threads;
  const oracle::CompareResult result = oracle::Compare(*problem, *outputs, options);
  *judgement = {result.max_error,
                result.error_over_bound,
                result.out_error_over_bound,
                result.lse_error_over_bound,
                result.nonfinite_mismatches,
                result.empty_row_mismatches,
                result.empty_rows,
                result.rows_compared,
                result.rows,
                {}};
  const size_t length = std::min(result.worst.size(), sizeof(judgement->worst) - 1);
  std::memcpy(judgement->worst, result.worst.data(), length);
}

// Pairs that the mask leaves, over all query heads.
TANDEM_API int64_t tandem_bench_visible_pairs(const tandem_problem* problem) {
  return oracle::CountMask(*problem).visible_pairs;
}

}  // extern "C"
