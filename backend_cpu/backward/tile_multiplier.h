// The products of a pair of tiles by matrix tiles (tiles/), with operands of bf16 parts in the
// forms of tile_forms.h. Q and dO are packed plain and, transposed, by rows; K by columns and
// interleaved; V by columns. P and dS are rounded to as many parts.
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
  static constexpr int64_t kKeys = 32;

  static TileSizes Sizes(const core::Problem& p) { return MatrixTileSizes(p, kParts); }
  // Of packing, two forms of a tile; of the products, P and both forms of dS.
  static int64_t ScratchBytes(const core::Problem& p) {
    const int64_t steps = core::CeilDiv<int64_t>(core::Max(p.qk_dim, p.v_dim), 32);
    return 2 * kParts * core::Max(2 * FormHalves(steps), 3 * kPart + kRowPair);
  }

  TANDEM_ISA_INLINE explicit TileMultiplier(void* scratch)
      : p_(static_cast<uint16_t*>(scratch)),
        ds_(p_ + kParts * kPart),
        ds_plain_(ds_ + kParts * kPart),
        row_pair_(ds_plain_ + kParts * kPart) {}

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
    MultiplyRowsByKeys(quads, Halves(at.q), Halves(at.k), p.qk_dim, pair.scratch->p);
    MultiplyRowsByKeys(quads, Halves(at.dout), Halves(at.v), p.v_dim, pair.scratch->ds);
  }

  // dV^T += dO^T P, dK^T += Q^T dS, dQ += dS K.
  TANDEM_ISA_INLINE void AddProducts(const TilePair& pair) {
    const PlaneLayout& w = *pair.plane->layout;
    const PairOperands at = OperandsOf(pair);
    const Quads quads = QuadsOf(pair);
    StoreFactors(pair, quads);
    const int64_t qk_steps = w.qk_columns / 32, v_steps = w.v_columns / 32;
    if (at.dv != nullptr) {
      AddToKeys(quads, Halves(at.dout) + kParts * FormHalves(v_steps), v_steps, p_, at.dv);
    }
    if (at.dk != nullptr) {
      AddToKeys(quads, Halves(at.q) + kParts * FormHalves(qk_steps), qk_steps, ds_, at.dk);
    }
    if (at.dq != nullptr) {
      AddToRows(quads, ds_plain_, Halves(at.k) + kParts * FormHalves(qk_steps), qk_steps, at.dq);
    }
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
  // One part of a form of P or dS, and of a pair of its rows.
  static constexpr int64_t kPart = FormHalves(2);
  static constexpr int64_t kRowPair = 64;
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

  TANDEM_ISA_INLINE void Multiply(const uint16_t* a, const uint16_t* b, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      LoadOperands(a + step * kQuadHalves, b + step * kQuadHalves, &tiles_);
      MultiplyQuad(&tiles_);
    }
  }

  TANDEM_ISA_INLINE void MultiplyRowsByKeys(const Quads& quads, const uint16_t* rows,
                                            const uint16_t* keys, int64_t dim, float* products) {
    const int64_t steps = core::CeilDiv<int64_t>(dim, 32);
    const int64_t part = FormHalves(steps);
    const int count = ScoreProducts(kParts, dim);
    for (int64_t r = quads.row_begin; r < quads.row_end; ++r) {
      for (int64_t k = quads.key_begin; k < quads.key_end; ++k) {
        ZeroQuad(&tiles_);
        for (int n = count - 1; n >= 0; --n) {
          Multiply(rows + kPartPairs[n].a * part + r * steps * kQuadHalves,
                   keys + kPartPairs[n].b * part + k * steps * kQuadHalves, steps);
        }
        StoreQuadRows<core::kTile>(products + r * 32 * core::kTile + k * 32, &tiles_);
      }
    }
  }

  // P and dS as operands; 0 in rows that the pair does not have.
  TANDEM_ISA_INLINE void StoreFactors(const TilePair& pair, const Quads& quads) {
    PairScratch* scratch = pair.scratch;
    for (int64_t r = 32 * quads.row_begin; r < 32 * quads.row_end; ++r) {
      if (r >= pair.row_begin && r < pair.row_end) continue;
      std::memset(scratch->p + r * core::kTile, 0, 4 * core::kTile);
      std::memset(scratch->ds + r * core::kTile, 0, 4 * core::kTile);
    }
    for (int64_t r = 32 * quads.row_begin; r < 32 * quads.row_end; r += 2) {
      for (int64_t step = quads.key_begin; step < quads.key_end; ++step) {
        const float* p = scratch->p + r * core::kTile + 32 * step;
        const float* ds = scratch->ds + r * core::kTile + 32 * step;
        const int64_t to = InterleavedAt(r, step);
        StoreRowPair<Leaf, kParts>(p, p + core::kTile, row_pair_, kRowPair, p_ + to, kPart);
        StoreRowPair<Leaf, kParts>(ds, ds + core::kTile, ds_plain_ + PlainAt(r, step, 2), kPart,
                                   ds_ + to, kPart);
      }
    }
  }

  // rows: transposed. factors: interleaved.
  TANDEM_ISA_INLINE void AddToKeys(const Quads& quads, const uint16_t* rows, int64_t column_pairs,
                                   const uint16_t* factors, float* sums) {
    const int64_t steps = quads.row_end - quads.row_begin;
    for (int64_t c = 0; c < column_pairs; ++c) {
      for (int64_t k = quads.key_begin; k < quads.key_end; ++k) {
        float* to = sums + (c * 2 + k) * 4 * kRegisterFloats;
        LoadQuad(to, &tiles_);
        for (int n = kFactorProducts - 1; n >= 0; --n) {
          Multiply(rows + kPartPairs[n].a * FormHalves(column_pairs) +
                       (c * 2 + quads.row_begin) * kQuadHalves,
                   factors + kPartPairs[n].b * kPart + (k * 2 + quads.row_begin) * kQuadHalves,
                   steps);
        }
        StoreQuad(to, &tiles_);
      }
    }
  }

  // factors: plain. keys: interleaved.
  TANDEM_ISA_INLINE void AddToRows(const Quads& quads, const uint16_t* factors,
                                   const uint16_t* keys, int64_t column_pairs, float* sums) {
    const int64_t steps = quads.key_end - quads.key_begin;
    for (int64_t c = 0; c < column_pairs; ++c) {
      for (int64_t r = quads.row_begin; r < quads.row_end; ++r) {
        float* to = sums + (c * 2 + r) * 4 * kRegisterFloats;
        LoadQuad(to, &tiles_);
        for (int n = kFactorProducts - 1; n >= 0; --n) {
          Multiply(factors + kPartPairs[n].a * kPart + (r * 2 + quads.key_begin) * kQuadHalves,
                   keys + kPartPairs[n].b * FormHalves(column_pairs) +
                       (c * 2 + quads.key_begin) * kQuadHalves,
                   steps);
        }
        StoreQuad(to, &tiles_);
      }
    }
  }

  typename Leaf::Tiles tiles_;
  uint16_t* const p_;         // interleaved
  uint16_t* const ds_;        // interleaved
  uint16_t* const ds_plain_;  // plain
  uint16_t* const row_pair_;
};

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_TILE_MULTIPLIER_H_
