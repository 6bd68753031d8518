#include "dispatch/error.h"

#include <cstdarg>
#include <cstdio>

namespace tandem::dispatch {

core::Text& LastError() {
  thread_local core::Text text = {};
  return text;
}

tandem_status Fail(tandem_status status, const char* format, ...) {
  core::Text& text = LastError();
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text.data, sizeof(text.data), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace tandem::dispatch

extern "C" {

const char* tandem_version(void) { return TANDEM_VERSION_STRING; }

const char* tandem_last_error(void) { return tandem::dispatch::LastError().data; }

const char* tandem_status_string(tandem_status status) {
  switch (status) {
    case TANDEM_STATUS_OK:
      return "ok";
    case TANDEM_STATUS_INVALID_ARGUMENT:
      return "an argument is not allowed";
    case TANDEM_STATUS_UNSUPPORTED:
      return "no kernel that was asked for can serve the problem";
    case TANDEM_STATUS_DEVICE_UNAVAILABLE:
      return "the device asked for is not there";
    case TANDEM_STATUS_OUT_OF_MEMORY:
      return "memory is exhausted";
    case TANDEM_STATUS_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than the plan needs";
    case TANDEM_STATUS_DEVICE_ERROR:
      return "the device reported an error";
    case TANDEM_STATUS_INTERNAL:
      return "a defect in Tandem";
    default:
      return "not a tandem_status";
  }
}

}  // extern "C"
