// The products of a pair of tiles by matrix tiles (tiles/), with operands of bf16 parts in the
// forms of tile_forms.h. Q and dO are packed plain and, transposed, by rows; K by columns and
// interleaved; V by columns. P and dS are rounded to as many parts.
//
// The additions of a pair wait for the next pair's P and dS, and are mixed with them
// (tiles/mixer.h).
//
// dV and dK are computed transposed, dV^T += dO^T P and dK^T += Q^T dS: what has to be transposed
// then is packed once per tile, and P and dS are only interleaved. Sums are quads: dQ is [pair of
// 16 columns][2 pairs of 16 rows][4 registers], dK and dV are [pair of 16 columns][2 pairs of 16
// keys][4], with columns for rows of a register.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_TILE_MULTIPLIER_H_
#define TANDEM_BACKEND_CPU_BACKWARD_TILE_MULTIPLIER_H_

#include <cstring>

#include "backend_cpu/backward/tile_forms.h"
#include "backend_cpu/backward/tile_pair.h"
#include "backend_cpu/tiles/mixer.h"
#include "backend_cpu/tiles/tile_pack.h"

namespace tandem::cpu {
namespace {

// dO may be of f32 where the tensors are not.
TANDEM_HD int GradientParts(const core::Problem& p) {
  return core::Max(PartCount(p.dtype), PartCount(p.dout.dtype));
}

TANDEM_HD TileSizes MatrixTileSizes(const core::Problem& p, int parts) {
  const int64_t qk_columns = core::RoundUp<int64_t>(p.qk_dim, 32);
  const int64_t v_columns = core::RoundUp<int64_t>(p.v_dim, 32);
  // Two forms of halves are as many floats as one.
  const int64_t qk = parts * core::kTile * qk_columns, v = parts * core::kTile * v_columns;
  return {qk, v, qk, v / 2, qk_columns, v_columns};
}

template <class Leaf, int kParts>
class TileMultiplier {
 public:
  using Arch = typename Leaf::Arch;

  static TileSizes Sizes(const core::Problem& p) { return MatrixTileSizes(p, kParts); }
  // Of packing, two forms of a tile; of the products, the factors of two pairs.
  static int64_t ScratchBytes(const core::Problem& p) {
    const int64_t steps = core::CeilDiv<int64_t>(core::Max(p.qk_dim, p.v_dim), 32);
    return core::Max<int64_t>(4 * kParts * FormHalves(steps), 2 * sizeof(Factors));
  }

  TANDEM_ISA_INLINE explicit TileMultiplier(void* scratch)
      : factors_(static_cast<Factors*>(scratch)) {}

  // Zeros in place of what the parts cannot stand for; true where there was such an element.
  TANDEM_ISA_INLINE static bool LeaveOut(int64_t columns, float* row) {
    return !cpu::LeaveOut<Leaf>(kRange, columns, row);
  }
  static bool IsLeftOut(float x) { return !IsInRange(kRange, x); }

  // Tiles of 64 rows, `stride` apart, to operands.
  TANDEM_ISA_INLINE static void PackQueries(const float* rows, int64_t stride, int64_t dim,
                                            float* tile, void* scratch) {
    const int64_t steps = core::CeilDiv<int64_t>(dim, 32);
    auto* plain = reinterpret_cast<uint16_t*>(tile);
    auto* interleaved = static_cast<uint16_t*>(scratch);
    StoreForms<Leaf, kParts>(rows, stride, steps, plain, interleaved);
    const int64_t halves = kParts * FormHalves(steps);
    TransposeRegisters(interleaved, halves, plain + halves);
  }
  TANDEM_ISA_INLINE static void PackKeys(const float* rows, int64_t stride, int64_t dim,
                                         float* tile, void* scratch) {
    const int64_t steps = core::CeilDiv<int64_t>(dim, 32);
    const int64_t halves = kParts * FormHalves(steps);
    auto* plain = static_cast<uint16_t*>(scratch);
    auto* to = reinterpret_cast<uint16_t*>(tile);
    StoreForms<Leaf, kParts>(rows, stride, steps, plain, to + halves);
    TransposeRegisters(plain, halves, to);
  }
  TANDEM_ISA_INLINE static void PackValues(const float* rows, int64_t stride, int64_t dim,
                                           float* tile, void* scratch) {
    const int64_t steps = core::CeilDiv<int64_t>(dim, 32);
    const int64_t halves = kParts * FormHalves(steps);
    auto* plain = static_cast<uint16_t*>(scratch);
    StoreForms<Leaf, kParts>(rows, stride, steps, plain, plain + halves);
    TransposeRegisters(plain, halves, reinterpret_cast<uint16_t*>(tile));
  }

