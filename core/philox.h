// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011),
// and the dropout decision of docs/semantics.md section 5. Host and device draw the same bits.
#ifndef TANDEM_CORE_PHILOX_H_
#define TANDEM_CORE_PHILOX_H_

#include "core/macros.h"

namespace tandem::core {

struct Philox4 {
  uint32_t word[4];
};

TANDEM_HD Philox4 Philox4x32_10(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout of one problem. rate 0: nothing is dropped.
struct Dropout {
  uint64_t seed;
  uint64_t offset;
  uint32_t threshold;  // floor(rate * 2^32): a pair is kept iff its word is at least this
  float keep_scale;    // 1 / (1 - rate)
  int32_t enabled;
};

// The four words that decide keys 4 * (j / 4) .. + 3 of row i: j and i in the sequence's own global
// coordinates, head_index = b * Hq + h.
TANDEM_HD Philox4 DropoutWords(const Dropout& dropout, int64_t head_index, int64_t i, int64_t j) {
  return Philox4x32_10(dropout.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                       static_cast<uint32_t>(head_index), static_cast<uint32_t>(dropout.offset));
}

TANDEM_HD bool DropoutKeeps(const Dropout& dropout, int64_t head_index, int64_t i, int64_t j) {
  const Philox4 words = DropoutWords(dropout, head_index, i, j);
  return words.word[j & 3] >= dropout.threshold;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_PHILOX_H_
