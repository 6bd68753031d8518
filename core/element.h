// Element types and their conversions to and from f32, equal bit for bit on host and device.
#ifndef TANDEM_CORE_ELEMENT_H_
#define TANDEM_CORE_ELEMENT_H_

#include "core/macros.h"

namespace tandem::core {

// The values of tandem_dtype.
enum class DType : int32_t {
  kUnset = 0,
  kF32 = 1,
  kF16 = 2,
  kBF16 = 3,
  kF64 = 4,
  kI32 = 5,
  kI64 = 6,
  kBool = 7,
  kBit = 8,
};

// Bytes of one element; 0 for kBit (eight to a byte) and unknown values.
TANDEM_HD int64_t ElementSize(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kBool:
      return 1;
    default:
      return 0;
  }
}

TANDEM_HD const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kF64:
      return "f64";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kBool:
      return "bool";
    case DType::kBit:
      return "bit";
    default:
      return "unset";
  }
}

TANDEM_HD float BitsToFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
TANDEM_HD uint32_t FloatToBits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

TANDEM_HD bool IsNan(float x) { return (FloatToBits(x) & 0x7fffffffu) > 0x7f800000u; }
TANDEM_HD bool IsFinite(float x) { return (FloatToBits(x) & 0x7f800000u) != 0x7f800000u; }

TANDEM_HD float Bf16ToFloat(uint16_t bits) { return BitsToFloat(uint32_t{bits} << 16); }

// Round to nearest even; NaN stays NaN (quiet).
TANDEM_HD uint16_t FloatToBf16(float value) {
  uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TANDEM_HD float F16ToFloat(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 31u) return BitsToFloat(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0u) return BitsToFloat(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24 is exact in f32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
  return BitsToFloat(sign | FloatToBits(magnitude));
}

// Round to nearest even, with f16 subnormals and overflow to infinity; NaN stays NaN (quiet).
TANDEM_HD uint16_t FloatToF16(float value) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (magnitude >= 0x38800000u) {                  // normal in f16
    const uint32_t rebased = magnitude - 0x38000000u;
    return static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  }
  if (magnitude < 0x33000000u)
    return static_cast<uint16_t>(sign);  // below half the smallest subnormal
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126u - (magnitude >> 23);  // in [14, 24]
  const uint32_t quotient = mantissa >> shift;
  const uint32_t remainder = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const uint32_t up = (remainder > half || (remainder == half && (quotient & 1u))) ? 1u : 0u;
  return static_cast<uint16_t>(sign | (quotient + up));
}

// Element `index` of an array of f32, f16 or bf16.
TANDEM_HD float LoadFloat(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    __builtin_memcpy(&value, static_cast<const char*>(data) + 4 * index, 4);
    return value;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, static_cast<const char*>(data) + 2 * index, 2);
  return dtype == DType::kF16 ? F16ToFloat(bits) : Bf16ToFloat(bits);
}

TANDEM_HD void StoreFloat(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    __builtin_memcpy(static_cast<char*>(data) + 4 * index, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kF16 ? FloatToF16(value) : FloatToBf16(value);
  __builtin_memcpy(static_cast<char*>(data) + 2 * index, &bits, 2);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_ELEMENT_H_
