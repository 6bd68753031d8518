// What a key and value cache is: arrays of [sequence][key head][capacity rows] in the caller's
// memory, and how many rows of each sequence are there. Rows are padded to whole vectors.
#ifndef TANDEM_CORE_KV_CACHE_H_
#define TANDEM_CORE_KV_CACHE_H_

#include <cstdint>

#include "core/element.h"
#include "tandem/tandem.h"

struct tandem_kv_cache {
  tandem_kv_cache_config config;
  char* k;
  char* v;
  int32_t* lengths;
};

namespace tandem::core {

// Elements from one row of a cache to the next.
inline int64_t CacheRowStride(int64_t dim, DType dtype) {
  return RoundUp<int64_t>(dim, 32 / ElementSize(dtype));
}

// The keys or values of a cache as a tensor of this layout (BHSD or BSHD).
inline tandem_tensor CacheTensor(const tandem_kv_cache& cache, tandem_layout layout, bool values) {
  const tandem_kv_cache_config& c = cache.config;
  const int64_t dim = values ? c.v_dim : c.qk_dim;
  const int64_t row = CacheRowStride(dim, static_cast<DType>(c.dtype));
  tandem_tensor t = TANDEM_TENSOR_INIT;
  t.dtype = c.dtype;
  t.device_type = TANDEM_DEVICE_CPU;
  t.rank = 4;
  t.data = values ? cache.v : cache.k;
  const int head = layout == TANDEM_LAYOUT_BHSD ? 1 : 2;
  t.shape[0] = c.batch;
  t.shape[head] = c.kv_heads;
  t.shape[3 - head] = c.capacity;
  t.shape[3] = dim;
  t.strides[0] = c.kv_heads * c.capacity * row;
  t.strides[head] = c.capacity * row;
  t.strides[3 - head] = row;
  t.strides[3] = 1;
  return t;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_KV_CACHE_H_
