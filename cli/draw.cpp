#include "cli/draw.h"

#include <png.h>

#include <algorithm>
#include <cstdio>

#include "cli/errors.h"

namespace tandem::cli {
namespace {

struct Color {
  unsigned char red, green, blue;
};
constexpr Color kFullColor = {27, 79, 114};
constexpr Color kPartialColor = {127, 179, 213};
constexpr Color kEmptyColor = {242, 243, 244};
constexpr Color kEmptyRowColor = {203, 67, 53};
constexpr Color kBackground = {255, 255, 255};

Color ColorOf(Cell cell) {
  if (cell == Cell::kFull) return kFullColor;
  return cell == Cell::kPartial ? kPartialColor : kEmptyColor;
}

// Pixels of a cell's side, so that small masks are not tiny.
int64_t CellPixels(const MaskPicture& picture) {
  const int64_t most = std::max<int64_t>({picture.cell_rows, picture.cell_columns, 1});
  return std::clamp<int64_t>(768 / most, 2, 24);
}

std::string Rectangle(int64_t x, int64_t y, int64_t width, int64_t height, Color c) {
  char text[160];
  snprintf(text, sizeof(text),
           "<rect x=\"%lld\" y=\"%lld\" width=\"%lld\" height=\"%lld\" fill=\"#%02x%02x%02x\"/>\n",
           static_cast<long long>(x), static_cast<long long>(y), static_cast<long long>(width),
           static_cast<long long>(height), c.red, c.green, c.blue);
  return text;
}

}  // namespace

Cell MaskPicture::At(int64_t cell_row, int64_t cell_column) const {
  const int64_t height = std::min(cell, rows - cell_row * cell);
  const int64_t width = std::min(cell, keys - cell_column * cell);
  const int64_t pairs = cell_pairs[static_cast<size_t>(cell_row * cell_columns + cell_column)];
  if (pairs == 0) return Cell::kEmpty;
  return pairs == height * width ? Cell::kFull : Cell::kPartial;
}

bool MaskPicture::HasEmptyRow(int64_t cell_row) const {
  const int64_t end = std::min(rows, (cell_row + 1) * cell);
  for (int64_t i = cell_row * cell; i < end; ++i) {
    if (visible_keys[static_cast<size_t>(i)] == 0) return true;
  }
  return false;
}

std::string DrawText(const MaskPicture& picture, bool ascii) {
  const char* const unicode[] = {"··", "▒▒", "██"};
  const char* const plain[] = {"..", "++", "##"};
  const char* const* cells = ascii ? plain : unicode;
  std::string text;
  for (int64_t row = 0; row < picture.cell_rows; ++row) {
    for (int64_t column = 0; column < picture.cell_columns; ++column) {
      text += cells[static_cast<int>(picture.At(row, column))];
    }
    text += picture.HasEmptyRow(row) ? " <\n" : "\n";
  }
  return text + "full " + cells[2] + "  partial " + cells[1] + "  empty " + cells[0] +
         "  < has rows that see no key\n";
}

std::string DrawSvg(const MaskPicture& picture) {
  const int64_t side = CellPixels(picture);
  const int64_t width = (picture.cell_columns + 2) * side;
  const int64_t height = picture.cell_rows * side;
  char head[160];
  snprintf(head, sizeof(head),
           "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%lld\" height=\"%lld\">\n",
           static_cast<long long>(width), static_cast<long long>(height));
  std::string svg = head;
  svg += Rectangle(0, 0, picture.cell_columns * side, height, kEmptyColor);
  for (int64_t row = 0; row < picture.cell_rows; ++row) {
    for (int64_t begin = 0; begin < picture.cell_columns;) {
      const Cell cell = picture.At(row, begin);
      int64_t end = begin + 1;
      while (end < picture.cell_columns && picture.At(row, end) == cell) ++end;
      if (cell != Cell::kEmpty) {
        svg += Rectangle(begin * side, row * side, (end - begin) * side, side, ColorOf(cell));
      }
      begin = end;
    }
    if (picture.HasEmptyRow(row)) {
      svg += Rectangle((picture.cell_columns + 1) * side, row * side, side, side, kEmptyRowColor);
    }
  }
  return svg + "</svg>\n";
}

void WritePng(const MaskPicture& picture, OutputFile* file) {
  const int64_t side = CellPixels(picture);
  const int64_t width = (picture.cell_columns + 2) * side;
  const int64_t height = std::max<int64_t>(picture.cell_rows, 1) * side;
  std::vector<Color> pixels(static_cast<size_t>(width * height), kBackground);
  for (int64_t y = 0; y < picture.cell_rows * side; ++y) {
    Color* line = pixels.data() + y * width;
    for (int64_t x = 0; x < picture.cell_columns * side; ++x) {
      line[x] = ColorOf(picture.At(y / side, x / side));
    }
    if (picture.HasEmptyRow(y / side)) {
      std::fill(line + (picture.cell_columns + 1) * side, line + width, kEmptyRowColor);
    }
  }
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(width);
  image.height = static_cast<png_uint_32>(height);
  image.format = PNG_FORMAT_RGB;
  png_alloc_size_t size = 0;
  std::vector<unsigned char> encoded;
  if (png_image_write_get_memory_size(image, size, 0, pixels.data(), 0, nullptr)) {
    encoded.resize(size);
    if (png_image_write_to_memory(&image, encoded.data(), &size, 0, pixels.data(), 0, nullptr)) {
      file->Write(encoded.data(), size);
      return;
    }
  }
  throw BadInput(std::string("the PNG cannot be made: ") + image.message);
}

}  // namespace tandem::cli
