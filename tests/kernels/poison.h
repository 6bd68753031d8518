// Cases in which much is invisible, and poison in the places that nobody needs.
#ifndef TANDEM_TESTS_KERNELS_POISON_H_
#define TANDEM_TESTS_KERNELS_POISON_H_

#include <span>
#include <vector>

#include "tests/support/case.h"

namespace tandem::test {

// Each kind of term, a bias that hides, packed sequences with gaps, a shard.
std::vector<CaseSpec> PoisonSpecs();

// Which key rows (of a key head) and query rows nobody needs, and which bias elements.
struct Invisible {
  explicit Invisible(Case& c);
  // Position of an index in row-major order.
  static int64_t Flat(const Tensor& tensor, std::span<const int64_t> index) {
    int64_t flat = 0;
    for (size_t d = 0; d < index.size(); ++d) flat = flat * tensor.shape()[d] + index[d];
    return flat;
  }
  static int64_t FlatRow(const Tensor& tensor, std::span<const int64_t> index) {
    std::vector<int64_t> row(index.begin(), index.end());
    row.back() = 0;
    return Flat(tensor, row);
  }
  std::vector<bool> key_is_needed, query_is_needed, bias_is_needed;
};

// NaN, infinities (kinds 0 to 2) or a mixture (3).
constexpr int kPoisonKinds = 4;
float Poison(int kind, Random& random);

// Over the rows of q, k and v and the elements of the bias that nobody needs.
void PoisonInvisible(Case& c, const Invisible& invisible, int kind);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_POISON_H_
