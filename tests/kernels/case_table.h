// The cases that every registered kernel is run on: a table that names what it covers, and random
// combinations of everything.
#ifndef TANDEM_TESTS_KERNELS_CASE_TABLE_H_
#define TANDEM_TESTS_KERNELS_CASE_TABLE_H_

#include <ostream>
#include <vector>

#include "tests/support/case.h"

namespace tandem::test {

// Every name is unique.
std::vector<CaseSpec> CaseTable();

// Two heads of these sizes.
CaseSpec SizedCase(const char* name, tandem_layout layout, int64_t q_rows, int64_t kv_rows,
                   int64_t qk_dim, int64_t v_dim, std::vector<TermSpec> terms, uint64_t seed);
// Sizes, strides and layouts whose memory has edges of every kind, for tests of what lies beside
// it.
std::vector<CaseSpec> CasesWithEdges();
// Four sequences with so many rows each and up to so many keys, one without any; six heads over
// two.
CaseSpec SequencesOfKeys(const char* name, tandem_dtype dtype, int64_t q_rows, int64_t kv_rows,
                         int64_t qk_dim, int64_t v_dim);
// The case with so many sequences. Packed, its first one is the longest, so that a dense mask keeps
// its shape.
CaseSpec WithBatch(CaseSpec spec, int64_t batch);

CaseSpec RandomCase(uint64_t seed);
// What a random case is made of, in one line.
std::string Summary(const CaseSpec& spec);

std::ostream& operator<<(std::ostream& stream, const CaseSpec& spec);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_CASE_TABLE_H_
