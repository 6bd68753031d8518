#include "backend_cpu/backward/backward.h"
#include "backend_cpu/backward/backward_tiles.h"
#include "backend_cpu/tiles/emulated_leaf.h"

namespace tandem::cpu {

int64_t BackwardWorkspaceTiles(const core::Problem& problem) {
  return LayOutPlanes(problem, MatrixTileSizes(problem, GradientParts(problem))).bytes;
}

tandem_status BackwardRunEmulated(const core::Problem& problem, void* workspace,
                                  const core::Context& context) {
  return RunBackwardTiles<EmulatedLeaf>(problem, workspace, context);
}

}  // namespace tandem::cpu
