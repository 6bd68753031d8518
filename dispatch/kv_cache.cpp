// Key and value caches: their memory, appending, truncating.
#include "core/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "backend_cpu/parallel.h"
#include "core/backend.h"
#include "core/tensor_check.h"
#include "dispatch/error.h"

namespace tandem::dispatch {
namespace {

using core::DType;

// A smaller append is done before other threads have begun.
constexpr int64_t kParallelBytes = 256 << 10;

// Where the parts of a cache are in its memory, in bytes.
struct CacheLayout {
  int64_t v_offset;
  int64_t lengths_offset;
  int64_t size;
};

bool Multiply(std::initializer_list<int64_t> factors, int64_t* product) {
  *product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(*product, factor, product)) return false;
  }
  return *product < INT64_MAX / 8;
}

tandem_status CheckConfig(const tandem_kv_cache_config* config, CacheLayout* layout) {
  if (config == nullptr || config->struct_size != sizeof(tandem_kv_cache_config)) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "config is %s, must point to a tandem_kv_cache_config (use "
                "TANDEM_KV_CACHE_CONFIG_INIT)",
                config == nullptr ? "null" : "of another size");
  }
  if (config->dtype != TANDEM_DTYPE_F32 && config->dtype != TANDEM_DTYPE_F16 &&
      config->dtype != TANDEM_DTYPE_BF16) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "config: dtype is %d, must be TANDEM_DTYPE_F32 (1), F16 (2) or BF16 (3)",
                config->dtype);
  }
  const struct {
    const char* name;
    int64_t value, most;
  } sizes[] = {
      {"batch", config->batch, (int64_t{1} << 31) - 1},
      {"kv_heads", config->kv_heads, int64_t{1} << 24},
      {"capacity", config->capacity, (int64_t{1} << 31) - 65},
      {"qk_dim", config->qk_dim, int64_t{1} << 16},
      {"v_dim", config->v_dim, int64_t{1} << 16},
  };
  for (const auto& size : sizes) {
    if (size.value < 1 || size.value > size.most) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "config: %s is %lld, must be in [1, %lld]",
                  size.name, static_cast<long long>(size.value), static_cast<long long>(size.most));
    }
  }
  const DType dtype = static_cast<DType>(config->dtype);
  int64_t k_size = 0, v_size = 0;
  for (const auto& [dim, bytes] : {std::pair(config->qk_dim, &k_size), {config->v_dim, &v_size}}) {
    if (!Multiply({config->batch, config->kv_heads, config->capacity,
                   core::CacheRowStride(dim, dtype), core::ElementSize(dtype)},
                  bytes)) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                  "config: capacity is %lld, and the cache would have more than 2^60 bytes",
                  static_cast<long long>(config->capacity));
    }
  }
  layout->v_offset = core::RoundUp<int64_t>(k_size, core::kBufferAlignment);
  layout->lengths_offset =
      core::RoundUp<int64_t>(layout->v_offset + v_size, core::kBufferAlignment);
  layout->size = core::RoundUp<int64_t>(
      layout->lengths_offset + config->batch * int64_t{sizeof(int32_t)}, core::kBufferAlignment);
  return TANDEM_STATUS_OK;
}

int32_t LengthAt(const tandem_tensor& lengths, int64_t b) {
  return static_cast<const int32_t*>(lengths.data)[b * lengths.strides[0]];
}

// lengths[b] in [0, limit(b)]; true where all are.
template <typename Limit>
bool CheckLengths(const tandem_tensor* lengths, int64_t batch, core::Checker* check, Limit limit) {
  if (!check->Tensor("lengths", lengths, {TANDEM_DTYPE_I32}, {1}) ||
      !check->Dimension("lengths", *lengths, 0, batch, "the batch of the cache")) {
    return false;
  }
  if (lengths->device_type != TANDEM_DEVICE_CPU) {
    return check->Fail("lengths is on a CUDA device, must be in host memory");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t value = LengthAt(*lengths, b);
    if (value < 0 || value > limit(b)) {
      return check->Fail("lengths[%lld] is %d, must be in [0, %lld]", static_cast<long long>(b),
                         value, static_cast<long long>(limit(b)));
    }
  }
  return true;
}

