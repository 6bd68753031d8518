// Memory whose borders are watched: by canary bytes, or by pages that may not be touched.
#ifndef TANDEM_TESTS_SUPPORT_MEMORY_H_
#define TANDEM_TESTS_SUPPORT_MEMORY_H_

#include <cstdint>

namespace tandem::test {

enum class Placement {
  kAligned,      // 64-byte aligned, canaries on both sides
  kMisaligned,   // one element past a 64-byte boundary, canaries on both sides
  kGuardBefore,  // the first byte follows a forbidden page
  kGuardAfter,   // the last byte is followed by a forbidden page
};

class Memory {
 public:
  // `size` bytes; `element_size` only says how far kMisaligned moves the data.
  Memory(int64_t size, int64_t element_size, Placement placement);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&&) = delete;

  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }
  // Nothing was written outside [data, data + size) as far as canaries can tell.
  bool BordersAreIntact() const;

 private:
  uint8_t* mapping_ = nullptr;
  int64_t mapping_size_ = 0;
  uint8_t* begin_ = nullptr;  // of the accessible part
  int64_t accessible_ = 0;
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_MEMORY_H_
