#include <algorithm>
#include <cstring>
#include <string_view>

#include "cli/errors.h"
#include "cli/npy.h"

namespace tandem::cli {
namespace {

struct TypeRow {
  NpyType type;
  std::string_view code;  // without the byte order
  size_t size;
  const char* name;
};
constexpr TypeRow kTypes[] = {
    {NpyType::kBool, "b1", 1, "bool"},   {NpyType::kU8, "u1", 1, "uint8"},
    {NpyType::kU16, "u2", 2, "uint16"},  {NpyType::kI32, "i4", 4, "int32"},
    {NpyType::kI64, "i8", 8, "int64"},   {NpyType::kF16, "f2", 2, "float16"},
    {NpyType::kF32, "f4", 4, "float32"}, {NpyType::kF64, "f8", 8, "float64"},
};

const TypeRow& RowOf(NpyType type) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes),
                       [type](const TypeRow& row) { return row.type == type; });
}

// A header never needs more: three keys, a short type and at most five numbers, padded to 64 bytes.
constexpr size_t kMaxHeaderLength = 65535;

// The text, cut and with unprintable bytes replaced: it goes to a terminal.
std::string Quote(std::string_view text) {
  std::string quoted = "'";
  for (const char c : text.substr(0, 60)) quoted += c >= ' ' && c <= '~' ? c : '?';
  return quoted + (text.size() > 60 ? "...'" : "'");
}

// Reads the Python dictionary of a header: {'descr': '<f4', 'fortran_order': False, 'shape': (3,)}.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  void Parse(NpyHeader* header) {
    bool has_type = false, has_order = false, has_shape = false;
    Expect('{');
    while (!Accept('}')) {
      const std::string_view key = String();
      Expect(':');
      if (key == "descr" && !has_type) {
        header->type = Type();
        has_type = true;
      } else if (key == "fortran_order" && !has_order) {
        Order();
        has_order = true;
      } else if (key == "shape" && !has_shape) {
        header->shape = Shape();
        has_shape = true;
      } else {
        Fail("its header has an unknown or repeated key " + Quote(key));
      }
      if (!Accept(',')) {
        Expect('}');
        break;
      }
    }
    SkipSpace();
    if (position_ != text_.size()) Fail("its header goes on after the dictionary");
    if (!has_type || !has_order || !has_shape) {
      Fail("its header lacks one of 'descr', 'fortran_order', 'shape'");
    }
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const { throw BadInput(name_ + ": " + what); }
  [[noreturn]] void FailSyntax() const {
    Fail("its header is not a dictionary as NumPy writes it (at byte " + std::to_string(position_) +
         ")");
  }

  void SkipSpace() {
    while (position_ < text_.size() &&
           (text_[position_] == ' ' || text_[position_] == '\n' || text_[position_] == '\t')) {
      ++position_;
    }
  }
  bool Accept(char c) {
    SkipSpace();
    if (position_ >= text_.size() || text_[position_] != c) return false;
    ++position_;
    return true;
  }
  void Expect(char c) {
    if (!Accept(c)) FailSyntax();
  }
  bool AcceptWord(std::string_view word) {
    SkipSpace();
    if (text_.substr(position_, word.size()) != word) return false;
    position_ += word.size();
    return true;
  }

  std::string_view String() {
    SkipSpace();
    if (position_ >= text_.size() || (text_[position_] != '\'' && text_[position_] != '"')) {
      FailSyntax();
    }
    const char quote = text_[position_];
    const size_t begin = position_ + 1;
    const size_t end = text_.find(quote, begin);
    if (end == std::string_view::npos) FailSyntax();
    position_ = end + 1;
    return text_.substr(begin, end - begin);
  }

  NpyType Type() {
    SkipSpace();
    if (position_ < text_.size() && (text_[position_] == '[' || text_[position_] == '(')) {
      Fail("it holds records (a structured dtype), not numbers");
    }
    const std::string_view descr = String();
    if (descr.size() > 1 && descr[0] == '>') {
      Fail("its elements are big-endian (" + Quote(descr) +
           "); write them with .astype(a.dtype.newbyteorder('<'))");
    }
    if (descr.find('O') != std::string_view::npos) {
      Fail("it holds Python objects (a pickle), not numbers");
    }
    for (const TypeRow& row : kTypes) {
      if (descr.size() != 3 || descr.substr(1) != row.code) continue;
      if (descr[0] == '<' || (descr[0] == '|' && row.size == 1)) return row.type;
    }
    Fail("its dtype is " + Quote(descr) +
         "; it may be float16, float32, float64, int32, int64, uint16 (as bf16), uint8 or bool");
  }

  void Order() {
    if (AcceptWord("False")) return;
    if (AcceptWord("True")) {
      Fail("it is in Fortran order; write numpy.ascontiguousarray(a) instead");
    }
    FailSyntax();
  }

  std::vector<int64_t> Shape() {
    std::vector<int64_t> shape;
    Expect('(');
    while (!Accept(')')) {
      shape.push_back(Dimension());
      if (shape.size() > kNpyMaxRank) {
        Fail("it has more than " + std::to_string(kNpyMaxRank) + " dimensions");
      }
      if (!Accept(',')) {
        Expect(')');
        if (shape.size() == 1) FailSyntax();  // (3) is a number
        break;
      }
    }
    return shape;
  }

  int64_t Dimension() {
    SkipSpace();
    if (position_ < text_.size() && text_[position_] == '-') {
      Fail("a dimension of its shape is negative");
    }
    int64_t value = 0;
    const size_t begin = position_;
    for (; position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9';
         ++position_) {
      if (__builtin_mul_overflow(value, int64_t{10}, &value) ||
          __builtin_add_overflow(value, int64_t{text_[position_] - '0'}, &value)) {
        Fail("a dimension of its shape is beyond 64 bits");
      }
    }
    if (position_ == begin) FailSyntax();
    if (position_ < text_.size() && text_[position_] == 'L') ++position_;  // Python 2 wrote 3L
    return value;
  }

  std::string_view text_;
  const std::string& name_;
  size_t position_ = 0;
};

