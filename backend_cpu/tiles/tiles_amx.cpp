#include "backend_cpu/tiles/amx_leaf.h"
#include "backend_cpu/tiles/tile_forward.h"

namespace tandem::cpu {

tandem_status TilesRunAmx(const core::Problem& problem, void* workspace,
                          const core::Context& context) {
  return RunTiles<AmxLeaf>(problem, workspace, context);
}

}  // namespace tandem::cpu
