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

// A file that appears under its path, whole, by Commit() and not before; without it nothing stays.
// An existing file is replaced. Throws BadInput.
class NpyWriter {
 public:
  // Says early whether there is a directory that may be written to.
  explicit NpyWriter(std::string path);
  ~NpyWriter();
  NpyWriter(const NpyWriter&) = delete;
  NpyWriter& operator=(const NpyWriter&) = delete;

  // data: C order, little-endian.
  void Write(NpyType type, const std::vector<int64_t>& shape, const void* data, size_t size);
  void Commit();

 private:
  std::string path_;
  std::string temporary_;  // "" when there is no such file
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_NPY_H_