// Bytes of data that the shape claims; throws when they do not fit 63 bits. Dimensions of 0 do not
// hide an overflow of the others.
uint64_t ClaimedBytes(const NpyHeader& header, const std::string& name) {
  int64_t bytes = static_cast<int64_t>(NpyTypeSize(header.type));
  bool is_empty = false;
  for (const int64_t dimension : header.shape) {
    if (dimension == 0) {
      is_empty = true;
    } else if (__builtin_mul_overflow(bytes, dimension, &bytes)) {
      throw BadInput(name + ": its shape claims more elements than 64 bits can count");
    }
  }
  return is_empty ? 0 : static_cast<uint64_t>(bytes);
}

}  // namespace

const char* NpyTypeName(NpyType type) { return RowOf(type).name; }
size_t NpyTypeSize(NpyType type) { return RowOf(type).size; }

NpyHeader ParseNpyHeader(const unsigned char* bytes, size_t size, uint64_t file_size,
                         const std::string& name) {
  static constexpr unsigned char kMagic[] = {0x93, 'N', 'U', 'M', 'P', 'Y'};
  if (size < sizeof(kMagic) || std::memcmp(bytes, kMagic, sizeof(kMagic)) != 0) {
    if (size >= 2 && bytes[0] == 'P' && bytes[1] == 'K') {
      throw BadInput(name + ": it is a .npz archive; give one .npy file out of it");
    }
    throw BadInput(name + ": it is not a .npy file");
  }
  if (size < 10) throw BadInput(name + ": it ends inside its header");
  const unsigned major = bytes[6];
  const unsigned minor = bytes[7];
  if (major < 1 || major > 3 || minor != 0) {
    throw BadInput(name + ": .npy format version " + std::to_string(major) + "." +
                   std::to_string(minor) + "; versions 1.0, 2.0 and 3.0 are read");
  }
  size_t length = bytes[8] | static_cast<size_t>(bytes[9]) << 8;
  size_t text_offset = 10;
  if (major >= 2) {
    if (size < 12) throw BadInput(name + ": it ends inside its header");
    length |= static_cast<size_t>(bytes[10]) << 16 | static_cast<size_t>(bytes[11]) << 24;
    text_offset = 12;
  }
  if (length > kMaxHeaderLength) {
    throw BadInput(name + ": its header claims " + std::to_string(length) + " bytes; at most " +
                   std::to_string(kMaxHeaderLength) + " are read");
  }
  if (length > size - text_offset) throw BadInput(name + ": it ends inside its header");

  NpyHeader header;
  const std::string_view text(reinterpret_cast<const char*>(bytes) + text_offset, length);
  HeaderParser(text, name).Parse(&header);
  header.data_offset = text_offset + length;
  const uint64_t claimed = ClaimedBytes(header, name);
  const uint64_t present = file_size - header.data_offset;
  if (claimed > present) {
    throw BadInput(name + ": it is truncated: its shape needs " + std::to_string(claimed) +
                   " bytes of data, it has " + std::to_string(present));
  }
  if (claimed < present) {
    throw BadInput(name + ": " + std::to_string(present - claimed) +
                   " bytes follow its data; it may be damaged");
  }
  header.data_size = static_cast<size_t>(claimed);
  return header;
}

NpyArray ParseNpy(const unsigned char* bytes, size_t size, const std::string& name) {
  const NpyHeader header = ParseNpyHeader(bytes, size, size, name);
  NpyArray array{header.type, header.shape, Buffer(header.data_size)};
  if (header.data_size > 0) {
    std::memcpy(array.data.data(), bytes + header.data_offset, header.data_size);
  }
  return array;
}

}  // namespace tandem::cli
