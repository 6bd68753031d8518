// An independent f64 oracle of masked attention: docs/semantics.md in plain loops over the public
// problem, with the error bound of every element. It shares no code with the library.
//
// Problems must be valid, in host memory, with the mask given as terms; K and V as tensors.
#ifndef TANDEM_TESTS_ORACLE_ORACLE_H_
#define TANDEM_TESTS_ORACLE_ORACLE_H_

#include <cstdint>
#include <vector>

#include "tandem/tandem.h"
#include "tests/oracle/bounds.h"
#include "tests/oracle/visibility.h"

namespace tandem::oracle {

// What an output element must be.
enum class Expect : uint8_t {
  kValue,      // within its bound of the expected value
  kExact,      // the expected value, bit for bit in the output's type (+0 and -inf of empty rows)
  kNan,        // a NaN is visible
  kNonFinite,  // an infinity of V is visible: NaN or an infinity
  kAny,        // f32 arithmetic overflows: not compared
};

struct Row {
  std::vector<double> out;        // [Dv]
  std::vector<double> out_bound;  // [Dv]
  std::vector<Expect> out_expect;
  double lse = 0;
  double lse_bound = 0;
  Expect lse_expect = Expect::kExact;
  int64_t visible_keys = 0;  // without those that a bias of -inf hides, and without the sink
  bool empty = true;         // O = +0, LSE = -inf
};

// Row i of sequence b, query head h (local coordinates). out_dtype: that of the output compared.
// row's memory is reused. Rows of packed tensors outside every sequence have no b: EmptyRow.
void ComputeRow(const tandem_problem& problem, const SequenceRange& sequence, int64_t b, int64_t h,
                int64_t i, const Arithmetic& arithmetic, tandem_dtype out_dtype, Row* row);
void EmptyRow(int64_t v_dim, Row* row);

// Philox4x32-10, and whether dropout keeps a pair; i and j in the sequence's global coordinates.
void Philox(uint64_t key, const uint32_t counter[4], uint32_t result[4]);
bool DropoutKeeps(const tandem_problem& problem, int64_t head_index, int64_t i, int64_t j);

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_ORACLE_H_