  // Q K^T and dO V^T, for all of the quads that the pair touches.
  TANDEM_ISA_INLINE void Multiply(const TilePair& pair) {
    const core::Problem& p = *pair.plane->p;
    const PairOperands at = OperandsOf(pair);
    const Quads quads = QuadsOf(pair);
    float* sums = nullptr;
    MultiplyRowsByKeys(quads, Halves(at.q), Halves(at.k), p.qk_dim, pair.scratch->p, &sums);
    MultiplyRowsByKeys(quads, Halves(at.dout), Halves(at.v), p.v_dim, pair.scratch->ds, &sums);
    if (sums != nullptr) StoreQuadRows<core::kTile>(sums, &tiles_);
  }

  // P and dS; the additions of this pair are only complete after the next, or Finish.
  TANDEM_ISA_INLINE void EvaluateAndAdd(const TilePair& pair) {
    Factors* factors = &factors_[next_factors_];
    if (!IsPlain(*pair.plane->p) || pair.left_out) {
      Finish();
      EvaluatePairs<Arch, 32>(pair);
      StoreFactors(pair, factors);
    } else if (pair.is_full && pair.row_end == core::kTile) {
      PlainFactors<false> work(pair, QuadsOf(pair), factors);
      AddPending(&work);
    } else {
      PlainFactors<true> work(pair, QuadsOf(pair), factors);
      AddPending(&work);
    }
    SetPending(pair, factors);
    next_factors_ ^= 1;
  }

  TANDEM_ISA_INLINE void Finish() {
    NoWork none;
    AddPending(&none);
    addition_count_ = 0;
  }

  // Where a tile of sums has the element of a row and column.
  static int64_t QuerySum(int64_t r, int64_t c, int64_t /*columns*/) {
    return ((c / 32 * 2 + r / 32) * 4 + c / 16 % 2 * 2 + r / 16 % 2) * kRegisterFloats +
           r % 16 * 16 + c % 16;
  }
  static int64_t KeySum(int64_t j, int64_t c, int64_t /*columns*/) {
    return ((c / 32 * 2 + j / 32) * 4 + j / 16 % 2 * 2 + c / 16 % 2) * kRegisterFloats +
           c % 16 * 16 + j % 16;
  }

  // The sums of a tile as rows, `stride` apart, in `rows`.
  TANDEM_ISA_INLINE static const float* QueryRows(const float* sums, int64_t columns, float* rows,
                                                  const int64_t* stride) {
    for (int64_t r = 0; r < core::kTile; ++r) {
      for (int64_t c = 0; c < columns; c += 16) {
        std::memcpy(rows + r * *stride + c, sums + QuerySum(r, c, columns), 16 * sizeof(float));
      }
    }
    return rows;
  }
  TANDEM_ISA_INLINE static const float* KeyRows(const float* sums, int64_t columns, float* rows,
                                                const int64_t* stride) {
    for (int64_t j = 0; j < core::kTile; j += 8) {
      for (int64_t c = 0; c < columns; c += 8) {
        Transpose8x8(sums + KeySum(j, c, columns), 16, rows + j * *stride + c, *stride);
      }
    }
    return rows;
  }

 private:
  // P and dS of a pair of tiles as operands, [part] in a form each.
  struct alignas(64) Factors {
    static constexpr int64_t kPart = FormHalves(2);
    uint16_t p[kParts * kPart];         // interleaved
    uint16_t ds[kParts * kPart];        // interleaved
    uint16_t ds_plain[kParts * kPart];  // plain
  };

