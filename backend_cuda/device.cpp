#include "backend_cuda/device.h"

#include <cstdlib>
#include <cstring>

namespace tandem::cuda {

using core::Context;
using core::Format;
using core::Text;

namespace {

// TANDEM_CUDA_ARCH caps the kernels that are used, as TANDEM_CPU_ISA does on CPUs: sm80 leaves the
// portable family, sm90 (or nothing) all that the GPU serves. What is not known counts as sm80.
struct ArchCap {
  const char* value;  // null: not set
  bool is_known;
  uint64_t features;
};

ArchCap ReadArchCap() {
  const char* value = std::getenv("TANDEM_CUDA_ARCH");
  if (value == nullptr || *value == '\0' || std::strcmp(value, "sm90") == 0) {
    return {value, true, kFeatureSm80 | kFeatureSm90};
  }
  return {value, std::strcmp(value, "sm80") == 0, kFeatureSm80};
}

// 10 * major + minor; 0 where it cannot be read.
int ComputeCapability(int32_t index) {
  int major = 0;
  int minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return 10 * major + minor;
}

}  // namespace

tandem_status StatusOf(cudaError_t error, const char* action, const Context& context) {
  if (error == cudaSuccess) return TANDEM_STATUS_OK;
  cudaGetLastError();
  if (context.error != nullptr) {
    Format(context.error, "CUDA device %d: %s (%s) while %s", context.device_index,
           cudaGetErrorString(error), cudaGetErrorName(error), action);
  }
  return error == cudaErrorMemoryAllocation ? TANDEM_STATUS_OUT_OF_MEMORY
                                            : TANDEM_STATUS_DEVICE_ERROR;
}

int32_t DeviceCount(Text* reason) {
  const auto none = [&](auto... message) {
    cudaGetLastError();
    if (reason != nullptr) Format(reason, message...);
    return 0;
  };
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return none("no NVIDIA driver: libcuda.so.1 was not found or could not be loaded");
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    return none("the NVIDIA driver is too old: it serves CUDA %d.%d, this build needs CUDA %d.%d",
                driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                CUDART_VERSION % 1000 / 10);
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return none("the NVIDIA driver is there, but it shows no GPU");
  }
  if (error != cudaSuccess) {
    return none("the NVIDIA driver does not start: %s (%s)", cudaGetErrorString(error),
                cudaGetErrorName(error));
  }
  int newest = 0;
  for (int32_t index = 0; index < count; ++index) {
    newest = core::Max(newest, ComputeCapability(index));
  }
  if (newest < 80) {
    return none("the newest GPU has compute capability %d.%d; 8.0 or newer is needed", newest / 10,
                newest % 10);
  }
  return count;
}

tandem_status GetDeviceInfo(int32_t index, core::DeviceInfo* info, Text* error) {
  cudaDeviceProp properties;
  const cudaError_t result = cudaGetDeviceProperties(&properties, index);
  if (result != cudaSuccess) {
    Context context = {};
    context.device_index = index;
    context.error = error;
    return StatusOf(result, "reading its properties", context);
  }
  *info = {};
  const ArchCap cap = ReadArchCap();
  const uint64_t features =
      (properties.major >= 8 ? kFeatureSm80 : 0) | (properties.major == 9 ? kFeatureSm90 : 0);
  info->features = features & cap.features;
  Text limit = {};
  if (!cap.is_known) {
    Format(&limit, "; TANDEM_CUDA_ARCH is \"%.40s\", not sm80 or sm90, and is taken as sm80",
           cap.value);
  } else if (cap.value != nullptr && *cap.value != '\0') {
    Format(&limit, "; TANDEM_CUDA_ARCH caps it at %s", cap.value);
  }
  Format(&info->description, "%s, compute capability %d.%d, %d multiprocessors, %.0f GiB%.200s",
         properties.name, properties.major, properties.minor, properties.multiProcessorCount,
         static_cast<double>(properties.totalGlobalMem) / (1024.0 * 1024.0 * 1024.0), limit.data);
  return TANDEM_STATUS_OK;
}

}  // namespace tandem::cuda
