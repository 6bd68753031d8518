#include "cli/random_data.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem::cli {
namespace {

constexpr double kTwoPi = 6.283185307179586476925;

// Round to nearest even. |value| is far below the largest f16.
uint16_t ToHalf(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int significand = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A significand below 1024 is subnormal, one of 2048 carries into the exponent.
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + significand));
}

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

// Box-Muller: two numbers from two uniform ones of 53 bits, the first in (0, 1].
double NormalData::Next() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const double u1 = static_cast<double>((engine_() >> 11) + 1) * 0x1p-53;
  const double u2 = static_cast<double>(engine_() >> 11) * 0x1p-53;
  const double radius = std::sqrt(-2 * std::log(u1));
  spare_ = radius * std::sin(kTwoPi * u2);
  has_spare_ = true;
  return radius * std::cos(kTwoPi * u2);
}

void NormalData::Fill(tandem_dtype dtype, int64_t count, void* data) {
  for (int64_t n = 0; n < count; ++n) {
    const double value = Next();
    if (dtype == TANDEM_DTYPE_F32) {
      static_cast<float*>(data)[n] = static_cast<float>(value);
    } else {
      static_cast<uint16_t*>(data)[n] =
          dtype == TANDEM_DTYPE_F16 ? ToHalf(value) : ToBfloat16(static_cast<float>(value));
    }
  }
}

}  // namespace tandem::cli
