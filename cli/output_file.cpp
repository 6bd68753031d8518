#include "cli/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "cli/errors.h"

namespace tandem::cli {
namespace {

[[noreturn]] void Fail(const std::string& path) {
  throw BadInput(path + ": cannot be written: " + std::strerror(errno));
}

}  // namespace

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  struct stat info;
  if (stat(path_.c_str(), &info) == 0) {
    if (!S_ISREG(info.st_mode)) throw BadInput(path_ + ": it is there and not a regular file");
    char resolved[PATH_MAX];  // a link stays, what it points to is replaced
    if (realpath(path_.c_str(), resolved) != nullptr) path_ = resolved;
  }
  const size_t slash = path_.find_last_of('/');
  const std::string directory = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  if (access(directory.c_str(), W_OK | X_OK) != 0) Fail(path_);
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void OutputFile::Open() {
  std::string name = path_ + ".XXXXXX";
  descriptor_ = mkostemp(name.data(), O_CLOEXEC);
  if (descriptor_ < 0) Fail(path_);
  temporary_ = name;
  const mode_t mask = umask(0);  // the only way to ask for it
  umask(mask);
  if (fchmod(descriptor_, 0666 & ~mask) != 0) Fail(path_);
}

void OutputFile::Write(const void* data, size_t size) {
  if (descriptor_ < 0) Open();
  constexpr size_t kMost = size_t{1} << 30;
  const char* position = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t count = write(descriptor_, position, std::min(size, kMost));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) Fail(path_);
    position += count;
    size -= static_cast<size_t>(count);
  }
}

void OutputFile::Commit() {
  if (descriptor_ < 0) Open();
  if (close(std::exchange(descriptor_, -1)) != 0) Fail(path_);
  if (rename(temporary_.c_str(), path_.c_str()) != 0) Fail(path_);
  temporary_.clear();
}

}  // namespace tandem::cli
