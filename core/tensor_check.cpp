#include "core/tensor_check.h"

#include <algorithm>
#include <cstdarg>

namespace tandem::core {
namespace {

constexpr int64_t kLargestDimension = int64_t{1} << 40;

std::string DTypeList(std::initializer_list<tandem_dtype> dtypes) {
  std::string list;
  for (tandem_dtype dtype : dtypes) {
    if (!list.empty()) list += " or ";
    list += DTypeName(static_cast<DType>(dtype));
  }
  return list;
}

std::string RankList(std::initializer_list<int> ranks) {
  std::string list;
  for (int rank : ranks) {
    if (!list.empty()) list += " or ";
    list += std::to_string(rank);
  }
  return list;
}

// Sum of (shape - 1) * |stride| over all dimensions, split by the stride's sign; false on overflow.
bool Reach(const tandem_tensor& tensor, int64_t* below, int64_t* above) {
  *below = 0;
  *above = 0;
  for (int d = 0; d < tensor.rank; ++d) {
    if (tensor.shape[d] <= 1) continue;
    int64_t reach = 0;
    if (__builtin_mul_overflow(tensor.shape[d] - 1, tensor.strides[d], &reach)) return false;
    int64_t* side = reach < 0 ? below : above;
    if (__builtin_add_overflow(*side, reach, side)) return false;
  }
  int64_t bytes = 0;
  const int64_t size = std::max<int64_t>(ElementSize(static_cast<DType>(tensor.dtype)), 1);
  return !__builtin_mul_overflow(*below, size, &bytes) &&
         !__builtin_mul_overflow(*above, size, &bytes) &&
         !__builtin_add_overflow(bytes, size, &bytes);
}

int64_t Magnitude(int64_t x) { return x < 0 ? -x : x; }

// A dimension along which two elements may share an address; -1: none.
int SharedDimension(const tandem_tensor& tensor) {
  if (ElementCount(tensor) == 0) return -1;
  int order[TANDEM_MAX_RANK];  // dimensions of more than one element, by rising stride
  int count = 0;
  for (int d = 0; d < tensor.rank; ++d) {
    if (tensor.shape[d] <= 1) continue;
    int place = count++;
    for (; place > 0 && Magnitude(tensor.strides[order[place - 1]]) > Magnitude(tensor.strides[d]);
         --place) {
      order[place] = order[place - 1];
    }
    order[place] = d;
  }
  int64_t reach = 0;
  for (int k = 0; k < count; ++k) {
    const int d = order[k];
    if (Magnitude(tensor.strides[d]) <= reach) return d;
    reach += (tensor.shape[d] - 1) * Magnitude(tensor.strides[d]);
  }
  return -1;
}

// Whether two tensors whose spans overlap interleave without sharing an element, as the parts of
// one [rows, 3, heads, dim] do: they advance alike along some dimensions, and what is left of each
// lies in an interval of its own, all of it within one step.
bool Interleave(const tandem_tensor& a, const tandem_tensor& b) {
  if (a.rank != b.rank || a.rank >= TANDEM_MAX_RANK || a.dtype != b.dtype) return false;
  const int64_t size = ElementSize(static_cast<DType>(a.dtype));
  if (size == 0) return false;
  for (unsigned outer = 1; outer < 1u << a.rank; ++outer) {
    tandem_tensor rest_a = a, rest_b = b, steps = a;
    bool alike = true;
    for (int d = 0; d < a.rank; ++d) {
      if ((outer >> d & 1u) == 0) {
        steps.shape[d] = 1;
        continue;
      }
      alike = alike && a.shape[d] == b.shape[d] && a.strides[d] == b.strides[d];
      rest_a.shape[d] = rest_b.shape[d] = 1;
    }
    if (!alike) continue;
    const ByteSpan x = SpanOf(rest_a), y = SpanOf(rest_b);
    const bool apart = x.end <= y.begin || y.end <= x.begin;
    const char* begin = x.begin < y.begin ? x.begin : y.begin;
    const char* end = x.end < y.end ? y.end : x.end;
    if (!apart || (end - begin) % size != 0) continue;
    steps.rank = a.rank + 1;
    steps.shape[a.rank] = (end - begin) / size;
    steps.strides[a.rank] = 1;
    if (SharedDimension(steps) < 0) return true;
  }
  return false;
}

}  // namespace

bool Checker::Fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_->data, sizeof(error_->data), format, arguments);
  va_end(arguments);
  return false;
}

