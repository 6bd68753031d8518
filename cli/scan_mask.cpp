// Counting a mask through the library: whole rectangles where it says that they are empty or full,
// pair by pair in the partial tiles.
#include <algorithm>
#include <memory>

#include "cli/buffer.h"
#include "cli/draw.h"
#include "cli/errors.h"
#include "tests/oracle/visibility.h"

namespace tandem::cli {
namespace {

constexpr int64_t kTile = 64;

struct Rectangle {
  int64_t row_begin, row_end, key_begin, key_end;
};

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The mask prepared once for all the questions.
class PreparedMask {
 public:
  explicit PreparedMask(const tandem_problem& problem) : problem_(problem) {
    size_t size = 0;
    tandem_options options = TANDEM_OPTIONS_INIT;
    options.device_type = TANDEM_DEVICE_CPU;
    Check(tandem_mask_plan_size(&problem, &options, &size));
    memory_ = Buffer(size);
    tandem_mask_plan* plan = nullptr;
    Check(tandem_mask_plan_create(&problem, &options, memory_.data(), size, nullptr, &plan));
    plan_.reset(plan);
    problem_.mask_plan = plan;
    problem_.mask_term_count = 0;
    problem_.mask_terms = nullptr;
  }
  const tandem_problem& problem() const { return problem_; }

 private:
  struct Destroy {
    void operator()(tandem_mask_plan* plan) const { tandem_mask_plan_destroy(plan); }
  };
  tandem_problem problem_;
  Buffer memory_;
  std::unique_ptr<tandem_mask_plan, Destroy> plan_;
};

class Scanner {
 public:
  Scanner(const tandem_problem& problem, int64_t sequence, int64_t head, MaskPicture* picture)
      : problem_(problem), sequence_(sequence), head_(head), picture_(picture) {}

  // A rectangle of whole tiles (cut off at the mask's edges).
  void Scan(const Rectangle& r) {
    if (r.row_begin >= r.row_end || r.key_begin >= r.key_end) return;
    const int64_t rows = r.row_end - r.row_begin;
    const int64_t keys = r.key_end - r.key_begin;
    const bool is_tile = rows <= kTile && keys <= kTile;
    tandem_tile_class tile = TANDEM_TILE_PARTIAL;
    Check(tandem_mask_inspect(&problem_, sequence_, head_, r.row_begin, rows, r.key_begin, keys,
                              is_tile ? visible_ : nullptr, &tile));
    if (is_tile || tile != TANDEM_TILE_PARTIAL) {
      picture_->tiles[tile] += CeilDiv(rows, kTile) * CeilDiv(keys, kTile);
      if (tile == TANDEM_TILE_FULL) AddFull(r);
      if (tile == TANDEM_TILE_PARTIAL) AddTile(r);
    } else if (rows >= keys) {
      const int64_t middle = r.row_begin + CeilDiv(CeilDiv(rows, kTile), 2) * kTile;
      Scan({r.row_begin, middle, r.key_begin, r.key_end});
      Scan({middle, r.row_end, r.key_begin, r.key_end});
    } else {
      const int64_t middle = r.key_begin + CeilDiv(CeilDiv(keys, kTile), 2) * kTile;
      Scan({r.row_begin, r.row_end, r.key_begin, middle});
      Scan({r.row_begin, r.row_end, middle, r.key_end});
    }
  }

 private:
  int64_t& PairsAt(int64_t row, int64_t key) {
    return picture_->cell_pairs[static_cast<size_t>(row / picture_->cell * picture_->cell_columns +
                                                    key / picture_->cell)];
  }

  void AddFull(const Rectangle& r) {
    const int64_t cell = picture_->cell;
    for (int64_t i = r.row_begin; i < r.row_end; ++i) {
      picture_->visible_keys[static_cast<size_t>(i)] += r.key_end - r.key_begin;
      for (int64_t j = r.key_begin; j < r.key_end;) {
        const int64_t end = std::min((j / cell + 1) * cell, r.key_end);
        PairsAt(i, j) += end - j;
        j = end;
      }
    }
  }

  void AddTile(const Rectangle& r) {
    const uint8_t* pair = visible_;
    for (int64_t i = r.row_begin; i < r.row_end; ++i) {
      for (int64_t j = r.key_begin; j < r.key_end; ++j, ++pair) {
        picture_->visible_keys[static_cast<size_t>(i)] += *pair;
        PairsAt(i, j) += *pair;
      }
    }
  }

  const tandem_problem& problem_;
  const int64_t sequence_;
  const int64_t head_;
  MaskPicture* picture_;
  uint8_t visible_[kTile * kTile] = {};
};

}  // namespace

MaskPicture ScanMask(const tandem_problem& problem, int64_t sequence, int64_t head,
                     int64_t max_cells) {
  const PreparedMask prepared(problem);
  const oracle::Dimensions d = oracle::DimensionsOf(problem);
  if (sequence < 0 || sequence >= d.batch) {
    throw BadInput("--sequence is " + std::to_string(sequence) + "; it must be in [0, " +
                   std::to_string(d.batch) + ")");
  }
  if (head < 0 || head >= d.q_heads) {
    throw BadInput("--head is " + std::to_string(head) + "; it must be in [0, " +
                   std::to_string(d.q_heads) + ")");
  }
  const oracle::SequenceRange range = oracle::SequenceOf(problem, sequence);
  MaskPicture picture;
  picture.rows = range.q_rows;
  picture.keys = range.kv_rows;
  picture.cell = std::max<int64_t>(1, CeilDiv(std::max(picture.rows, picture.keys), max_cells));
  picture.cell_rows = CeilDiv(picture.rows, picture.cell);
  picture.cell_columns = CeilDiv(picture.keys, picture.cell);
  picture.cell_pairs.assign(static_cast<size_t>(picture.cell_rows * picture.cell_columns), 0);
  picture.visible_keys.assign(static_cast<size_t>(picture.rows), 0);
  Scanner(prepared.problem(), sequence, head, &picture).Scan({0, picture.rows, 0, picture.keys});
  for (const int64_t count : picture.visible_keys) picture.visible_pairs += count;
  return picture;
}

}  // namespace tandem::cli
