// Arrays in the memory of a GPU, for tests.
#ifndef TANDEM_TESTS_CUDA_DEVICE_ARRAY_H_
#define TANDEM_TESTS_CUDA_DEVICE_ARRAY_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <tandem/tandem.hpp>
#include <vector>

#include "tests/support/random.h"

namespace tandem::test {

inline void CheckCuda(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

// Device memory with a canary behind it.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    CheckCuda(cudaMalloc(&data_, count * sizeof(T) + kCanary));
    Poison();
  }
  explicit DeviceArray(const std::vector<T>& values)
      : DeviceArray(static_cast<int64_t>(values.size())) {
    Store(values);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  int64_t count() const { return count_; }
  void Store(const std::vector<T>& values) const {
    CheckCuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  void Poison() const {
    CheckCuda(cudaMemset(data_, 0xc5, count_ * sizeof(T) + kCanary));
    CheckCuda(cudaDeviceSynchronize());  // streams that do not block do not wait for it
  }
  std::vector<T> Fetch() const {
    std::vector<T> values(static_cast<size_t>(count_));
    CheckCuda(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
    uint8_t canary[kCanary];
    CheckCuda(cudaMemcpy(canary, data() + count_, kCanary, cudaMemcpyDeviceToHost));
    for (uint8_t byte : canary) EXPECT_EQ(byte, 0xc5) << "written behind the array";
    return values;
  }
  tandem::Tensor View(DType dtype, std::initializer_list<int64_t> shape) const {
    return tandem::Tensor(data_, dtype, shape, {}, Device::kCuda);
  }

 private:
  static constexpr size_t kCanary = 256;
  int64_t count_;
  void* data_ = nullptr;
};

inline std::vector<float> Normals(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(random.Normal());
  return values;
}

// Numbers of a type: normals as f32 or bf16, finite numbers as f16.
inline std::vector<uint8_t> Numbers(DType dtype, int64_t count, uint64_t seed) {
  const std::vector<float> values = Normals(count, seed);
  const size_t size = dtype == DType::kF32 ? 4 : 2;
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t n = 0; n < values.size(); ++n) {
    uint32_t bits;
    std::memcpy(&bits, &values[n], 4);
    if (dtype == DType::kF16) bits &= 0xbfffffffu;
    const uint32_t kept = dtype == DType::kF32 ? bits : bits >> 16;
    std::memcpy(&bytes[size * n], &kept, size);
  }
  return bytes;
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace tandem::test

#endif  // TANDEM_TESTS_CUDA_DEVICE_ARRAY_H_