bool Checker::Tensor(const char* name, const tandem_tensor* tensor,
                     std::initializer_list<tandem_dtype> dtypes, std::initializer_list<int> ranks,
                     bool needs_data) {
  if (tensor == nullptr) return Fail("%s is null, must be a tensor", name);
  const tandem_tensor& t = *tensor;
  if (t.struct_size != sizeof(tandem_tensor)) {
    return Fail("%s: struct_size is %u, must be %zu (use TANDEM_TENSOR_INIT)", name, t.struct_size,
                sizeof(tandem_tensor));
  }
  if (std::find(dtypes.begin(), dtypes.end(), t.dtype) == dtypes.end()) {
    return Fail("%s: dtype is %s (%d), must be %s", name, DTypeName(static_cast<DType>(t.dtype)),
                t.dtype, DTypeList(dtypes).c_str());
  }
  if (t.device_type != TANDEM_DEVICE_CPU && t.device_type != TANDEM_DEVICE_CUDA) {
    return Fail("%s: device_type is %d, must be TANDEM_DEVICE_CPU (1) or TANDEM_DEVICE_CUDA (2)",
                name, t.device_type);
  }
  if (t.device_index < 0 || (t.device_type == TANDEM_DEVICE_CPU && t.device_index != 0)) {
    return Fail("%s: device_index is %d, must be %s", name, t.device_index,
                t.device_type == TANDEM_DEVICE_CPU ? "0 for the CPU" : ">= 0");
  }
  if (std::find(ranks.begin(), ranks.end(), t.rank) == ranks.end()) {
    return Fail("%s: rank is %d, must be %s", name, t.rank, RankList(ranks).c_str());
  }
  bool has_elements = true;
  for (int d = 0; d < t.rank; ++d) {
    if (t.shape[d] < 0 || t.shape[d] > kLargestDimension) {
      return Fail("%s: shape[%d] is %lld, must be in [0, 2^40]", name, d,
                  static_cast<long long>(t.shape[d]));
    }
    has_elements = has_elements && t.shape[d] > 0;
  }
  if (!has_elements) return true;
  int64_t below = 0;
  int64_t above = 0;
  if (!Reach(t, &below, &above)) {
    return Fail("%s: shape %s with its strides reaches past 2^63 bytes", name,
                ShapeString(t).c_str());
  }
  if (!needs_data && t.data == nullptr) return true;
  if (t.data == nullptr) return Fail("%s: data is null, must point to its elements", name);
  const int64_t alignment = std::max<int64_t>(ElementSize(static_cast<DType>(t.dtype)), 1);
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data));
  if (below * alignment < -address || above * alignment > INT64_MAX - address) {
    return Fail("%s: shape %s with its strides reaches out of the address space from data %p", name,
                ShapeString(t).c_str(), t.data);
  }
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(alignment) != 0) {
    return Fail("%s: data is %p, must be aligned to its element's %lld bytes", name, t.data,
                static_cast<long long>(alignment));
  }
  return true;
}

bool Checker::SameDevice(const char* name, const tandem_tensor& tensor, const char* reference_name,
                         const tandem_tensor& reference) {
  if (tensor.device_type == reference.device_type && tensor.device_index == reference.device_index)
    return true;
  return Fail("%s: device is (%d, %d), must be that of %s, (%d, %d)", name, tensor.device_type,
              tensor.device_index, reference_name, reference.device_type, reference.device_index);
}

bool Checker::Dimension(const char* name, const tandem_tensor& tensor, int index, int64_t wanted,
                        const char* meaning) {
  if (tensor.shape[index] == wanted) return true;
  return Fail("%s: shape is %s; dimension %d is %lld, must be %lld (%s)", name,
              ShapeString(tensor).c_str(), index, static_cast<long long>(tensor.shape[index]),
              static_cast<long long>(wanted), meaning);
}

bool Checker::Broadcastable(const char* name, const tandem_tensor& tensor, int index,
                            int64_t wanted, const char* meaning) {
  if (tensor.shape[index] == wanted || tensor.shape[index] == 1) return true;
  return Fail("%s: shape is %s; dimension %d is %lld, must be %lld (%s) or 1", name,
              ShapeString(tensor).c_str(), index, static_cast<long long>(tensor.shape[index]),
              static_cast<long long>(wanted), meaning);
}

bool Checker::Writable(const char* name, const tandem_tensor& tensor) {
  const int d = SharedDimension(tensor);
  if (d < 0) return true;
  return Fail("%s: strides[%d] is %lld, must not let two elements of shape %s share an address",
              name, d, static_cast<long long>(tensor.strides[d]), ShapeString(tensor).c_str());
}

bool Checker::Disjoint(const char* name, const tandem_tensor& output, const char* other_name,
                       const tandem_tensor& other) {
  if (ElementCount(output) == 0 || ElementCount(other) == 0) return true;
  if (output.data == nullptr || other.data == nullptr) return true;
  const ByteSpan a = SpanOf(output);
  const ByteSpan b = SpanOf(other);
  if (a.end <= b.begin || b.end <= a.begin || Interleave(output, other)) return true;
  return Fail("%s: its memory [%p, %p) overlaps that of %s, [%p, %p); an output needs its own",
              name, static_cast<const void*>(a.begin), static_cast<const void*>(a.end), other_name,
              static_cast<const void*>(b.begin), static_cast<const void*>(b.end));
}

std::string ShapeString(const tandem_tensor& tensor) {
  std::string text = "[";
  for (int d = 0; d < tensor.rank; ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(tensor.shape[d]);
  }
  return text + "]";
}

int64_t ElementCount(const tandem_tensor& tensor) {
  for (int d = 0; d < tensor.rank; ++d) {
    if (tensor.shape[d] == 0) return 0;
  }
  int64_t count = 1;
  for (int d = 0; d < tensor.rank; ++d) {
    if (__builtin_mul_overflow(count, tensor.shape[d], &count)) return INT64_MAX;
  }
  return count;
}

ByteSpan SpanOf(const tandem_tensor& tensor) {
  int64_t below = 0;
  int64_t above = 0;
  Reach(tensor, &below, &above);
  const char* base = static_cast<const char*>(tensor.data);
  if (tensor.dtype == TANDEM_DTYPE_BIT) return {base + (below >> 3), base + (above >> 3) + 1};
  const int64_t size = ElementSize(static_cast<DType>(tensor.dtype));
  return {base + below * size, base + (above + 1) * size};
}

}  // namespace tandem::core
