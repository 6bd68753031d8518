// Reading and writing NumPy's .npy files, safe with hostile ones
// (docs/decisions/0003-npy-reader.md).
//
// Read: format versions 1.0, 2.0 and 3.0, little-endian arrays in C order of the types below.
// Everything else is an error that says what the file is.
#ifndef TANDEM_CLI_NPY_H_
#define TANDEM_CLI_NPY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cli/buffer.h"
#include "cli/output_file.h"

namespace tandem::cli {

enum class NpyType { kBool, kU8, kU16, kI32, kI64, kF16, kF32, kF64 };

const char* NpyTypeName(NpyType type);  // NumPy's: "float32"
size_t NpyTypeSize(NpyType type);

inline constexpr size_t kNpyMaxRank = 5;

struct NpyHeader {
  NpyType type = NpyType::kF32;
  std::vector<int64_t> shape;
  size_t data_offset = 0;
  size_t data_size = 0;
};

struct NpyArray {
  NpyType type = NpyType::kF32;
  std::vector<int64_t> shape;
  Buffer data;
};

// bytes: the beginning of a file of file_size bytes, all of its header at least. Checks that the
// data that the header claims is exactly what the file has. Throws BadInput, whose message begins
// with `name`.
NpyHeader ParseNpyHeader(const unsigned char* bytes, size_t size, uint64_t file_size,
                         const std::string& name);

// A file in memory.
NpyArray ParseNpy(const unsigned char* bytes, size_t size, const std::string& name);

// Memory is allocated only after the header was found to agree with the file's size. Throws
// BadInput.
NpyArray ReadNpy(const std::string& path);

// data: C order, little-endian, size bytes. Throws BadInput.
void WriteNpy(NpyType type, const std::vector<int64_t>& shape, const void* data, size_t size,
              OutputFile* file);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_NPY_H_