// k or v of an append: its shape is [batch, heads, n, dim] in the layout's order.
bool CheckRows(const char* name, const tandem_tensor* rows, const tandem_kv_cache_config& config,
               tandem_layout layout, int64_t dim, core::Checker* check) {
  if (!check->Tensor(name, rows, {config.dtype}, {4})) return false;
  if (rows->device_type != TANDEM_DEVICE_CPU) {
    return check->Fail("%s is on a CUDA device, must be in host memory", name);
  }
  const int head = layout == TANDEM_LAYOUT_BHSD ? 1 : 2;
  return check->Dimension(name, *rows, 0, config.batch, "the batch of the cache") &&
         check->Dimension(name, *rows, head, config.kv_heads, "the heads of the cache") &&
         check->Dimension(name, *rows, 3, dim, "the head dimension of the cache");
}

// Appends rows [0, count) of one sequence and head to the cache's.
void CopyRows(const tandem_tensor& from, int64_t from_row, const char* from_data,
              const tandem_tensor& to, int64_t to_row, char* to_data, int64_t count) {
  const int64_t size = core::ElementSize(static_cast<DType>(from.dtype));
  const int64_t dim = from.shape[3];
  for (int64_t n = 0; n < count; ++n) {
    const char* source = from_data + n * from_row * size;
    char* target = to_data + n * to_row * size;
    if (from.strides[3] == 1) {
      std::memcpy(target, source, static_cast<size_t>(dim * size));
      continue;
    }
    for (int64_t d = 0; d < dim; ++d) {
      std::memcpy(target + d * to.strides[3] * size, source + d * from.strides[3] * size,
                  static_cast<size_t>(size));
    }
  }
}

// Appends `count` rows to head h of sequence b, whose length stays as it is.
void AppendRows(const tandem_kv_cache& cache, tandem_layout layout, const tandem_tensor& from,
                bool values, int64_t b, int64_t h, int64_t count) {
  if (count == 0) return;  // an array without elements may have no address
  const tandem_tensor to = core::CacheTensor(cache, layout, values);
  const int64_t size = core::ElementSize(static_cast<DType>(from.dtype));
  const int head = layout == TANDEM_LAYOUT_BHSD ? 1 : 2;
  const int row = 3 - head;
  const char* source =
      static_cast<const char*>(from.data) + (b * from.strides[0] + h * from.strides[head]) * size;
  char* target =
      static_cast<char*>(to.data) +
      (b * to.strides[0] + h * to.strides[head] + cache.lengths[b] * to.strides[row]) * size;
  CopyRows(from, from.strides[row], source, to, to.strides[row], target, count);
}

tandem_status Append(tandem_kv_cache* cache, tandem_layout layout, const tandem_tensor* k,
                     const tandem_tensor* v, const tandem_tensor* lengths) {
  if (cache == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "cache is null, must be a cache");
  }
  if (layout != TANDEM_LAYOUT_BHSD && layout != TANDEM_LAYOUT_BSHD) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "layout is %d, must be TANDEM_LAYOUT_BHSD (1) or BSHD (2)", layout);
  }
  const tandem_kv_cache_config& config = cache->config;
  core::Checker check(&LastError());
  if (!CheckRows("k", k, config, layout, config.qk_dim, &check) ||
      !CheckRows("v", v, config, layout, config.v_dim, &check)) {
    return TANDEM_STATUS_INVALID_ARGUMENT;
  }
  const int row = layout == TANDEM_LAYOUT_BHSD ? 2 : 1;
  const int64_t rows = k->shape[row];
  if (!check.Dimension("v", *v, row, rows, "the rows of k") ||
      (lengths != nullptr &&
       !CheckLengths(lengths, config.batch, &check, [rows](int64_t) { return rows; }))) {
    return TANDEM_STATUS_INVALID_ARGUMENT;
  }
  const auto count = [&](int64_t b) { return lengths == nullptr ? rows : LengthAt(*lengths, b); };
  for (int64_t b = 0; b < config.batch; ++b) {
    if (count(b) > config.capacity - cache->lengths[b]) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                  "%s is %lld for sequence %lld, must be at most %lld: the cache holds %d of %lld "
                  "keys",
                  lengths == nullptr ? "the number of rows of k" : "lengths",
                  static_cast<long long>(count(b)), static_cast<long long>(b),
                  static_cast<long long>(config.capacity - cache->lengths[b]), cache->lengths[b],
                  static_cast<long long>(config.capacity));
    }
  }
  int64_t all_rows = 0;
  for (int64_t b = 0; b < config.batch; ++b) all_rows += count(b);
  auto append = [&](int64_t index, int) {
    const int64_t b = index / config.kv_heads, h = index % config.kv_heads;
    AppendRows(*cache, layout, *k, false, b, h, count(b));
    AppendRows(*cache, layout, *v, true, b, h, count(b));
  };
  const int64_t bytes = all_rows * config.kv_heads * (config.qk_dim + config.v_dim) *
                        core::ElementSize(static_cast<DType>(config.dtype));
  core::Context context = {};
  context.threads = bytes < kParallelBytes ? 1 : 0;
  cpu::ParallelForEach(context, config.batch * config.kv_heads, append);
  for (int64_t b = 0; b < config.batch; ++b) cache->lengths[b] += static_cast<int32_t>(count(b));
  return TANDEM_STATUS_OK;
}

