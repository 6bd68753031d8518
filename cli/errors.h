// What ends a command: each error knows its exit code (docs of the command: 1 out of contract, 2
// bad usage or input, 3 the asked-for device or kernel cannot serve).
#ifndef TANDEM_CLI_ERRORS_H_
#define TANDEM_CLI_ERRORS_H_

#include <stdexcept>
#include <string>

#include "tandem/tandem.h"

namespace tandem::cli {

inline constexpr int kExitOutOfContract = 1;
inline constexpr int kExitBadInput = 2;
inline constexpr int kExitCannotServe = 3;

struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CannotServe : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws what a failed call of the library means to the user.
inline void Check(tandem_status status) {
  if (status == TANDEM_STATUS_OK) return;
  const std::string message = tandem_last_error();
  if (status == TANDEM_STATUS_INVALID_ARGUMENT) throw BadInput(message);
  throw CannotServe(message);
}

}  // namespace tandem::cli

#endif  // TANDEM_CLI_ERRORS_H_
