// Tensors and status of the C++ interface; include tandem/tandem.hpp, which includes this.
#ifndef TANDEM_TENSOR_HPP_
#define TANDEM_TENSOR_HPP_

#if __cplusplus < 202002L
#error "tandem/tandem.hpp needs C++20 (-std=c++20); tandem/tandem.h is the C interface"
#endif

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "tandem/tandem.h"

namespace tandem {

enum class Status : int32_t {
  kOk = TANDEM_STATUS_OK,
  kInvalidArgument = TANDEM_STATUS_INVALID_ARGUMENT,
  kUnsupported = TANDEM_STATUS_UNSUPPORTED,
  kDeviceUnavailable = TANDEM_STATUS_DEVICE_UNAVAILABLE,
  kOutOfMemory = TANDEM_STATUS_OUT_OF_MEMORY,
  kWorkspaceTooSmall = TANDEM_STATUS_WORKSPACE_TOO_SMALL,
  kDeviceError = TANDEM_STATUS_DEVICE_ERROR,
  kInternal = TANDEM_STATUS_INTERNAL
};

enum class DType : int32_t {
  kF32 = TANDEM_DTYPE_F32,
  kF16 = TANDEM_DTYPE_F16,
  kBF16 = TANDEM_DTYPE_BF16,
  kF64 = TANDEM_DTYPE_F64,
  kI32 = TANDEM_DTYPE_I32,
  kI64 = TANDEM_DTYPE_I64,
  kBool = TANDEM_DTYPE_BOOL,  // one byte; 0 is false
  kBit = TANDEM_DTYPE_BIT     // strides count bits
};

enum class Device : int32_t {
  kUnset = TANDEM_DEVICE_UNSET,  // in Options: where the tensors are
  kCpu = TANDEM_DEVICE_CPU,
  kCuda = TANDEM_DEVICE_CUDA,
  kAuto = TANDEM_DEVICE_AUTO  // in Options: CUDA where it is there and accepts, else the CPU
};

enum class Layout : int32_t {
  kBHSD = TANDEM_LAYOUT_BHSD,
  kBSHD = TANDEM_LAYOUT_BSHD,
  kTHD = TANDEM_LAYOUT_THD  // packed; the mask needs a Packed term
};

enum class Alignment : int32_t {
  kUnset = TANDEM_ALIGN_UNSET,
  kTopLeft = TANDEM_ALIGN_TOP_LEFT,
  kBottomRight = TANDEM_ALIGN_BOTTOM_RIGHT
};

enum class TileClass : int32_t {
  kEmpty = TANDEM_TILE_EMPTY,
  kFull = TANDEM_TILE_FULL,
  kPartial = TANDEM_TILE_PARTIAL
};

// What every function here throws: a status, and a sentence that names the argument, what it was
// and what it may be.
class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const noexcept { return status_; }

 private:
  Status status_;
};

namespace internal {

inline void Check(tandem_status status) {
  if (status != TANDEM_STATUS_OK) throw Error(static_cast<Status>(status), tandem_last_error());
}

inline void Require(bool condition, const char* message) {
  if (!condition) throw Error(Status::kInvalidArgument, message);
}

}  // namespace internal

// The DType of a C++ type. Specialise it for a half type of your own:
//   template <> inline constexpr tandem::DType tandem::kDTypeOf<my::bfloat16> = ...;
template <typename T>
inline constexpr DType kDTypeOf = [] {
  static_assert(!sizeof(T),
                "no tandem::DType for this type: pass (void*, DType, shape), or "
                "specialise tandem::kDTypeOf");
  return DType::kF32;
}();
template <>
inline constexpr DType kDTypeOf<float> = DType::kF32;
template <>
inline constexpr DType kDTypeOf<double> = DType::kF64;
template <>
inline constexpr DType kDTypeOf<int32_t> = DType::kI32;
template <>
inline constexpr DType kDTypeOf<int64_t> = DType::kI64;
template <>
inline constexpr DType kDTypeOf<bool> = DType::kBool;

// A view of an array of any strides (in elements; none given: row-major). Only outputs are written
// through it. Throws kInvalidArgument for a rank above 5, or strides of another length than shape.
class Tensor {
 public:
  using Extents = std::span<const int64_t>;

  Tensor(const void* data, DType dtype, Extents shape, Extents strides = {},
         Device device = Device::kCpu, int32_t device_index = 0) {
    internal::Require(shape.size() <= TANDEM_MAX_RANK, "tandem::Tensor: the rank may be at most 5");
    internal::Require(strides.empty() || strides.size() == shape.size(),
                      "tandem::Tensor: strides need one entry per dimension of shape");
    tensor_.dtype = static_cast<tandem_dtype>(dtype);
    tensor_.device_type = static_cast<tandem_device_type>(device);
    tensor_.device_index = device_index;
    tensor_.rank = static_cast<int32_t>(shape.size());
    tensor_.data = const_cast<void*>(data);
    uint64_t stride = 1;  // unsigned: a shape too large is for the library to refuse
    for (size_t d = shape.size(); d-- > 0; stride *= static_cast<uint64_t>(shape[d])) {
      tensor_.shape[d] = shape[d];
      tensor_.strides[d] = strides.empty() ? static_cast<int64_t>(stride) : strides[d];
    }
  }

  Tensor(const void* data, DType dtype, std::initializer_list<int64_t> shape,
         std::initializer_list<int64_t> strides = {}, Device device = Device::kCpu,
         int32_t device_index = 0)
      : Tensor(data, dtype, Extents(shape.begin(), shape.size()),
               Extents(strides.begin(), strides.size()), device, device_index) {}

  // Host data of a C++ type that has a DType.
  template <typename T>
  requires(!std::is_void_v<T>) Tensor(const T* data, std::initializer_list<int64_t> shape,
                                      std::initializer_list<int64_t> strides = {})
      : Tensor(data, kDTypeOf<T>, shape, strides) {}

  // Contiguous host data whose size is checked against the shape (a std::vector, array or span).
  template <typename Range>
  requires requires(Range& range) { std::span(range).size_bytes(); }
  Tensor(Range&& range, std::initializer_list<int64_t> shape)
      : Tensor(std::span(range).data(), shape) {
    uint64_t count = 1;
    for (int64_t extent : shape) count *= static_cast<uint64_t>(extent);
    internal::Require(count == std::span(range).size(),
                      "tandem::Tensor: the array does not have as many elements as its shape");
  }

  const tandem_tensor& c() const noexcept { return tensor_; }

 private:
  tandem_tensor tensor_ = TANDEM_TENSOR_INIT;
};

// Lengths, offsets, segment numbers: a view (Tensor), or values of their own, rank 1 on the host.
class Indices {
 public:
  Indices(const Tensor& tensor) : tensor_(tensor) {}  // NOLINT: conversions are the point
  Indices(std::initializer_list<int32_t> values) : Indices(std::vector<int32_t>(values)) {}
  template <typename T>
  requires(std::is_same_v<T, int32_t> || std::is_same_v<T, int64_t>)
      Indices(std::vector<T> values)  // NOLINT
      : Indices(std::make_shared<const std::vector<T>>(std::move(values))) {}

  const Tensor& tensor() const noexcept { return tensor_; }

 private:
  template <typename T>
  explicit Indices(std::shared_ptr<const std::vector<T>> values)
      : tensor_(values->data(), {static_cast<int64_t>(values->size())}), owner_(values) {}

  Tensor tensor_;
  std::shared_ptr<const void> owner_;
};

}  // namespace tandem

#endif  // TANDEM_TENSOR_HPP_
