// Every backend of the process: the CPU's, built in, and CUDA's plugin, loaded on first use.
#ifndef TANDEM_DISPATCH_REGISTRY_H_
#define TANDEM_DISPATCH_REGISTRY_H_

#include <string>
#include <vector>

#include "core/backend.h"

namespace tandem::dispatch {

struct BackendState {
  const core::Backend* backend = nullptr;  // null: not loaded
  std::string unavailable;                 // why no device can be used; empty when one can
  std::vector<core::DeviceInfo> devices;
};

// Made on the first call, never changed after; safe from every thread.
const BackendState& StateOf(tandem_device_type type);

// The backend of a device that is there, or null with the status and message set.
const core::Backend* UsableBackend(tandem_device_type type, int32_t index, tandem_status* status);

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_REGISTRY_H_
