// The GPUs of this process, and calls of CUDA's runtime on one of them.
//
// CUDA's errors are read from the return code of the very call that made them. The runtime is
// linked statically, so its record of the last error is this plugin's own; it is cleared after a
// failure of ours that leaves the context usable, and errors of the context itself stay for their
// owner to see.
#ifndef TANDEM_BACKEND_CUDA_DEVICE_H_
#define TANDEM_BACKEND_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"

namespace tandem::cuda {

// What a kernel may ask of a GPU (core::DeviceInfo::features).
constexpr uint64_t kFeatureSm80 = 1;
constexpr uint64_t kFeatureSm90 = 2;

// Makes a device current for one call and the caller's device current again after it.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t index) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != index) {
      error_ = cudaSetDevice(index);
      is_changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (is_changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool is_changed_ = false;
};

// The status of a CUDA call; `action` completes "while ...".
tandem_status StatusOf(cudaError_t error, const char* action, const core::Context& context);

// Calls `call` on the context's device.
template <typename Call>
tandem_status OnDevice(const core::Context& context, const char* action, Call call) {
  const DeviceScope scope(context.device_index);
  if (scope.error() != cudaSuccess) return StatusOf(scope.error(), "selecting it", context);
  return StatusOf(call(static_cast<cudaStream_t>(context.stream)), action, context);
}

// How many GPUs there are; 0 with a reason where none can be used.
int32_t DeviceCount(core::Text* reason);

tandem_status GetDeviceInfo(int32_t index, core::DeviceInfo* info, core::Text* error);

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_DEVICE_H_
