// A tensor that owns its memory and can have any strides, any placement and gaps between elements.
#ifndef TANDEM_TESTS_SUPPORT_TENSOR_H_
#define TANDEM_TESTS_SUPPORT_TENSOR_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "tandem/tandem.h"
#include "tests/support/memory.h"
#include "tests/support/random.h"

namespace tandem::test {

using Shape = std::vector<int64_t>;

// The index of an element; on the heap it would cost more than the element that it names.
class Index {
 public:
  Index(std::initializer_list<int64_t> values) : rank_(values.size()) {
    std::copy(values.begin(), values.end(), values_.begin());
  }
  operator std::span<const int64_t>() const { return {values_.data(), rank_}; }

 private:
  std::array<int64_t, TANDEM_MAX_RANK> values_ = {};
  size_t rank_;
};

// How the elements lie in memory. The defaults are a compact row-major array.
struct Strides {
  std::vector<int> order;        // dimensions from outermost to innermost; empty: as given
  std::vector<int64_t> padding;  // extra elements after each dimension's extent; empty: none
  uint32_t negative = 0;         // bit d: dimension d runs backwards
  uint32_t broadcast = 0;        // bit d: dimension d has stride 0
};

class Tensor {
 public:
  Tensor(tandem_dtype dtype, Shape shape, const Strides& strides = {},
         Placement placement = Placement::kAligned);

  const tandem_tensor* get() const { return &descriptor_; }
  tandem_tensor& descriptor() { return descriptor_; }
  tandem_dtype dtype() const { return descriptor_.dtype; }
  const Shape& shape() const { return shape_; }
  int64_t Count() const;

  double Get(std::span<const int64_t> index) const;
  void Set(std::span<const int64_t> index, double value);
  double Get(std::initializer_list<int64_t> index) const { return Get(AsSpan(index)); }
  void Set(std::initializer_list<int64_t> index, double value) { Set(AsSpan(index), value); }

  // Calls visit(index) for every index in row-major order.
  void ForEach(const std::function<void(std::span<const int64_t>)>& visit) const;
  void Fill(double value);
  void FillNormal(Random& random, double scale = 1.0);

  // Every byte of the memory, elements and gaps.
  void FillBytes(uint8_t byte);
  std::vector<uint8_t> Bytes() const;
  // The elements' bytes alone, in row-major order of the index.
  std::vector<uint8_t> ElementBytes() const;
  // Gaps between elements still hold the byte, and nothing around the memory was written.
  bool GapsHold(uint8_t byte) const;

 private:
  static std::span<const int64_t> AsSpan(std::initializer_list<int64_t> list) {
    return {list.begin(), list.size()};
  }
  int64_t Offset(std::span<const int64_t> index) const;

  Shape shape_;
  tandem_tensor descriptor_ = TANDEM_TENSOR_INIT;
  std::shared_ptr<Memory> memory_;
};

// Element size in bytes; 0 for BIT.
int64_t SizeOf(tandem_dtype dtype);

// A rank-1 i32 or i64 tensor of the values.
Tensor IndexTensor(const std::vector<int64_t>& values, tandem_dtype dtype = TANDEM_DTYPE_I32,
                   const Strides& strides = {});

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_TENSOR_H_
