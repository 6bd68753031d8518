#include "tests/support/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>
#include <utility>

namespace tandem::test {
namespace {

constexpr uint8_t kCanary = 0xC5;
constexpr int64_t kBorder = 256;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Memory::Memory(int64_t size, int64_t element_size, Placement placement) : size_(size) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const bool guarded = placement == Placement::kGuardBefore || placement == Placement::kGuardAfter;
  accessible_ = RoundUp(size + (guarded ? 0 : 2 * kBorder), page);
  mapping_size_ = accessible_ + 2 * page;
  void* mapping =
      mmap(nullptr, mapping_size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<uint8_t*>(mapping);
  begin_ = mapping_ + page;
  if (accessible_ > 0 && mprotect(begin_, accessible_, PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  std::memset(begin_, kCanary, accessible_);
  switch (placement) {
    case Placement::kAligned:
      data_ = begin_ + kBorder;
      break;
    case Placement::kMisaligned:
      data_ = begin_ + kBorder + element_size;
      break;
    case Placement::kGuardBefore:
      data_ = begin_;
      break;
    case Placement::kGuardAfter:
      data_ = begin_ + accessible_ - size;
      break;
  }
}

Memory::Memory(Memory&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_size_(other.mapping_size_),
      begin_(other.begin_),
      accessible_(other.accessible_),
      data_(other.data_),
      size_(other.size_) {}

Memory::~Memory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_size_);
}

bool Memory::BordersAreIntact() const {
  for (const uint8_t* byte = begin_; byte < begin_ + accessible_; ++byte) {
    if (byte == data_) byte += size_;
    if (byte < begin_ + accessible_ && *byte != kCanary) return false;
  }
  return true;
}

}  // namespace tandem::test
