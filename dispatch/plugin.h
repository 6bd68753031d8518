// Loading of a backend plugin, and the reason when there is none.
#ifndef TANDEM_DISPATCH_PLUGIN_H_
#define TANDEM_DISPATCH_PLUGIN_H_

#include <string>

#include "core/backend.h"

namespace tandem::dispatch {

struct LoadedBackend {
  const core::Backend* backend = nullptr;  // null: `reason` says why
  std::string reason;
};

// Whether this library can use the backend record of a plugin; on failure the reason is in *reason.
bool BackendIsCompatible(const core::Backend* backend, const std::string& path,
                         std::string* reason);

// Loads libtandem_cuda.so from $TANDEM_PLUGIN_DIR (an absolute directory; ignored in set-user-id
// programs) or else from the directory of this library. No other place is searched. The plugin
// stays loaded until the process ends.
LoadedBackend LoadCudaBackend();

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_PLUGIN_H_
