// Products of tiles mixed at a fine grain with other work: while the tile unit works on one
// product, the vector unit works on half a row.
#ifndef TANDEM_BACKEND_CPU_TILES_MIXER_H_
#define TANDEM_BACKEND_CPU_TILES_MIXER_H_

#include <type_traits>

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
// quads. kReadsOnce: as LoadOperands has it.
template <class Leaf, class Work, bool kReadsOnce = false>
class Mixer {
 public:
  using Tiles = typename Leaf::Tiles;

  TANDEM_ISA_INLINE Mixer(Tiles* tiles, Work* work, int64_t quads)
      : tiles_(*tiles), work_(*work), quads_(quads), rows_(work->Rows()) {}

  TANDEM_ISA_INLINE void Quad(Operands loads, const uint16_t* a, const uint16_t* b) {
    Quad(loads, a, b, [](auto) __attribute__((always_inline)){});
  }

  // The first quad of a sum that begins with 0, and goes to `sums` (four registers).
  TANDEM_ISA_INLINE void FirstQuad(const uint16_t* a, const uint16_t* b, float* sums) {
    Quad(
        Operands::kBoth, a, b, [&](auto c) __attribute__((always_inline)) {
          StoreBefore<c.value>();
          tiles_.template Zero<c.value>();
        });
    sums_ = sums;
  }
  // Of a sum that goes on from what `sums` has.
  TANDEM_ISA_INLINE void NextQuad(const uint16_t* a, const uint16_t* b, float* sums) {
    Quad(
        Operands::kBoth, a, b, [&](auto c) __attribute__((always_inline)) {
          StoreBefore<c.value>();
          tiles_.template Load<c.value>(sums + c.value * kRegisterFloats);
        });
    sums_ = sums;
  }

  // The last sum, and rows that no quad took.
  TANDEM_ISA_INLINE void Finish() {
    if (sums_ != nullptr) StoreQuad(sums_, &tiles_);
    for (; row_ < rows_; ++row_) {
      work_.FirstHalf(row_);
      work_.SecondHalf(row_);
    }
  }

 private:
  // A register of the sum before, as late as can be: the other products of its last quad are under
  // way while it waits for its own.
  template <int kC>
  TANDEM_ISA_INLINE void StoreBefore() {
    if (sums_ != nullptr) tiles_.template Store<kC>(sums_ + kC * kRegisterFloats);
  }

  // `before` is called before the product of each register of C, with its number.
  template <class Before>
  TANDEM_ISA_INLINE void Quad(Operands loads, const uint16_t* a, const uint16_t* b, Before before) {
    LoadOperands<kReadsOnce>(loads, a, b, &tiles_);
    credit_ += rows_;
    if (credit_ >= 2 * quads_) {
      before(std::integral_constant<int, 0>());
      tiles_.template Multiply<0, 4, 6>();
      work_.FirstHalf(row_);
      before(std::integral_constant<int, 1>());
      tiles_.template Multiply<1, 5, 6>();
      work_.SecondHalf(row_);
      before(std::integral_constant<int, 2>());
      tiles_.template Multiply<2, 4, 7>();
      work_.FirstHalf(row_ + 1);
      before(std::integral_constant<int, 3>());
      tiles_.template Multiply<3, 5, 7>();
      work_.SecondHalf(row_ + 1);
      row_ += 2;
      credit_ -= 2 * quads_;
      return;
    }
    const bool has_row = credit_ >= quads_;
    before(std::integral_constant<int, 0>());
    tiles_.template Multiply<0, 4, 6>();
    before(std::integral_constant<int, 1>());
    tiles_.template Multiply<1, 5, 6>();
    if (has_row) work_.FirstHalf(row_);
    before(std::integral_constant<int, 2>());
    tiles_.template Multiply<2, 4, 7>();
    before(std::integral_constant<int, 3>());
    tiles_.template Multiply<3, 5, 7>();
    if (has_row) {
      work_.SecondHalf(row_);
      ++row_;
      credit_ -= quads_;
    }
  }

  Tiles& tiles_;
  Work& work_;
  const int64_t quads_;
  const int64_t rows_;
  float* sums_ = nullptr;  // of the quads since the last FirstQuad or NextQuad
  int64_t row_ = 0;
  int64_t credit_ = 0;  // rows due, times quads_
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_MIXER_H_
