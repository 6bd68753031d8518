#include "core/validate_cache.h"

#include "core/kv_cache.h"

namespace tandem::core {

bool TakeCache(const tandem_problem& input, bool has_gradients, Checker* check,
               CachedTensors* tensors, Problem* p) {
  const struct {
    const char* name;
    bool is_given;
  } excluded[] = {{"k", input.k != nullptr},
                  {"v", input.v != nullptr},
                  {"block_table", input.block_table != nullptr},
                  {"mask_plan", input.mask_plan != nullptr},
                  {"kv_offset", input.kv_offset != 0},
                  {"global_kv_len", input.global_kv_len != 0}};
  for (const auto& argument : excluded) {
    if (argument.is_given) {
      return check->Fail("%s is given, must be null or 0 with a kv_cache", argument.name);
    }
  }
  const tandem_tensor& q = *input.q;
  if (p->layout == Layout::kTHD) {
    return check->Fail("kv_cache is given, must be null with layout THD");
  }
  if (has_gradients) {
    return check->Fail("kv_cache is given, must be null where gradients are computed");
  }
  if (q.device_type != TANDEM_DEVICE_CPU) {
    return check->Fail("kv_cache is in host memory, must be null where q is on a CUDA device");
  }
  const tandem_kv_cache_config& config = input.kv_cache->config;
  const struct {
    const char* what;
    int64_t cached, asked;
  } pairs[] = {{"dtype", config.dtype, q.dtype},
               {"batch", config.batch, q.shape[0]},
               {"head dimension", config.qk_dim, q.shape[3]}};
  for (const auto& pair : pairs) {
    if (pair.cached != pair.asked) {
      return check->Fail("kv_cache: its %s is %lld, must be that of q, %lld", pair.what,
                         static_cast<long long>(pair.cached), static_cast<long long>(pair.asked));
    }
  }
  const int64_t heads = q.shape[p->layout == Layout::kBHSD ? 1 : 2];
  if (heads % config.kv_heads != 0) {
    return check->Fail("kv_cache: it has %lld heads, must divide the %lld heads of q",
                       static_cast<long long>(config.kv_heads), static_cast<long long>(heads));
  }
  tensors->k = CacheTensor(*input.kv_cache, input.layout, false);
  tensors->v = CacheTensor(*input.kv_cache, input.layout, true);
  p->has_kv_cache = 1;
  p->kv_lengths = {input.kv_cache->lengths, DType::kI32, 0, 1};
  return true;
}

bool CachedLengths(const tandem_problem& input, Checker* check, const Problem& p) {
  if (!p.has_kv_cache) return true;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = LoadIndex(p.kv_lengths, b);
    if (length > input.kv_cache->lengths[b]) {
      return check->Fail("kv_lengths[%lld] is %lld, must be at most the %d keys in kv_cache",
                         static_cast<long long>(b), static_cast<long long>(length),
                         input.kv_cache->lengths[b]);
    }
  }
  return true;
}

}  // namespace tandem::core
