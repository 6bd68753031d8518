// The bytes of a fuzz target's input, and the memory that the arrays of its problem lie in.
#ifndef TANDEM_TESTS_FUZZ_POOL_H_
#define TANDEM_TESTS_FUZZ_POOL_H_

#include <cstddef>
#include <cstdint>

#include "tandem/tandem.h"

namespace {

// All arrays lie in here, around the middle, so that strides may be negative.
constexpr int64_t kPoolSize = int64_t{1} << 18;
alignas(64) unsigned char pool[kPoolSize];

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() { return position_ < size_ ? data_[position_++] : 0; }
  int64_t Below(int64_t n) { return Next() % n; }
  bool Coin() { return (Next() & 1) != 0; }
  bool Done() const { return position_ >= size_; }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t position_ = 0;
};

constexpr int64_t kTelling[] = {0,
                                1,
                                -1,
                                2,
                                3,
                                7,
                                64,
                                255,
                                65537,
                                INT32_MAX,
                                INT32_MIN,
                                int64_t{1} << 32,
                                int64_t{1} << 40,
                                int64_t{1} << 62,
                                INT64_MAX,
                                INT64_MIN};

int64_t BitsOf(tandem_dtype dtype) {
  switch (dtype) {
    case TANDEM_DTYPE_F32:
    case TANDEM_DTYPE_I32:
      return 32;
    case TANDEM_DTYPE_F16:
    case TANDEM_DTYPE_BF16:
      return 16;
    case TANDEM_DTYPE_BOOL:
      return 8;
    case TANDEM_DTYPE_BIT:
      return 1;
    default:
      return 64;
  }
}

// Whether every element lies in the pool.
bool LiesInPool(const tandem_tensor& t) {
  if (t.data == nullptr || t.rank < 0 || t.rank > TANDEM_MAX_RANK) return true;  // not read
  __extension__ using Wide = __int128;
  Wide low = 0, high = 0;
  for (int32_t n = 0; n < t.rank; ++n) {
    if (t.shape[n] <= 0) return true;
    const Wide reach = static_cast<Wide>(t.shape[n] - 1) * t.strides[n];
    (reach < 0 ? low : high) += reach;
  }
  const Wide start = static_cast<unsigned char*>(t.data) - pool;
  const Wide bits = BitsOf(t.dtype);
  return start * 8 + low * bits >= 0 && start * 8 + (high + 1) * bits <= Wide{kPoolSize} * 8;
}

}  // namespace

#endif  // TANDEM_TESTS_FUZZ_POOL_H_
