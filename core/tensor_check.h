// Checks of one tensor descriptor, shared by the validator and the other entry points that take
// tensors.
#ifndef TANDEM_CORE_TENSOR_CHECK_H_
#define TANDEM_CORE_TENSOR_CHECK_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/element.h"
#include "core/text.h"
#include "tandem/tandem.h"

namespace tandem::core {

// Collects the first failure. Every check returns true when all is well.
class Checker {
 public:
  explicit Checker(Text* error) : error_(error) {}

  bool Fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  // struct_size, dtype, device, rank, shape, strides, alignment; data may be null only without
  // elements (or where needs_data is false).
  bool Tensor(const char* name, const tandem_tensor* tensor,
              std::initializer_list<tandem_dtype> dtypes, std::initializer_list<int> ranks,
              bool needs_data = true);

  // The device of this tensor is that of `reference`.
  bool SameDevice(const char* name, const tandem_tensor& tensor, const char* reference_name,
                  const tandem_tensor& reference);

  bool Dimension(const char* name, const tandem_tensor& tensor, int index, int64_t wanted,
                 const char* meaning);
  // The extent is `wanted` or 1.
  bool Broadcastable(const char* name, const tandem_tensor& tensor, int index, int64_t wanted,
                     const char* meaning);

  // No two indices of an output share an address.
  bool Writable(const char* name, const tandem_tensor& tensor);
  // An output and another tensor share no memory: their spans are disjoint, or they interleave like
  // the parts of one array.
  bool Disjoint(const char* name, const tandem_tensor& output, const char* other_name,
                const tandem_tensor& other);

 private:
  Text* error_;
};

std::string ShapeString(const tandem_tensor& tensor);
int64_t ElementCount(const tandem_tensor& tensor);

struct ByteSpan {
  const char* begin;
  const char* end;
};
// The bytes between a tensor's lowest and highest element.
ByteSpan SpanOf(const tandem_tensor& tensor);

// Stride of a dimension, 0 where it has one element.
inline int64_t BroadcastStride(const tandem_tensor& tensor, int index) {
  return tensor.shape[index] == 1 ? 0 : tensor.strides[index];
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_TENSOR_CHECK_H_
