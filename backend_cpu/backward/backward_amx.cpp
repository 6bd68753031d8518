#include "backend_cpu/backward/backward.h"
#include "backend_cpu/backward/backward_tiles.h"
#include "backend_cpu/tiles/amx_leaf.h"

namespace tandem::cpu {

tandem_status BackwardRunAmx(const core::Problem& problem, void* workspace,
                             const core::Context& context) {
  return RunBackwardTiles<AmxLeaf>(problem, workspace, context);
}

}  // namespace tandem::cpu
