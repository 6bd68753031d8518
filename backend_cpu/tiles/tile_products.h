// The products of tiles, mixed at a fine grain with the softmax of another unit: while the tile
// unit works on one product, the vector unit works on a row.
//
// Scores are quads (quads.h) over the depth, O is quads over the keys; with parts, over the pairs
// of parts too, all of them for one step before the next.
#ifndef TANDEM_BACKEND_CPU_TILES_TILE_PRODUCTS_H_
#define TANDEM_BACKEND_CPU_TILES_TILE_PRODUCTS_H_

#include "backend_cpu/tiles/mixer.h"
#include "backend_cpu/tiles/tile_softmax.h"

namespace tandem::cpu {
namespace {

// The scores of `next` and O += P V of `previous` (either may be null), with the softmax of a unit
// between them mixed in.
template <class Leaf, int kParts, class Softmax>
TANDEM_ISA_INLINE void Step(const TileShape& shape, int score_products, const Unit* next,
                            const Unit* previous, typename Leaf::Tiles* tiles, Softmax softmax) {
  constexpr int kValueProducts = ValueProducts(kParts);
  const int64_t q_part = shape.depth_steps * 2 * kRegisterHalves;
  int64_t quads = 0;
  if (next != nullptr) quads += 2 * score_products * shape.depth_steps;
  if (previous != nullptr) quads += shape.column_pairs * kValueProducts * kUnitSteps;
  Mixer<Leaf, Softmax, true> mixer(tiles, &softmax, quads);
  if (next != nullptr) {
    for (int pair = 0; pair < 2; ++pair) {
      const uint16_t* k = next->tile.k + pair * shape.k_part / 2;
      float* sums = next->scores + pair * 4 * kRegisterFloats;
      for (int64_t step = 0; step < shape.depth_steps; ++step) {
        ForEachPair<kParts>(
            score_products, [&](const PartPair& parts, Operands loads,
                                bool is_first) __attribute__((always_inline)) {
              const uint16_t* a = next->block->q + parts.a * q_part + step * 2 * kRegisterHalves;
              const uint16_t* b = k + parts.b * shape.k_part + step * 2 * kRegisterHalves;
              if (is_first && step == 0) {
                mixer.FirstQuad(a, b, sums);
              } else {
                mixer.Quad(loads, a, b);
              }
            });
      }
    }
  }
  if (previous != nullptr) {
    for (int64_t pair = 0; pair < shape.column_pairs; ++pair) {
      float* sums = previous->block->o + pair * 4 * kRegisterFloats;
      const uint16_t* v = previous->tile.v + pair * 4 * kRegisterHalves;
#pragma GCC unroll 2
      for (int step = 0; step < kUnitSteps; ++step) {
        ForEachPair<kParts>(
            kValueProducts, [&](const PartPair& parts, Operands loads,
                                bool is_first) __attribute__((always_inline)) {
              const uint16_t* a = previous->p + parts.a * kProbabilityPartStride +
                                  step * ProbabilityStepStride(kParts);
              const uint16_t* b = v + parts.b * shape.v_part + step * 2 * kRegisterHalves;
              if (is_first && step == 0) {
                mixer.NextQuad(a, b, sums);
              } else {
                mixer.Quad(loads, a, b);
              }
            });
      }
    }
  }
  mixer.Finish();
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_PRODUCTS_H_
