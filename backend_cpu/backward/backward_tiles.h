// flash_cpu_backward on matrix tiles, with as many bf16 parts as the tensors need.
#ifndef TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_TILES_H_
#define TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_TILES_H_

#include "backend_cpu/backward/flash_backward.h"
#include "backend_cpu/backward/tile_multiplier.h"

namespace tandem::cpu {
namespace {

template <class Leaf>
tandem_status RunBackwardTiles(const core::Problem& p, void* workspace,
                               const core::Context& context) {
  const int parts = GradientParts(p);
  if (parts == 1) return RunBackward<TileMultiplier<Leaf, 1>>(p, workspace, context);
  if (parts == 2) return RunBackward<TileMultiplier<Leaf, 2>>(p, workspace, context);
  return RunBackward<TileMultiplier<Leaf, 3>>(p, workspace, context);
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_BACKWARD_BACKWARD_TILES_H_
