// A made-up CUDA plugin, built once per kind, each under the plugin's own file name in a directory
// of its own. The good kind is a device whose memory is host memory behind forbidden pages and
// whose one kernel is the CPU's reference: with it, staging is tested over every case where no GPU
// is.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "backend_cpu/cpu_backend.h"
#include "core/backend.h"
#include "tests/support/memory.h"

namespace tandem::test {
namespace {

enum class Kind {
  kGood,
  kNullRecord,
  kOtherAbi,
  kOtherSize,
  kOtherVersion,
  kNoDriver,
  kBrokenDevice,
  kOutOfMemory,
  kRunFails,
  kCopyFails,
};
constexpr Kind kKind = Kind::TANDEM_FAKE_KIND;

// Blocks handed out and not released.
std::map<void*, Memory>& Blocks() {
  static auto* blocks = new std::map<void*, Memory>;
  return *blocks;
}
std::mutex mutex;

int32_t DeviceCount(core::Text* reason) {
  if (kKind != Kind::kNoDriver) return 1;
  core::Format(reason, "there is no NVIDIA driver (made up)");
  return 0;
}

tandem_status DeviceInfo(int32_t, core::DeviceInfo* info, core::Text* error) {
  if (kKind == Kind::kBrokenDevice) {
    core::Format(error, "the device is broken (made up)");
    return TANDEM_STATUS_DEVICE_ERROR;
  }
  info->features = 1;
  core::Format(&info->description, "a made-up device");
  return TANDEM_STATUS_OK;
}

// The CPU's own answer to a problem that says it is on CUDA.
core::Problem OnCpu(const core::Problem& problem) {
  core::Problem host = problem;
  host.device_type = TANDEM_DEVICE_CPU;
  return host;
}

const core::KernelRecord& Reference() {
  const core::Backend& cpu = *cpu::CpuBackend();
  return cpu.kernels[cpu.kernel_count - 1];
}

bool Decline(const core::Problem& problem, core::Text* reason) {
  return Reference().decline(OnCpu(problem), reason);
}
int64_t WorkspaceSize(const core::Problem& problem) {
  return Reference().workspace_size(OnCpu(problem));
}
tandem_status Run(const core::Problem& problem, void* workspace, const core::Context& context) {
  if (kKind == Kind::kRunFails) {
    core::Format(context.error, "the launch failed (made up)");
    return TANDEM_STATUS_DEVICE_ERROR;
  }
  return Reference().run(OnCpu(problem), workspace, context);
}

tandem_status PrepareMask(const core::Problem& problem, const core::PreparationLayout& layout,
                          void* buffer, const core::Context& context) {
  return cpu::CpuBackend()->prepare_mask(OnCpu(problem), layout, buffer, context);
}

tandem_status CopyArray(const core::ArrayCopy& copy, const core::Context& context) {
  return cpu::CpuBackend()->copy_array(copy, context);
}

tandem_status Allocate(int64_t size, void** memory, const core::Context& context) {
  if (kKind == Kind::kOutOfMemory) {
    core::Format(context.error, "device memory is exhausted (made up)");
    return TANDEM_STATUS_OUT_OF_MEMORY;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  // Whole units of the alignment that real device memory has.
  const int64_t rounded = (size + core::kBufferAlignment - 1) / core::kBufferAlignment;
  Memory block(rounded * core::kBufferAlignment, 1, Placement::kGuardAfter);
  std::memset(block.data(), 0xff, block.size());
  *memory = block.data();
  Blocks().emplace(*memory, std::move(block));
  return TANDEM_STATUS_OK;
}

void Release(void* memory, const core::Context&) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (memory != nullptr && Blocks().erase(memory) != 1) std::abort();  // not ours, or twice
}

tandem_status Copy(void* destination, const void* source, int64_t size,
                   const core::Context& context) {
  if (kKind == Kind::kCopyFails) {
    core::Format(context.error, "the copy failed (made up)");
    return TANDEM_STATUS_DEVICE_ERROR;
  }
  std::memcpy(destination, source, size);
  return TANDEM_STATUS_OK;
}

tandem_status Synchronize(const core::Context&) { return TANDEM_STATUS_OK; }

const core::KernelRecord kKernels[] = {
    {"fake_cuda.reference", 1, "a made-up feature", Decline, WorkspaceSize, Run},
    {"fake_cuda.unfit", 2, "a feature that the made-up device lacks", Decline, WorkspaceSize, Run},
};

core::Backend MakeBackend() {
  core::Backend backend = {};
  backend.abi_version = core::kBackendAbiVersion + (kKind == Kind::kOtherAbi);
  backend.backend_size = sizeof(core::Backend) + (kKind == Kind::kOtherSize ? 8 : 0);
  backend.problem_size = sizeof(core::Problem);
  backend.device_type = TANDEM_DEVICE_CUDA;
  backend.version = kKind == Kind::kOtherVersion ? "0.0.1-made-up" : TANDEM_VERSION_STRING;
  backend.name = "fake_cuda";
  backend.device_count = DeviceCount;
  backend.device_info = DeviceInfo;
  backend.kernels = kKernels;
  backend.kernel_count = 2;
  backend.prepare_mask = PrepareMask;
  backend.copy_array = CopyArray;
  backend.allocate = Allocate;
  backend.release = Release;
  backend.copy_to_device = Copy;
  backend.copy_to_host = Copy;
  backend.synchronize = Synchronize;
  return backend;
}

}  // namespace
}  // namespace tandem::test

extern "C" __attribute__((visibility("default"))) const tandem::core::Backend* tandem_backend_v1() {
  static const tandem::core::Backend backend = tandem::test::MakeBackend();
  return tandem::test::kKind == tandem::test::Kind::kNullRecord ? nullptr : &backend;
}

// How many blocks are not released: 0 after every call.
extern "C" __attribute__((visibility("default"))) int64_t tandem_fake_block_count() {
  return static_cast<int64_t>(tandem::test::Blocks().size());
}
