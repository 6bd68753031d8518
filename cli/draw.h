// A mask as a picture: what each cell of it sees, as text, SVG or PNG.
#ifndef TANDEM_CLI_DRAW_H_
#define TANDEM_CLI_DRAW_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cli/output_file.h"
#include "tandem/tandem.h"

namespace tandem::cli {

enum class Cell { kEmpty, kPartial, kFull };

// The mask of one sequence and head, counted exactly.
struct MaskPicture {
  int64_t rows = 0;
  int64_t keys = 0;
  int64_t cell = 1;  // rows and keys of a cell
  int64_t cell_rows = 0;
  int64_t cell_columns = 0;
  std::vector<int64_t> cell_pairs;    // [cell_rows * cell_columns], visible pairs
  std::vector<int64_t> visible_keys;  // [rows]
  int64_t visible_pairs = 0;
  int64_t tiles[3] = {};  // by tandem_tile_class, of 64 rows and 64 keys

  Cell At(int64_t cell_row, int64_t cell_column) const;
  // Whether a row of this row of cells sees no key.
  bool HasEmptyRow(int64_t cell_row) const;
};

// At most max_cells cells in each direction. Throws what the library answers (cli/errors.h).
MaskPicture ScanMask(const tandem_problem& problem, int64_t sequence, int64_t head,
                     int64_t max_cells);

// Lines of two characters a cell: blocks, or ASCII.
std::string DrawText(const MaskPicture& picture, bool ascii);
std::string DrawSvg(const MaskPicture& picture);
void WritePng(const MaskPicture& picture, OutputFile* file);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_DRAW_H_
