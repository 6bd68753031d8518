// How the answers of tandem_benchmark's cases compare with the oracle, and CPU with CUDA.
#ifndef TANDEM_BENCH_CASE_ACCURACY_H_
#define TANDEM_BENCH_CASE_ACCURACY_H_

#include "bench/benchmark_case.h"

namespace tandem::bench {

// The largest error / bound over sampled rows of O and LSE; infinite where an answer is wrong by
// definition.
double ErrorOverBound(const HostCase& host, Answer answer, Device device);

// The largest difference of the two devices' O over the sum of their bounds, over sampled rows.
double DifferenceOverBounds(const HostCase& host, const Answer& cpu, const Answer& cuda);

}  // namespace tandem::bench

#endif  // TANDEM_BENCH_CASE_ACCURACY_H_
