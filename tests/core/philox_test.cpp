#include "core/philox.h"

#include <gtest/gtest.h>

#include <cmath>

#include "oracle/oracle.h"

namespace tandem::core {
namespace {

// The known answers that accompany the generator's publication (Random123, philox4x32 10 rounds).
TEST(PhiloxSmall, KnownAnswers) {
  const struct {
    uint32_t counter[4];
    uint64_t key;
    uint32_t expected[4];
  } vectors[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       0xffffffffffffffffull,
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822ull,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& vector : vectors) {
    const Philox4 words = Philox4x32_10(vector.key, vector.counter[0], vector.counter[1],
                                        vector.counter[2], vector.counter[3]);
    uint32_t second_opinion[4];
    oracle::Philox(vector.key, vector.counter, second_opinion);
    for (int n = 0; n < 4; ++n) {
      EXPECT_EQ(words.word[n], vector.expected[n]);
      EXPECT_EQ(second_opinion[n], vector.expected[n]);
    }
  }
}

Dropout MakeDropout(double rate) {
  Dropout dropout = {};
  dropout.seed = 0x0123456789abcdefull;
  dropout.offset = 42;
  dropout.threshold = static_cast<uint32_t>(std::floor(rate * 4294967296.0));
  dropout.enabled = 1;
  return dropout;
}

TEST(PhiloxSmall, CounterIsKeyGroupRowHeadOffset) {
  const Dropout dropout = MakeDropout(0.5);
  const int64_t places[][3] = {{0, 0, 0}, {3, 1, 2}, {100000, 70000, 123457}, {31, 0, 4294967299}};
  for (const auto& [head_index, i, j] : places) {
    const Philox4 words =
        Philox4x32_10(dropout.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                      static_cast<uint32_t>(head_index), 42);
    EXPECT_EQ(DropoutKeeps(dropout, head_index, i, j), words.word[j & 3] >= dropout.threshold);
  }
}

TEST(PhiloxSmall, KeepsTheRightShare) {
  for (const double rate : {0.0, 0.1, 0.5, 0.9}) {
    const Dropout dropout = MakeDropout(rate);
    int64_t kept = 0;
    for (int64_t i = 0; i < 200; ++i) {
      for (int64_t j = 0; j < 500; ++j) kept += DropoutKeeps(dropout, 5, i, j);
    }
    // Four standard deviations of 100000 draws.
    EXPECT_NEAR(static_cast<double>(kept) / 1e5, 1.0 - rate,
                4.0 * std::sqrt(rate * (1.0 - rate) / 1e5));
  }
}

}  // namespace
}  // namespace tandem::core
