#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cli/commands/commands.h"
#include "cli/draw.h"
#include "cli/errors.h"
#include "cli/inputs.h"
#include "cli/progress.h"

namespace tandem::cli {
namespace {

constexpr int64_t kPictureCells = 256;  // of SVG and PNG

bool TerminalIsUtf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    std::string text = value;
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text.find("utf-8") != std::string::npos || text.find("utf8") != std::string::npos;
  }
  return false;
}

// Cells of two characters that fit a line, with room for the mark of empty rows.
int64_t TerminalCells() {
  struct winsize size = {};
  int64_t columns = 80;
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) columns = size.ws_col;
  return std::clamp<int64_t>((columns - 3) / 2, 8, 64);
}

// Without sizes, those of a mask that is not broadcast along rows and keys.
ProblemOptions WithSizes(ProblemOptions options) {
  if (!options.shape.empty() || !options.q.empty() || options.mask.mask.empty()) return options;
  const std::vector<int64_t> shape = ReadNpy(options.mask.mask).shape;
  if (shape.size() < 2 || shape.size() > 4) return options;
  const auto at = [&](size_t from_end) {
    return from_end <= shape.size() ? shape[shape.size() - from_end] : 1;
  };
  const int64_t batch = shape.size() == 2 ? 1 : shape[0];
  const int64_t heads = shape.size() == 4 ? shape[1] : 1;
  options.shape = std::to_string(batch) + "," + std::to_string(heads) + ",1," +
                  std::to_string(at(2)) + "," + std::to_string(at(1)) + ",1";
  return options;
}

// "0-3, 7, 30-35", cut after a few.
std::string EmptyRowRanges(const MaskPicture& picture) {
  constexpr int kMost = 8;
  std::string text;
  int count = 0;
  for (int64_t begin = 0; begin < picture.rows; ++begin) {
    if (picture.visible_keys[static_cast<size_t>(begin)] != 0) continue;
    int64_t end = begin + 1;
    while (end < picture.rows && picture.visible_keys[static_cast<size_t>(end)] == 0) ++end;
    if (++count > kMost) return text + ", ...";
    if (!text.empty()) text += ", ";
    text += std::to_string(begin);
    if (end - begin > 1) text.append("-").append(std::to_string(end - 1));
    begin = end;
  }
  return text;
}

void PrintSummary(const MaskPicture& picture) {
  int64_t empty_rows = 0;
  for (const int64_t count : picture.visible_keys) empty_rows += count == 0 ? 1 : 0;
  const double pairs = static_cast<double>(picture.rows) * static_cast<double>(picture.keys);
  const double visible =
      pairs > 0 ? 100.0 * static_cast<double>(picture.visible_pairs) / pairs : 0.0;
  printf("tiles of 64 x 64: %lld full, %lld partial, %lld empty\n",
         static_cast<long long>(picture.tiles[TANDEM_TILE_FULL]),
         static_cast<long long>(picture.tiles[TANDEM_TILE_PARTIAL]),
         static_cast<long long>(picture.tiles[TANDEM_TILE_EMPTY]));
  const std::string ranges = EmptyRowRanges(picture);
  printf("empty rows: %lld of %lld%s%s%s\n", static_cast<long long>(empty_rows),
         static_cast<long long>(picture.rows), ranges.empty() ? "" : " (", ranges.c_str(),
         ranges.empty() ? "" : ")");
  printf("visible pairs: %lld of %.0f, sparsity %.2f %%\n",
         static_cast<long long>(picture.visible_pairs), pairs, 100.0 - visible);
}

}  // namespace

int Mask(const DrawOptions& options) {
  const std::string& path = options.svg.empty() ? options.png : options.svg;
  std::unique_ptr<OutputFile> file;
  if (!path.empty()) file = std::make_unique<OutputFile>(path);
  const Inputs inputs(WithSizes(options.problem), Source::kShapes);
  Progress progress;
  progress.Step("looking at the mask");
  const MaskPicture picture = ScanMask(inputs.problem(), options.sequence, options.head,
                                       file != nullptr ? kPictureCells : TerminalCells());
  if (!options.svg.empty()) {
    const std::string svg = DrawSvg(picture);
    file->Write(svg.data(), svg.size());
  } else if (!options.png.empty()) {
    WritePng(picture, file.get());
  }
  if (file != nullptr) file->Commit();
  progress.Finish();
  printf("sequence %lld, head %lld: %lld rows, %lld keys; a cell is %lld x %lld\n",
         static_cast<long long>(options.sequence), static_cast<long long>(options.head),
         static_cast<long long>(picture.rows), static_cast<long long>(picture.keys),
         static_cast<long long>(picture.cell), static_cast<long long>(picture.cell));
  if (file == nullptr) {
    const bool ascii = options.ascii || !TerminalIsUtf8();
    printf("%s", DrawText(picture, ascii).c_str());
  }
  PrintSummary(picture);
  return 0;
}

}  // namespace tandem::cli
