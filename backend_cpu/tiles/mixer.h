// Products of tiles mixed at a fine grain with other work: while the tile unit works on one
// product, the vector unit works on half a row.
#ifndef TANDEM_BACKEND_CPU_TILES_MIXER_H_
#define TANDEM_BACKEND_CPU_TILES_MIXER_H_

#include "backend_cpu/tiles/quads.h"

namespace tandem::cpu {
namespace {

// Where there is no work to mix in.
struct NoWork {
  TANDEM_ISA_INLINE int64_t Rows() const { return 0; }
  TANDEM_ISA_INLINE void FirstHalf(int64_t) {}
  TANDEM_ISA_INLINE void SecondHalf(int64_t) {}
};

// Spreads the rows of some work of the vector unit, each in two halves, evenly over a number of
// quads.
template <class Leaf, class Work>
class Mixer {
 public:
  using Tiles = typename Leaf::Tiles;

  TANDEM_ISA_INLINE Mixer(Tiles* tiles, Work* work, int64_t quads)
      : tiles_(*tiles), work_(*work), quads_(quads), rows_(work->Rows()) {}

  TANDEM_ISA_INLINE void Quad(const uint16_t* a, const uint16_t* b) {
    LoadOperands(a, b, &tiles_);
    credit_ += rows_;
    if (credit_ >= 2 * quads_) {
      tiles_.template Multiply<0, 4, 6>();
      work_.FirstHalf(row_);
      tiles_.template Multiply<1, 5, 6>();
      work_.SecondHalf(row_);
      tiles_.template Multiply<2, 4, 7>();
      work_.FirstHalf(row_ + 1);
      tiles_.template Multiply<3, 5, 7>();
      work_.SecondHalf(row_ + 1);
      row_ += 2;
      credit_ -= 2 * quads_;
    } else if (credit_ >= quads_) {
      tiles_.template Multiply<0, 4, 6>();
      tiles_.template Multiply<1, 5, 6>();
      work_.FirstHalf(row_);
      tiles_.template Multiply<2, 4, 7>();
      tiles_.template Multiply<3, 5, 7>();
      work_.SecondHalf(row_);
      ++row_;
      credit_ -= quads_;
    } else {
      MultiplyQuad(&tiles_);
    }
  }

  // Rows that no quad took.
  TANDEM_ISA_INLINE void Finish() {
    for (; row_ < rows_; ++row_) {
      work_.FirstHalf(row_);
      work_.SecondHalf(row_);
    }
  }

 private:
  Tiles& tiles_;
  Work& work_;
  const int64_t quads_;
  const int64_t rows_;
  int64_t row_ = 0;
  int64_t credit_ = 0;  // rows due, times quads_
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_MIXER_H_
