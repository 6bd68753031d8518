// The calling thread's last message, and the guard that keeps exceptions from crossing the C ABI.
#ifndef TANDEM_DISPATCH_ERROR_H_
#define TANDEM_DISPATCH_ERROR_H_

#include <exception>
#include <new>

#include "core/text.h"
#include "tandem/tandem.h"

namespace tandem::dispatch {

// The message of this thread; empty after each successful call.
core::Text& LastError();

__attribute__((format(printf, 2, 3))) tandem_status Fail(tandem_status status, const char* format,
                                                         ...);

// Runs the body of an entry point. The last error is cleared first.
template <typename Body>
tandem_status Guard(Body body) noexcept {
  LastError().data[0] = '\0';
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return Fail(TANDEM_STATUS_OUT_OF_MEMORY, "host memory is exhausted");
  } catch (const std::exception& exception) {
    return Fail(TANDEM_STATUS_INTERNAL, "unexpected: %s", exception.what());
  } catch (...) {
    return Fail(TANDEM_STATUS_INTERNAL, "unexpected exception");
  }
}

// For queries that cannot fail but for want of memory: the fallback then.
template <typename Result, typename Body>
Result Quietly(Result fallback, Body body) noexcept {
  try {
    return body();
  } catch (...) {
    return fallback;
  }
}

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_ERROR_H_