  static constexpr int64_t kRowPair = 64;  // halves of one part of 32 keys of two rows
  static constexpr int64_t kQuadHalves = 2 * kRegisterHalves;
  static constexpr int kFactorProducts = ValueProducts(kParts);
  // Operands are multiplied in both directions: they must be finite, too.
  static constexpr core::DType kType =
      kParts == 1 ? core::DType::kBF16 : (kParts == 2 ? core::DType::kF16 : core::DType::kF32);
  static constexpr PartRange kRange = {OperandRange(kType).lowest, ValueRange(kType).end};

  // Which pairs of 16 rows, and of 16 keys, a pair of tiles touches.
  struct Quads {
    int64_t row_begin, row_end;
    int64_t key_begin, key_end;
  };
  TANDEM_ISA_INLINE static Quads QuadsOf(const TilePair& pair) {
    return {pair.row_begin / 32, core::CeilDiv<int64_t>(pair.row_end, 32), pair.key_begin / 32,
            core::CeilDiv<int64_t>(pair.key_end, 32)};
  }

  TANDEM_ISA_INLINE static const uint16_t* Halves(const float* operand) {
    return reinterpret_cast<const uint16_t*>(operand);
  }

  // A register of the quad before goes to *sums as late as can be (tiles/mixer.h); where this one's
  // belong is there in the end.
  template <int kC, int kA, int kB>
  TANDEM_ISA_INLINE void StartProduct(float* sums) {
    if (sums != nullptr) {
      tiles_.template Store<kC, core::kTile>(sums + kC % 2 * 16 * core::kTile + kC / 2 * 16);
    }
    tiles_.template Zero<kC>();
    tiles_.template Multiply<kC, kA, kB>();
  }
  TANDEM_ISA_INLINE void MultiplyRowsByKeys(const Quads& quads, const uint16_t* rows,
                                            const uint16_t* keys, int64_t dim, float* products,
                                            float** sums) {
    const int64_t steps = core::CeilDiv<int64_t>(dim, 32);
    const int64_t part = FormHalves(steps);
    const int count = ScoreProducts(kParts, dim);
    for (int64_t r = quads.row_begin; r < quads.row_end; ++r) {
      for (int64_t k = quads.key_begin; k < quads.key_end; ++k) {
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t row_step = (r * steps + step) * kQuadHalves;
          const int64_t key_step = (k * steps + step) * kQuadHalves;
          ForEachPair<kParts>(
              count, [&](const PartPair& parts, Operands loads, bool is_first)
                         __attribute__((always_inline)) {
                           LoadOperands(loads, rows + parts.a * part + row_step,
                                        keys + parts.b * part + key_step, &tiles_);
                           if (is_first && step == 0) {
                             StartProduct<0, 4, 6>(*sums);
                             StartProduct<1, 5, 6>(*sums);
                             StartProduct<2, 4, 7>(*sums);
                             StartProduct<3, 5, 7>(*sums);
                           } else {
                             MultiplyQuad(&tiles_);
                           }
                         });
        }
        *sums = products + r * 32 * core::kTile + k * 32;
      }
    }
  }

  // P and dS of rows r and r + 1, 32 keys, as operands.
  TANDEM_ISA_INLINE static void InterleaveRows(int64_t r, int64_t step, const uint16_t* p_rows,
                                               Factors* to) {
    const int64_t plain = PlainAt(r, step, 2), interleaved = InterleavedAt(r, step);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      InterleaveRowPair<Leaf>(p_rows + part * kRowPair,
                              to->p + part * Factors::kPart + interleaved);
      InterleaveRowPair<Leaf>(to->ds_plain + part * Factors::kPart + plain,
                              to->ds + part * Factors::kPart + interleaved);
    }
  }

