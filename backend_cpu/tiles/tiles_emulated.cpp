#include "backend_cpu/tiles/emulated_leaf.h"
#include "backend_cpu/tiles/tile_forward.h"

namespace tandem::cpu {

int64_t TilesWorkspace(const core::Problem& problem) {
  return LayOutTileWorkspace(problem, ShapeOf(problem)).size;
}

tandem_status TilesRunEmulated(const core::Problem& problem, void* workspace,
                               const core::Context& context) {
  return RunTiles<EmulatedLeaf>(problem, workspace, context);
}

}  // namespace tandem::cpu
