// Reproducible normal data for --shape: the same numbers on every machine (up to the last bit of
// its libm).
#ifndef TANDEM_CLI_RANDOM_DATA_H_
#define TANDEM_CLI_RANDOM_DATA_H_

#include <cstdint>
#include <random>

#include "tandem/tandem.h"

namespace tandem::cli {

class NormalData {
 public:
  explicit NormalData(uint64_t seed) : engine_(seed) {}

  // Fills data with `count` elements of dtype f32, f16 or bf16, drawn from N(0, 1).
  void Fill(tandem_dtype dtype, int64_t count, void* data);

 private:
  double Next();

  std::mt19937_64 engine_;
  double spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_RANDOM_DATA_H_