  // What PlainFactors does, for P and dS that are complete; 0 in rows that the pair does not have.
  TANDEM_ISA_INLINE static void StoreFactors(const TilePair& pair, Factors* factors) {
    const Quads quads = QuadsOf(pair);
    PairScratch* scratch = pair.scratch;
    alignas(64) uint16_t p_rows[kParts * kRowPair];
    for (int64_t r = 32 * quads.row_begin; r < 32 * quads.row_end; ++r) {
      float* p = scratch->p + r * core::kTile;
      float* ds = scratch->ds + r * core::kTile;
      if (r < pair.row_begin || r >= pair.row_end) {
        std::memset(p, 0, 4 * core::kTile);
        std::memset(ds, 0, 4 * core::kTile);
      }
    }
    for (int64_t r = 32 * quads.row_begin; r < 32 * quads.row_end; r += 2) {
      for (int64_t step = quads.key_begin; step < quads.key_end; ++step) {
        for (int64_t t = 0; t < 2; ++t) {
          const int64_t at = (r + t) * core::kTile + 32 * step;
          StorePartsOf<Leaf, kParts>(scratch->p + at, p_rows + 32 * t, kRowPair);
          StorePartsOf<Leaf, kParts>(
              scratch->ds + at, factors->ds_plain + PlainAt(r, step, 2) + 32 * t, Factors::kPart);
        }
        InterleaveRows(r, step, p_rows, factors);
      }
    }
  }

  // P and dS of a plain pair, from S and dP to operands: work to be mixed with products. A row of
  // the work is 32 keys of two rows.
  template <bool kMasked>
  class PlainFactors {
   public:
    TANDEM_ISA_INLINE PlainFactors(const TilePair& pair, const Quads& quads, Factors* factors)
        : scratch_(pair.scratch),
          rows_(RowsOf(*pair.plane, pair.q_tile)),
          scale_(pair.plane->p->scale),
          factors_(factors),
          first_row_(32 * quads.row_begin),
          first_step_(quads.key_begin),
          second_step_(quads.key_end - quads.key_begin - 1),
          count_(16 * (quads.row_end - quads.row_begin) * (quads.key_end - quads.key_begin)) {}

    TANDEM_ISA_INLINE int64_t Rows() const { return count_; }
    TANDEM_ISA_INLINE void FirstHalf(int64_t n) { Evaluate(n, 0); }
    TANDEM_ISA_INLINE void SecondHalf(int64_t n) {
      Evaluate(n, 1);
      InterleaveRows(RowAt(n), StepAt(n), p_rows_, factors_);
    }

   private:
    // There are one or two steps of 32 keys: second_step_ is 0 or 1.
    TANDEM_ISA_INLINE int64_t RowAt(int64_t n) const {
      return first_row_ + 2 * (n >> second_step_);
    }
    TANDEM_ISA_INLINE int64_t StepAt(int64_t n) const { return first_step_ + (n & second_step_); }

    TANDEM_ISA_INLINE void Evaluate(int64_t n, int64_t t) {
      const int64_t r = RowAt(n), step = StepAt(n);
      const PlainRow<Arch, kMasked> row(scale_, rows_[r + t], scratch_->visible[r + t]);
      const float* s = scratch_->p + (r + t) * core::kTile + 32 * step;
      const float* dp = scratch_->ds + (r + t) * core::kTile + 32 * step;
      Vectors32<Leaf> p, ds;
#pragma GCC unroll 4
      for (int v = 0; v < 32 / kLanes<Arch>; ++v) {
        p[v] = Vector<Arch>::load_aligned(s + v * kLanes<Arch>);
        ds[v] = Vector<Arch>::load_aligned(dp + v * kLanes<Arch>);
        row.Evaluate(32 * step + v * kLanes<Arch>, &p[v], &ds[v]);
      }
      StoreParts<Leaf, kParts>(p, p_rows_ + 32 * t, kRowPair);
      StoreParts<Leaf, kParts>(ds, factors_->ds_plain + PlainAt(r, step, 2) + 32 * t,
                               Factors::kPart);
    }

    const PairScratch* const scratch_;
    const RowData* const rows_;
    const float scale_;
    Factors* const factors_;
    const int64_t first_row_, first_step_, second_step_, count_;
    alignas(64) uint16_t p_rows_[kParts * kRowPair];
  };

  // C += A B for pairs of 16 columns, and of 16 rows or keys. A and B are [part], with so many
  // halves from one pair of either kind to the next.
  struct Addition {
    const uint16_t *a, *b;
    int64_t a_part, a_column, a_pair;
    int64_t b_part, b_column, b_pair;
    float* c;
    int64_t column_pairs;
    int64_t pair_begin, pair_end;
    int64_t steps;
  };

