#include "dispatch/registry.h"

#include "backend_cpu/cpu_backend.h"
#include "dispatch/error.h"
#include "dispatch/plugin.h"
#include "dispatch/select.h"

namespace tandem::dispatch {
namespace {

BackendState Probe(const core::Backend* backend, std::string reason) {
  BackendState state;
  state.backend = backend;
  state.unavailable = std::move(reason);
  if (backend == nullptr) return state;
  core::Text text = {};
  const int32_t count = backend->device_count(&text);
  if (count < 1) state.unavailable = text.data;
  for (int32_t index = 0; index < count; ++index) {
    core::DeviceInfo info = {};
    core::Text error = {};
    if (backend->device_info(index, &info, &error) != TANDEM_STATUS_OK) {
      state.devices.clear();
      state.unavailable = error.data;
      break;
    }
    state.devices.push_back(info);
  }
  return state;
}

BackendState ProbeCuda() {
  LoadedBackend loaded = LoadCudaBackend();
  return Probe(loaded.backend, std::move(loaded.reason));
}

struct Kernel {
  const core::KernelRecord* record;
  tandem_device_type device_type;
  std::string unavailable;
};

const std::vector<Kernel>& AllKernels() {
  static const std::vector<Kernel>* kernels = [] {
    auto* all = new std::vector<Kernel>;
    for (tandem_device_type type : {TANDEM_DEVICE_CPU, TANDEM_DEVICE_CUDA}) {
      const BackendState& state = StateOf(type);
      if (state.backend == nullptr) continue;
      const uint64_t features = state.devices.empty() ? 0 : state.devices[0].features;
      for (int32_t n = 0; n < state.backend->kernel_count; ++n) {
        const core::KernelRecord& record = state.backend->kernels[n];
        all->push_back(
            {&record, type,
             state.devices.empty() ? state.unavailable : MissingFeatures(record, features)});
      }
    }
    return all;
  }();
  return *kernels;
}

}  // namespace

const BackendState& StateOf(tandem_device_type type) {
  // Kept until the process ends: a destructor could run while other threads still call.
  if (type == TANDEM_DEVICE_CUDA) {
    static const BackendState* cuda = new BackendState(ProbeCuda());
    return *cuda;
  }
  static const BackendState* cpu = new BackendState(Probe(cpu::CpuBackend(), ""));
  return *cpu;
}

const core::Backend* UsableBackend(tandem_device_type type, int32_t index, tandem_status* status) {
  const BackendState& state = StateOf(type);
  const char* name = type == TANDEM_DEVICE_CUDA ? "cuda" : "cpu";
  if (state.devices.empty()) {
    *status =
        Fail(TANDEM_STATUS_DEVICE_UNAVAILABLE, "device %s: %s", name, state.unavailable.c_str());
    return nullptr;
  }
  if (index < 0 || index >= static_cast<int32_t>(state.devices.size())) {
    *status = Fail(TANDEM_STATUS_DEVICE_UNAVAILABLE, "device_index is %d, must be in [0, %zu) (%s)",
                   index, state.devices.size(), name);
    return nullptr;
  }
  *status = TANDEM_STATUS_OK;
  return state.backend;
}

}  // namespace tandem::dispatch

using tandem::dispatch::AllKernels;
using tandem::dispatch::BackendState;
using tandem::dispatch::Quietly;
using tandem::dispatch::StateOf;

extern "C" {

int32_t tandem_device_count(tandem_device_type type) {
  if (type != TANDEM_DEVICE_CPU && type != TANDEM_DEVICE_CUDA) return 0;
  return Quietly(0, [type] { return static_cast<int32_t>(StateOf(type).devices.size()); });
}

const char* tandem_device_unavailable_reason(tandem_device_type type) {
  if (type != TANDEM_DEVICE_CPU && type != TANDEM_DEVICE_CUDA) return "not a device type";
  return Quietly<const char*>("host memory is exhausted", [type]() -> const char* {
    const BackendState& state = StateOf(type);
    return state.devices.empty() ? state.unavailable.c_str() : nullptr;
  });
}

const char* tandem_device_description(tandem_device_type type, int32_t index) {
  if (index < 0 || index >= tandem_device_count(type)) return nullptr;
  return StateOf(type).devices[index].description.data;
}

int32_t tandem_kernel_count(void) {
  return Quietly(0, [] { return static_cast<int32_t>(AllKernels().size()); });
}

const char* tandem_kernel_name(int32_t index) {
  return index >= 0 && index < tandem_kernel_count() ? AllKernels()[index].record->name : nullptr;
}

tandem_device_type tandem_kernel_device(int32_t index) {
  if (index < 0 || index >= tandem_kernel_count()) return TANDEM_DEVICE_UNSET;
  return AllKernels()[index].device_type;
}

const char* tandem_kernel_unavailable_reason(int32_t index) {
  if (index < 0 || index >= tandem_kernel_count()) return "there is no such kernel";
  const std::string& reason = AllKernels()[index].unavailable;
  return reason.empty() ? nullptr : reason.c_str();
}

}  // extern "C"
