// Fuzz target: any bytes as a .npy file. They are read, or refused with BadInput; nothing else.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cli/errors.h"
#include "cli/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const tandem::cli::NpyArray array = tandem::cli::ParseNpy(data, size, "input");
    size_t expected = tandem::cli::NpyTypeSize(array.type);
    for (const int64_t extent : array.shape) expected *= static_cast<size_t>(extent);
    if (expected != array.data.size() || expected > size) std::abort();
  } catch (const tandem::cli::BadInput& error) {
    if (std::strlen(error.what()) == 0) std::abort();
  }
  return 0;
}
