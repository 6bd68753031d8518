#include "dispatch/plugin.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstring>

namespace tandem::dispatch {
namespace {

constexpr const char* kCudaPlugin = "libtandem_cuda.so";

// The directory that holds the library (or program) this function was linked into; empty when it
// cannot be told.
std::string OwnDirectory() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<const void*>(&LoadCudaBackend), &info) == 0 ||
      info.dli_fname == nullptr) {
    return "";
  }
  char* resolved = realpath(info.dli_fname, nullptr);
  if (resolved == nullptr) return "";
  std::string path = resolved;
  free(resolved);
  return path.substr(0, path.find_last_of('/'));
}

}  // namespace

bool BackendIsCompatible(const core::Backend* backend, const std::string& path,
                         std::string* reason) {
  if (backend == nullptr) {
    *reason = path + " gave no backend record";
  } else if (backend->abi_version != core::kBackendAbiVersion) {
    *reason = path + " has plugin ABI version " + std::to_string(backend->abi_version) +
              ", this library needs " + std::to_string(core::kBackendAbiVersion);
  } else if (backend->backend_size != sizeof(core::Backend) ||
             backend->problem_size != sizeof(core::Problem)) {
    *reason = path + " was built with other structures than this library";
  } else if (std::strcmp(backend->version, TANDEM_VERSION_STRING) != 0) {
    *reason =
        path + " is version " + backend->version + ", this library is " + TANDEM_VERSION_STRING;
  } else if (backend->device_type != TANDEM_DEVICE_CUDA) {
    *reason = path + " is no CUDA backend";
  } else {
    return true;
  }
  return false;
}

LoadedBackend LoadCudaBackend() {
  LoadedBackend loaded;
  // secure_getenv is null in set-user-id programs, where the environment cannot be trusted.
  const char* directory_variable = secure_getenv("TANDEM_PLUGIN_DIR");
  std::string directory;
  if (directory_variable != nullptr && directory_variable[0] != '\0') {
    directory = directory_variable;
    if (directory[0] != '/') {
      loaded.reason = "TANDEM_PLUGIN_DIR is \"" + directory + "\", must be an absolute path";
      return loaded;
    }
  } else {
    directory = OwnDirectory();
  }
  if (directory.empty()) {
    loaded.reason = "the directory of libtandem.so cannot be told; set TANDEM_PLUGIN_DIR";
    return loaded;
  }
  const std::string path = directory + "/" + kCudaPlugin;
  if (access(path.c_str(), F_OK) != 0) {
    loaded.reason = "the plugin is missing: " + path;
    return loaded;
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    loaded.reason = std::string("the plugin cannot be loaded: ") + dlerror();
    return loaded;
  }
  const auto entry = reinterpret_cast<core::BackendEntry>(dlsym(handle, TANDEM_BACKEND_ENTRY));
  if (entry == nullptr) {
    loaded.reason = path + " does not export " + TANDEM_BACKEND_ENTRY;
    dlclose(handle);
    return loaded;
  }
  const core::Backend* backend = entry();
  if (!BackendIsCompatible(backend, path, &loaded.reason)) {
    dlclose(handle);
    return loaded;
  }
  loaded.backend = backend;
  return loaded;
}

}  // namespace tandem::dispatch
