// Reading host tensors in f64, by the public descriptor alone.
#ifndef TANDEM_TESTS_ORACLE_TENSOR_H_
#define TANDEM_TESTS_ORACLE_TENSOR_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tandem/tandem.h"

namespace tandem::oracle {

inline double HalfToDouble(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, -24);
  } else {
    magnitude = std::ldexp(1024 + fraction, exponent - 25);
  }
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

inline double Bfloat16ToDouble(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) * 65536u;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// HalfToDouble for all 65536 values.
const double* HalfTable();

template <typename T>
inline T LoadAs(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

inline double LoadReal(const tandem_tensor& t, int64_t offset) {
  switch (t.dtype) {
    case TANDEM_DTYPE_F32:
      return LoadAs<float>(t.data, offset);
    case TANDEM_DTYPE_F64:
      return LoadAs<double>(t.data, offset);
    case TANDEM_DTYPE_F16:
      return HalfTable()[LoadAs<uint16_t>(t.data, offset)];
    case TANDEM_DTYPE_BF16:
      return Bfloat16ToDouble(LoadAs<uint16_t>(t.data, offset));
    default:
      return NAN;
  }
}

inline int64_t LoadInteger(const tandem_tensor& t, int64_t offset) {
  return t.dtype == TANDEM_DTYPE_I64 ? LoadAs<int64_t>(t.data, offset)
                                     : int64_t{LoadAs<int32_t>(t.data, offset)};
}

inline bool LoadTruth(const tandem_tensor& t, int64_t offset) {
  const unsigned char* bytes = static_cast<const unsigned char*>(t.data);
  if (t.dtype == TANDEM_DTYPE_BIT) return ((bytes[offset >> 3] >> (offset & 7)) & 1) != 0;
  return bytes[offset] != 0;
}

// Stride of dimension `axis`, 0 where the tensor is broadcast along it.
inline int64_t BroadcastStride(const tandem_tensor& t, int axis) {
  return t.shape[axis] == 1 ? 0 : t.strides[axis];
}

// `count` elements of one row in f64.
void LoadRow(const tandem_tensor& t, int64_t offset, int64_t stride, int64_t count, double* row);

}  // namespace tandem::oracle

#endif  // TANDEM_TESTS_ORACLE_TENSOR_H_
