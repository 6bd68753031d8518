// The products of tiles, mixed at a fine grain with the softmax of another unit: while the tile
// unit works on one product, the vector unit works on half a row.
//
// Scores are quads (quads.h) over the depth, O is quads over the keys; with parts, over the pairs
// of parts too, the smallest products first.
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
  constexpr int64_t kPPart = kUnitSteps * kProbabilityStepStride;
  const int64_t q_part = shape.depth_steps * 2 * kRegisterHalves;
  int64_t quads = 0;
  if (next != nullptr) quads += 2 * next->tiles * score_products * shape.depth_steps;
  if (previous != nullptr) quads += shape.column_pairs * kValueProducts * 2 * previous->tiles;
  Mixer<Leaf, Softmax> mixer(tiles, &softmax, quads);
  if (next != nullptr) {
    for (int pair = 0; pair < 2 * next->tiles; ++pair) {
      const uint16_t* k = next->tile[pair / 2].k + pair % 2 * shape.k_part / 2;
      ZeroQuad(tiles);
      for (int n = score_products - 1; n >= 0; --n) {
        const uint16_t* a = next->block->q + kPartPairs[n].a * q_part;
        const uint16_t* b = k + kPartPairs[n].b * shape.k_part;
        for (int64_t step = 0; step < shape.depth_steps; ++step) {
          mixer.Quad(a, b);
          a += 2 * kRegisterHalves;
          b += 2 * kRegisterHalves;
        }
      }
      StoreQuad(next->scores + pair * 4 * kRegisterFloats, tiles);
    }
  }
  if (previous != nullptr) {
    for (int64_t pair = 0; pair < shape.column_pairs; ++pair) {
      float* o = previous->block->o + pair * 4 * kRegisterFloats;
      LoadQuad(o, tiles);
      for (int n = kValueProducts - 1; n >= 0; --n) {
        const uint16_t* a = previous->p + kPartPairs[n].a * kPPart;
        const int64_t b = kPartPairs[n].b * shape.v_part + pair * 4 * kRegisterHalves;
        for (int step = 0; step < 2 * previous->tiles; ++step) {
          mixer.Quad(a, previous->tile[step / 2].v + b + step % 2 * 2 * kRegisterHalves);
          a += 2 * kRegisterHalves;
        }
      }
      StoreQuad(o, tiles);
    }
  }
  mixer.Finish();
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILE_PRODUCTS_H_