  TANDEM_ISA_INLINE void SetPending(const TilePair& pair, const Factors* factors) {
    const PlaneLayout& w = *pair.plane->layout;
    const PairOperands at = OperandsOf(pair);
    const Quads quads = QuadsOf(pair);
    const int64_t qk = w.qk_columns / 32, v = w.v_columns / 32;
    // The second form of each follows all parts of the first.
    const uint16_t* q = Halves(at.q) + kParts * FormHalves(qk);
    const uint16_t* dout = Halves(at.dout) + kParts * FormHalves(v);
    const uint16_t* k = Halves(at.k) + kParts * FormHalves(qk);
    addition_count_ = 0;
    if (at.dv != nullptr) AddForKeys(quads, dout, v, factors->p, at.dv);
    if (at.dk != nullptr) AddForKeys(quads, q, qk, factors->ds, at.dk);
    if (at.dq == nullptr) return;
    const int64_t step = quads.key_begin * kQuadHalves;
    additions_[addition_count_++] = {factors->ds_plain + step,
                                     k + step,
                                     Factors::kPart,
                                     0,
                                     2 * kQuadHalves,
                                     FormHalves(qk),
                                     2 * kQuadHalves,
                                     0,
                                     at.dq,
                                     qk,
                                     quads.row_begin,
                                     quads.row_end,
                                     quads.key_end - quads.key_begin};
  }

  // rows: transposed. factors: interleaved.
  TANDEM_ISA_INLINE void AddForKeys(const Quads& quads, const uint16_t* rows, int64_t column_pairs,
                                    const uint16_t* factors, float* sums) {
    const int64_t step = quads.row_begin * kQuadHalves;
    additions_[addition_count_++] = {rows + step,
                                     factors + step,
                                     FormHalves(column_pairs),
                                     2 * kQuadHalves,
                                     0,
                                     Factors::kPart,
                                     0,
                                     2 * kQuadHalves,
                                     sums,
                                     column_pairs,
                                     quads.key_begin,
                                     quads.key_end,
                                     quads.row_end - quads.row_begin};
  }

  // The additions of the pair before, with work mixed in.
  template <class Work>
  __attribute__((noinline)) void AddPending(Work* work) {
    int64_t quads = 0;
    for (int n = 0; n < addition_count_; ++n) {
      const Addition& add = additions_[n];
      quads += add.column_pairs * (add.pair_end - add.pair_begin) * kFactorProducts * add.steps;
    }
    Mixer<Leaf, Work> mixer(&tiles_, work, quads);
    for (int n = 0; n < addition_count_; ++n) {
      const Addition& add = additions_[n];
      for (int64_t column = 0; column < add.column_pairs; ++column) {
        for (int64_t pair = add.pair_begin; pair < add.pair_end; ++pair) {
          float* c = add.c + (column * 2 + pair) * 4 * kRegisterFloats;
          for (int64_t step = 0; step < add.steps; ++step) {
            const uint16_t* a_step =
                add.a + column * add.a_column + pair * add.a_pair + step * kQuadHalves;
            const uint16_t* b_step =
                add.b + column * add.b_column + pair * add.b_pair + step * kQuadHalves;
            ForEachPair<kParts>(
                kFactorProducts, [&](const PartPair& parts, Operands loads, bool is_first)
                                     __attribute__((always_inline)) {
                                       const uint16_t* a = a_step + parts.a * add.a_part;
                                       const uint16_t* b = b_step + parts.b * add.b_part;
                                       if (is_first && step == 0) {
                                         mixer.NextQuad(a, b, c);
                                       } else {
                                         mixer.Quad(loads, a, b);
                                       }
                                     });
          }
        }
      }
    }
    mixer.Finish();
  }

  typename Leaf::Tiles tiles_;
  Factors* const factors_;  // of two pairs
  int next_factors_ = 0;
  Addition additions_[3];
  int addition_count_ = 0;
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_TILE_MULTIPLIER_H_
