/* tandem.h is C11: compiled with -std=c11 -pedantic-errors -Wall -Wextra -Wconversion -Werror. */
#include "tandem/tandem.h"

/* Every initialiser is a constant expression of its own struct. */
const tandem_tensor tensor = TANDEM_TENSOR_INIT;
const tandem_band_term band = TANDEM_BAND_TERM_INIT;
const tandem_row_ranges_term row_ranges = TANDEM_ROW_RANGES_TERM_INIT;
const tandem_lengths_term lengths = TANDEM_LENGTHS_TERM_INIT;
const tandem_packed_term packed = TANDEM_PACKED_TERM_INIT;
const tandem_segments_term segments = TANDEM_SEGMENTS_TERM_INIT;
const tandem_dense_term dense = TANDEM_DENSE_TERM_INIT;
const tandem_block_sparse_term block_sparse = TANDEM_BLOCK_SPARSE_TERM_INIT;
const tandem_problem problem = TANDEM_PROBLEM_INIT;
const tandem_outputs outputs = TANDEM_OUTPUTS_INIT;
const tandem_gradients gradients = TANDEM_GRADIENTS_INIT;
const tandem_executor executor = TANDEM_EXECUTOR_INIT;
const tandem_options options = TANDEM_OPTIONS_INIT;
const tandem_kv_cache_config kv_cache_config = TANDEM_KV_CACHE_CONFIG_INIT;

/* The layout that the ABI promises on 64-bit machines. */
_Static_assert(sizeof(tandem_tensor) == 112, "tandem_tensor");
_Static_assert(sizeof(tandem_band_term) == 48, "tandem_band_term");
