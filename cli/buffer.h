// Uninitialised memory aligned to 256 bytes: arrays read from files, outputs, workspaces.
#ifndef TANDEM_CLI_BUFFER_H_
#define TANDEM_CLI_BUFFER_H_

#include <cstddef>
#include <memory>
#include <new>

namespace tandem::cli {

class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(size_t size)
      : data_(static_cast<unsigned char*>(::operator new(size, kAlignment))), size_(size) {}

  unsigned char* data() { return data_.get(); }
  const unsigned char* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{256};
  struct Release {
    void operator()(unsigned char* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<unsigned char, Release> data_;
  size_t size_ = 0;
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_BUFFER_H_
