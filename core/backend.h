// The plugin ABI: a backend is a struct of functions, a kernel is a record. Both are plain data; a
// plugin is accepted only when its ABI version, struct sizes and library version all match.
#ifndef TANDEM_CORE_BACKEND_H_
#define TANDEM_CORE_BACKEND_H_

#include "core/mask_prepare.h"
#include "core/problem.h"
#include "core/text.h"
#include "tandem/tandem.h"

namespace tandem::core {

inline constexpr uint32_t kBackendAbiVersion = 2;
#define TANDEM_BACKEND_ENTRY "tandem_backend_v1"

// What one call of a backend function needs beside the problem.
struct Context {
  int32_t device_index;
  int32_t threads;                  // CPU: 0 = the OpenMP default
  const tandem_executor* executor;  // CPU: null = OpenMP
  void* stream;                     // CUDA: cudaStream_t
  Text* error;                      // filled on failure
};

struct KernelRecord {
  const char* name;            // "flash_cpu.avx512.f32"
  uint64_t required_features;  // the backend's own bits; all must be in the device's features
  const char* requirement;     // those features in words, for "this machine lacks ..."
  // True, with the reason as a sentence, when the kernel cannot serve the problem. Pure; no data is
  // read.
  bool (*decline)(const Problem& problem, Text* reason);
  // Scratch bytes beside the prepared mask. Pure.
  int64_t (*workspace_size)(const Problem& problem);
  // Runs on a problem whose mask is bound and prepared. workspace is aligned to kBufferAlignment.
  tandem_status (*run)(const Problem& problem, void* workspace, const Context& context);
};

// A strided copy between arrays of the same device, to or from contiguous memory.
struct ArrayCopy {
  const void* source;
  void* destination;
  int64_t element_size;
  int32_t rank;
  int32_t reserved;
  int64_t shape[TANDEM_MAX_RANK];
  int64_t source_strides[TANDEM_MAX_RANK];
  int64_t destination_strides[TANDEM_MAX_RANK];
};

struct DeviceInfo {
  uint64_t features;
  Text description;
};

struct Backend {
  uint32_t abi_version;   // kBackendAbiVersion
  uint32_t backend_size;  // sizeof(Backend)
  uint32_t problem_size;  // sizeof(Problem)
  tandem_device_type device_type;
  const char* version;  // TANDEM_VERSION_STRING
  const char* name;     // "efficient_cuda"

  // Devices that can be used now; 0 with a reason. Never fails.
  int32_t (*device_count)(Text* reason);
  tandem_status (*device_info)(int32_t index, DeviceInfo* info, Text* error);

  const KernelRecord* kernels;  // best first
  int32_t kernel_count;
  int32_t reserved;

  // Fills the buffer of LayOutPreparation(problem); the problem is bound to it already.
  tandem_status (*prepare_mask)(const Problem& problem, const PreparationLayout& layout,
                                void* buffer, const Context& context);
  tandem_status (*copy_array)(const ArrayCopy& copy, const Context& context);

  // Memory of the device, for the one-call functions. Null in the CPU backend.
  tandem_status (*allocate)(int64_t size, void** memory, const Context& context);
  void (*release)(void* memory, const Context& context);
  tandem_status (*copy_to_device)(void* device, const void* host, int64_t size,
                                  const Context& context);
  tandem_status (*copy_to_host)(void* host, const void* device, int64_t size,
                                const Context& context);
  tandem_status (*synchronize)(const Context& context);
};

using BackendEntry = const Backend* (*)();

}  // namespace tandem::core

#endif  // TANDEM_CORE_BACKEND_H_
