#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/commands/commands.h"
#include "cli/report.h"

namespace tandem::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr tandem_device_type kDeviceTypes[] = {TANDEM_DEVICE_CPU, TANDEM_DEVICE_CUDA};

void PrintInfoJson() {
  Json devices = Json::array();
  Json unavailable = Json::object();
  for (const tandem_device_type type : kDeviceTypes) {
    for (int32_t n = 0; n < tandem_device_count(type); ++n) {
      devices.push_back({{"device", DeviceName(type)},
                         {"index", n},
                         {"description", tandem_device_description(type, n)}});
    }
    const char* reason = tandem_device_unavailable_reason(type);
    if (reason != nullptr) unavailable[DeviceName(type)] = reason;
  }
  Json kernels = Json::array();
  for (int32_t n = 0; n < tandem_kernel_count(); ++n) {
    const char* reason = tandem_kernel_unavailable_reason(n);
    kernels.push_back({{"kernel", tandem_kernel_name(n)},
                       {"device", DeviceName(tandem_kernel_device(n))},
                       {"unavailable", reason == nullptr ? Json(nullptr) : Json(reason)}});
  }
  Json json;
  json["version"] = tandem_version();
  json["devices"] = devices;
  json["unavailable"] = unavailable;
  json["kernels"] = kernels;
  printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

}  // namespace

int Info(bool json) {
  if (json) {
    PrintInfoJson();
    return 0;
  }
  printf("tandem %s\n", tandem_version());
  for (const tandem_device_type type : kDeviceTypes) {
    for (int32_t n = 0; n < tandem_device_count(type); ++n) {
      printf("device %s:%d  %s\n", DeviceName(type), n, tandem_device_description(type, n));
    }
    const char* reason = tandem_device_unavailable_reason(type);
    if (reason != nullptr) printf("device %s  none: %s\n", DeviceName(type), reason);
  }
  std::vector<std::vector<std::string>> rows = {{"kernel", "device", "here"}};
  for (int32_t n = 0; n < tandem_kernel_count(); ++n) {
    const char* reason = tandem_kernel_unavailable_reason(n);
    rows.push_back({tandem_kernel_name(n), DeviceName(tandem_kernel_device(n)),
                    reason == nullptr ? "yes" : reason});
  }
  PrintColumns(rows);
  return 0;
}

}  // namespace tandem::cli
