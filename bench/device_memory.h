// Memory of either device, and time spent there. Built without CUDA, only the CPU is there.
#ifndef TANDEM_BENCH_DEVICE_MEMORY_H_
#define TANDEM_BENCH_DEVICE_MEMORY_H_

#include <chrono>
#include <cstddef>
#include <cstring>
#include <new>
#include <tandem/tandem.hpp>
#include <utility>

#if defined(TANDEM_BENCHMARK_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace tandem::bench {

// Aligned to 256. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer(Device device, size_t size) : device_(device), size_(size) {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device_ == Device::kCuda) {
      if (cudaMalloc(&data_, size + 1) != cudaSuccess) {
        cudaGetLastError();
        throw std::bad_alloc();
      }
      return;
    }
#endif
    data_ = ::operator new(size + 1, kAlignment);
  }
  Buffer(Buffer&& other) noexcept
      : device_(other.device_), size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device_ == Device::kCuda) {
      cudaFree(data_);
      return;
    }
#endif
    ::operator delete(data_, kAlignment);
  }

  void* data() const { return data_; }
  size_t size() const { return size_; }

  void CopyFrom(const void* host) { Copy(data_, host, true); }
  void CopyTo(void* host) const { Copy(host, data_, false); }

 private:
  static constexpr std::align_val_t kAlignment{256};

  void Copy(void* to, const void* from, [[maybe_unused]] bool to_device) const {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device_ == Device::kCuda) {
      cudaMemcpy(to, from, size_, to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);
      return;
    }
#endif
    std::memcpy(to, from, size_);
  }

  Device device_;
  size_t size_;
  void* data_ = nullptr;
};

// Seconds that `runs` calls of run() take on the device, between two events on CUDA.
template <typename Run>
double SecondsOn([[maybe_unused]] Device device, int runs, const Run& run) {
#if defined(TANDEM_BENCHMARK_CUDA)
  if (device == Device::kCuda) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    cudaEventRecord(begin);
    for (int n = 0; n < runs; ++n) run();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return milliseconds * 1e-3;
  }
#endif
  const auto start = std::chrono::steady_clock::now();
  for (int n = 0; n < runs; ++n) run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace tandem::bench

#endif  // TANDEM_BENCH_DEVICE_MEMORY_H_
