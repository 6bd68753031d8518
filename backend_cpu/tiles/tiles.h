// flash_cpu on matrix tiles: attention forward by products of 16 x 16 tiles with bf16 operands and
// f32 sums, as AMX computes them. bf16 tensors are multiplied as they are; f16 and f32 elements are
// split into two or three bf16 parts, and the products of the larger parts are summed
// (docs/decisions/0008-attention-on-matrix-tiles.md).
//
// The algorithm is written once (tile_forward.h) over a leaf that has the tiles: amx_leaf.h, or
// emulated_leaf.h, which computes the same products in AVX2, so that every machine tests it.
//
// This header is safe in baseline files; what it declares may only be called where the machine has
// the instruction set.
#ifndef TANDEM_BACKEND_CPU_TILES_TILES_H_
#define TANDEM_BACKEND_CPU_TILES_TILES_H_

#include "core/backend.h"

namespace tandem::cpu {

// Bytes of workspace; no data is read.
int64_t TilesWorkspace(const core::Problem& problem);

// Run a problem that FlashDecline (flash/flash.h) lets through, for any of the three dtypes.
// workspace: as many bytes as above, aligned to kBufferAlignment. Out of memory (scratch of a
// thread): OUT_OF_MEMORY and a message; some outputs are written then.
tandem_status TilesRunAmx(const core::Problem& problem, void* workspace,
                          const core::Context& context);
tandem_status TilesRunEmulated(const core::Problem& problem, void* workspace,
                               const core::Context& context);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_TILES_H_
