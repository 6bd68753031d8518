#include "tests/support/tensor.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <numeric>

#include "core/element.h"

namespace tandem::test {

int64_t SizeOf(tandem_dtype dtype) { return core::ElementSize(static_cast<core::DType>(dtype)); }

Tensor::Tensor(tandem_dtype dtype, Shape shape, const Strides& strides, Placement placement)
    : shape_(std::move(shape)) {
  const int rank = static_cast<int>(shape_.size());
  std::vector<int> order = strides.order;
  if (order.empty()) {
    order.resize(rank);
    std::iota(order.begin(), order.end(), 0);
  }
  descriptor_.dtype = dtype;
  descriptor_.device_type = TANDEM_DEVICE_CPU;
  descriptor_.rank = rank;
  int64_t extent = 1;  // of the elements spanned by the dimensions laid out so far
  int64_t first = 0;   // element of index 0 in the memory
  int64_t last = 0;
  for (int n = rank - 1; n >= 0; --n) {
    const int d = order[n];
    descriptor_.shape[d] = shape_[d];
    if ((strides.broadcast >> d) & 1u) continue;
    const int64_t padding = strides.padding.empty() ? 0 : strides.padding[d];
    const int64_t reach = extent * std::max<int64_t>(shape_[d] - 1, 0);
    const bool negative = (strides.negative >> d) & 1u;
    descriptor_.strides[d] = negative ? -extent : extent;
    if (negative) first += reach;
    last += reach;
    extent *= shape_[d] + padding;
  }
  const bool empty = Count() == 0;
  const int64_t count = empty ? 0 : last + 1;
  const int64_t element_size = dtype == TANDEM_DTYPE_BIT ? 1 : SizeOf(dtype);
  const int64_t size = dtype == TANDEM_DTYPE_BIT ? (count + 7) / 8 : count * element_size;
  assert(dtype != TANDEM_DTYPE_BIT || strides.negative == 0);
  memory_ = std::make_shared<Memory>(size, element_size, placement);
  std::memset(memory_->data(), 0, size);
  descriptor_.data = empty ? nullptr : memory_->data() + first * element_size;
}

int64_t Tensor::Count() const {
  int64_t count = 1;
  for (int64_t extent : shape_) count *= extent;
  return count;
}

int64_t Tensor::Offset(std::span<const int64_t> index) const {
  assert(index.size() == shape_.size());
  int64_t offset = 0;
  for (size_t d = 0; d < index.size(); ++d) {
    assert(index[d] >= 0 && index[d] < shape_[d]);
    offset += index[d] * descriptor_.strides[d];
  }
  return offset;
}

double Tensor::Get(std::span<const int64_t> index) const {
  const int64_t offset = Offset(index);
  switch (descriptor_.dtype) {
    case TANDEM_DTYPE_F32:
    case TANDEM_DTYPE_F16:
    case TANDEM_DTYPE_BF16:
      return core::LoadFloat(descriptor_.data, static_cast<core::DType>(descriptor_.dtype), offset);
    case TANDEM_DTYPE_I32:
      return static_cast<const int32_t*>(descriptor_.data)[offset];
    case TANDEM_DTYPE_I64:
      return static_cast<double>(static_cast<const int64_t*>(descriptor_.data)[offset]);
    case TANDEM_DTYPE_BOOL:
      return static_cast<const uint8_t*>(descriptor_.data)[offset] != 0;
    default:
      return (static_cast<const uint8_t*>(descriptor_.data)[offset >> 3] >> (offset & 7)) & 1;
  }
}

void Tensor::Set(std::span<const int64_t> index, double value) {
  const int64_t offset = Offset(index);
  switch (descriptor_.dtype) {
    case TANDEM_DTYPE_F32:
    case TANDEM_DTYPE_F16:
    case TANDEM_DTYPE_BF16:
      core::StoreFloat(descriptor_.data, static_cast<core::DType>(descriptor_.dtype), offset,
                       static_cast<float>(value));
      return;
    case TANDEM_DTYPE_I32:
      static_cast<int32_t*>(descriptor_.data)[offset] = static_cast<int32_t>(value);
      return;
    case TANDEM_DTYPE_I64:
      static_cast<int64_t*>(descriptor_.data)[offset] = static_cast<int64_t>(value);
      return;
    case TANDEM_DTYPE_BOOL:
      static_cast<uint8_t*>(descriptor_.data)[offset] = value != 0;
      return;
    default: {
      uint8_t& byte = static_cast<uint8_t*>(descriptor_.data)[offset >> 3];
      const uint8_t bit = static_cast<uint8_t>(1u << (offset & 7));
      byte = static_cast<uint8_t>(value != 0 ? byte | bit : byte & ~bit);
    }
  }
}

void Tensor::ForEach(const std::function<void(std::span<const int64_t>)>& visit) const {
  if (Count() == 0) return;
  std::vector<int64_t> index(shape_.size(), 0);
  while (true) {
    visit(index);
    int d = static_cast<int>(shape_.size()) - 1;
    while (d >= 0 && ++index[d] == shape_[d]) index[d--] = 0;
    if (d < 0) return;
  }
}

void Tensor::Fill(double value) {
  ForEach([&](std::span<const int64_t> index) { Set(index, value); });
}

void Tensor::FillNormal(Random& random, double scale) {
  ForEach([&](std::span<const int64_t> index) { Set(index, scale * random.Normal()); });
}

void Tensor::FillBytes(uint8_t byte) { std::memset(memory_->data(), byte, memory_->size()); }

std::vector<uint8_t> Tensor::Bytes() const {
  return {memory_->data(), memory_->data() + memory_->size()};
}

std::vector<uint8_t> Tensor::ElementBytes() const {
  const int64_t size = SizeOf(descriptor_.dtype);
  std::vector<uint8_t> bytes;
  bytes.reserve(Count() * size);
  ForEach([&](std::span<const int64_t> index) {
    const uint8_t* element = static_cast<const uint8_t*>(descriptor_.data) + Offset(index) * size;
    bytes.insert(bytes.end(), element, element + size);
  });
  return bytes;
}

bool Tensor::GapsHold(uint8_t byte) const {
  const int64_t size = SizeOf(descriptor_.dtype);
  std::vector<bool> used(memory_->size(), false);
  ForEach([&](std::span<const int64_t> index) {
    const int64_t at =
        static_cast<const uint8_t*>(descriptor_.data) + Offset(index) * size - memory_->data();
    for (int64_t n = 0; n < size; ++n) used[at + n] = true;
  });
  for (int64_t at = 0; at < memory_->size(); ++at) {
    if (!used[at] && memory_->data()[at] != byte) return false;
  }
  return memory_->BordersAreIntact();
}

Tensor IndexTensor(const std::vector<int64_t>& values, tandem_dtype dtype, const Strides& strides) {
  Tensor tensor(dtype, {static_cast<int64_t>(values.size())}, strides);
  for (size_t n = 0; n < values.size(); ++n) {
    tensor.Set({static_cast<int64_t>(n)}, static_cast<double>(values[n]));
  }
  return tensor;
}

}  // namespace tandem::test