tandem_status Truncate(tandem_kv_cache* cache, const tandem_tensor* lengths) {
  if (cache == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "cache is null, must be a cache");
  }
  const int64_t batch = cache->config.batch;
  core::Checker check(&LastError());
  if (lengths != nullptr &&
      !CheckLengths(lengths, batch, &check, [cache](int64_t b) { return cache->lengths[b]; })) {
    return TANDEM_STATUS_INVALID_ARGUMENT;
  }
  for (int64_t b = 0; b < batch; ++b) {
    cache->lengths[b] = lengths == nullptr ? 0 : LengthAt(*lengths, b);
  }
  return TANDEM_STATUS_OK;
}

tandem_status Create(const tandem_kv_cache_config* config, void* memory, size_t size,
                     tandem_kv_cache** cache) {
  CacheLayout layout;
  const tandem_status status = CheckConfig(config, &layout);
  if (status != TANDEM_STATUS_OK) return status;
  if (cache == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "cache is null, must point to a tandem_kv_cache*");
  }
  if (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % core::kBufferAlignment != 0) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "memory is %p, must be host memory aligned to %lld bytes", memory,
                static_cast<long long>(core::kBufferAlignment));
  }
  if (size < static_cast<size_t>(layout.size)) {
    return Fail(TANDEM_STATUS_WORKSPACE_TOO_SMALL, "size is %zu, must be at least %lld", size,
                static_cast<long long>(layout.size));
  }
  char* base = static_cast<char*>(memory);
  auto made = std::make_unique<tandem_kv_cache>();
  made->config = *config;
  made->k = base;
  made->v = base + layout.v_offset;
  made->lengths = reinterpret_cast<int32_t*>(base + layout.lengths_offset);
  std::fill_n(made->lengths, config->batch, 0);
  *cache = made.release();
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::dispatch

using namespace tandem::dispatch;  // NOLINT: entry points below

extern "C" {

tandem_status tandem_kv_cache_size(const tandem_kv_cache_config* config, size_t* size) {
  return Guard([&]() -> tandem_status {
    CacheLayout layout;
    const tandem_status status = CheckConfig(config, &layout);
    if (status != TANDEM_STATUS_OK) return status;
    if (size == nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "size is null, must point to a size_t");
    }
    *size = static_cast<size_t>(layout.size);
    return TANDEM_STATUS_OK;
  });
}

tandem_status tandem_kv_cache_create(const tandem_kv_cache_config* config, void* memory,
                                     size_t size, tandem_kv_cache** cache) {
  return Guard([&] { return Create(config, memory, size, cache); });
}

void tandem_kv_cache_destroy(tandem_kv_cache* cache) { delete cache; }

tandem_status tandem_kv_cache_append(tandem_kv_cache* cache, tandem_layout layout,
                                     const tandem_tensor* k, const tandem_tensor* v,
                                     const tandem_tensor* lengths) {
  return Guard([&] { return Append(cache, layout, k, v, lengths); });
}

tandem_status tandem_kv_cache_truncate(tandem_kv_cache* cache, const tandem_tensor* lengths) {
  return Guard([&] { return Truncate(cache, lengths); });
}

tandem_status tandem_kv_cache_lengths(const tandem_kv_cache* cache, int32_t* lengths) {
  return Guard([&]() -> tandem_status {
    if (cache == nullptr || lengths == nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "%s is null, must point to %s",
                  cache == nullptr ? "cache" : "lengths",
                  cache == nullptr ? "a cache" : "one int32_t per sequence");
    }
    std::copy_n(cache->lengths, cache->config.batch, lengths);
    return TANDEM_STATUS_OK;
  });
}

}  // extern "C"
