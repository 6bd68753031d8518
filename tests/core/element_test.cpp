#include "core/element.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>

namespace tandem::core {
namespace {

// The value of a bit pattern with the given field widths, from the definition of the format.
double ValueOf(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
  }
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias)
                       : sign * std::ldexp(1.0 + fraction, exponent - bias);
}

struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  float (*to_float)(uint16_t);
  uint16_t (*from_float)(float);
  uint16_t infinity;
};

const Format kF16 = {"f16",
                     5,
                     10,
                     [](uint16_t bits) { return F16ToFloat(bits); },
                     [](float value) { return FloatToF16(value); },
                     0x7c00};
const Format kBf16 = {"bf16",
                      8,
                      7,
                      [](uint16_t bits) { return Bf16ToFloat(bits); },
                      [](float value) { return FloatToBf16(value); },
                      0x7f80};

class ElementSmall : public ::testing::TestWithParam<Format> {
 protected:
  double Value(uint16_t bits) const {
    return ValueOf(bits, GetParam().exponent_bits, GetParam().mantissa_bits);
  }
};

TEST_P(ElementSmall, EveryPatternHasItsValueAndRoundTrips) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    const float value = GetParam().to_float(pattern);
    const double expected = Value(pattern);
    if (std::isnan(expected)) {
      ASSERT_TRUE(IsNan(value)) << std::hex << bits;
      ASSERT_TRUE(std::isnan(Value(GetParam().from_float(value)))) << std::hex << bits;
      ASSERT_EQ(GetParam().from_float(value) >> 15, bits >> 15) << std::hex << bits;
      continue;
    }
    ASSERT_EQ(value, expected) << std::hex << bits;
    ASSERT_EQ(std::signbit(value), (bits >> 15) != 0) << std::hex << bits;
    ASSERT_EQ(GetParam().from_float(value), pattern) << std::hex << bits;
    ASSERT_EQ(IsFinite(value), std::isfinite(expected));
  }
}

// Between neighbours a < b: the middle goes to the even one, everything else to the nearer one.
TEST_P(ElementSmall, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < GetParam().infinity; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    const uint16_t high = static_cast<uint16_t>(bits + 1);
    // The step beyond the largest finite value ends where the next power of two would be.
    const double above =
        high == GetParam().infinity ? 2 * Value(low) - Value(low - 1) : Value(high);
    const double middle = 0.5 * (Value(low) + above);
    const float exact = static_cast<float>(middle);
    if (static_cast<double>(exact) != middle) continue;  // half of the smallest bf16 subnormals
    const uint16_t even = (bits & 1u) == 0 ? low : high;
    for (const uint16_t sign : {0, 0x8000}) {
      const float signed_middle = sign != 0 ? -exact : exact;
      ASSERT_EQ(GetParam().from_float(signed_middle), even | sign) << std::hex << bits;
      const float toward_zero = std::nextafterf(signed_middle, 0.0f);
      const float away = std::nextafterf(signed_middle, sign != 0 ? -HUGE_VALF : HUGE_VALF);
      ASSERT_EQ(GetParam().from_float(toward_zero), low | sign) << std::hex << bits;
      ASSERT_EQ(GetParam().from_float(away), high | sign) << std::hex << bits;
    }
  }
}

TEST_P(ElementSmall, OverflowAndInfinity) {
  const float largest = GetParam().to_float(static_cast<uint16_t>(GetParam().infinity - 1));
  EXPECT_EQ(GetParam().from_float(largest), GetParam().infinity - 1);
  EXPECT_EQ(GetParam().from_float(std::numeric_limits<float>::max()), GetParam().infinity);
  EXPECT_EQ(GetParam().from_float(-std::numeric_limits<float>::max()),
            GetParam().infinity | 0x8000);
  EXPECT_EQ(GetParam().from_float(HUGE_VALF), GetParam().infinity);
  EXPECT_EQ(GetParam().from_float(-HUGE_VALF), GetParam().infinity | 0x8000);
}

INSTANTIATE_TEST_SUITE_P(Formats, ElementSmall, ::testing::Values(kF16, kBf16),
                         [](const auto& info) { return info.param.name; });

RC_GTEST_PROP(ElementProperty, ConversionIsTheNearestValue, (uint32_t bits)) {
  const float value = BitsToFloat(bits);
  RC_PRE(IsFinite(value));
  for (const Format& format : {kF16, kBf16}) {
    const uint16_t rounded = format.from_float(value);
    const double got = ValueOf(rounded, format.exponent_bits, format.mantissa_bits);
    if (std::isinf(got)) {
      const double largest = ValueOf(static_cast<uint16_t>(format.infinity - 1),
                                     format.exponent_bits, format.mantissa_bits);
      RC_ASSERT(std::fabs(static_cast<double>(value)) > largest);
      continue;
    }
    for (const int step : {-1, 1}) {
      const uint16_t other = static_cast<uint16_t>(rounded + step);
      const double neighbour = ValueOf(other, format.exponent_bits, format.mantissa_bits);
      if (!std::isfinite(neighbour)) continue;
      RC_ASSERT(std::fabs(got - value) <= std::fabs(neighbour - value));
    }
  }
}

TEST(ElementSmallAccess, LoadAndStoreAtAnyAlignment) {
  alignas(8) char memory[64] = {};
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    char* data = memory + ElementSize(dtype);
    for (int64_t n = 0; n < 5; ++n)
      StoreFloat(data, dtype, n, 0.25f * static_cast<float>(n) - 0.5f);
    for (int64_t n = 0; n < 5; ++n) {
      EXPECT_EQ(LoadFloat(data, dtype, n), 0.25f * static_cast<float>(n) - 0.5f);
    }
  }
}

}  // namespace
}  // namespace tandem::core
