#include "cli/npy.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "cli/errors.h"

namespace tandem::cli {
namespace {

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

[[noreturn]] void FailErrno(const std::string& path, const char* what) {
  throw BadInput(path + ": " + what + ": " + std::strerror(errno));
}

// Reads exactly `size` bytes from `offset` on.
void ReadAt(int descriptor, unsigned char* data, size_t size, size_t offset,
            const std::string& path) {
  constexpr size_t kMost = size_t{1} << 30;
  while (size > 0) {
    const ssize_t count =
        pread(descriptor, data, std::min(size, kMost), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) FailErrno(path, "cannot be read");
    if (count == 0) throw BadInput(path + ": it became shorter while it was read");
    data += count;
    size -= static_cast<size_t>(count);
    offset += static_cast<size_t>(count);
  }
}

std::string HeaderText(NpyType type, const std::vector<int64_t>& shape) {
  static constexpr const char* kCodes[] = {"|b1", "|u1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8"};
  std::string text = "{'descr': '" + std::string(kCodes[static_cast<size_t>(type)]) +
                     "', 'fortran_order': False, 'shape': (";
  for (size_t n = 0; n < shape.size(); ++n) {
    text += std::to_string(shape[n]) + (n + 1 < shape.size() ? ", " : "");
  }
  text += shape.size() == 1 ? ",), }" : "), }";
  const size_t unpadded = 10 + text.size() + 1;
  text.append((64 - unpadded % 64) % 64, ' ');
  return text + "\n";
}

}  // namespace

NpyArray ReadNpy(const std::string& path) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  const File file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) FailErrno(path, "cannot be opened");
  struct stat info;
  if (fstat(file.get(), &info) != 0) FailErrno(path, "cannot be examined");
  if (!S_ISREG(info.st_mode)) throw BadInput(path + ": it is not a regular file");
  const uint64_t file_size = static_cast<uint64_t>(info.st_size);

  std::vector<unsigned char> start(std::min<uint64_t>(file_size, 12 + 65535));
  ReadAt(file.get(), start.data(), start.size(), 0, path);
  const NpyHeader header = ParseNpyHeader(start.data(), start.size(), file_size, path);
  try {
    NpyArray array{header.type, header.shape, Buffer(header.data_size)};
    ReadAt(file.get(), array.data.data(), header.data_size, header.data_offset, path);
    return array;
  } catch (const std::bad_alloc&) {
    throw BadInput(path + ": there is not enough memory for its " +
                   std::to_string(header.data_size) + " bytes");
  }
}

void WriteNpy(NpyType type, const std::vector<int64_t>& shape, const void* data, size_t size,
              OutputFile* file) {
  const std::string text = HeaderText(type, shape);
  unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0};
  start[8] = static_cast<unsigned char>(text.size() & 255);
  start[9] = static_cast<unsigned char>(text.size() >> 8);
  file->Write(start, sizeof(start));
  file->Write(text.data(), text.size());
  file->Write(data, size);
}

}  // namespace tandem::cli
