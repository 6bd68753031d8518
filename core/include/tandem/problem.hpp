// Problems and mask plans of the C++ interface; include tandem/tandem.hpp, which includes this.
#ifndef TANDEM_PROBLEM_HPP_
#define TANDEM_PROBLEM_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tandem/mask.hpp"
#include "tandem/tensor.hpp"

namespace tandem {

class KvCache;
class MaskPlan;

// One attention problem. Everything after v is optional and has the meaning that it has in
// tandem_problem.
struct Problem {
  Problem(Layout the_layout, const Tensor& queries, const Tensor& keys, const Tensor& values)
      : layout(the_layout), q(queries), k(keys), v(values) {}
  // Keys and values in a cache, which must outlive the calls that use the problem. kBHSD or kBSHD.
  Problem(Layout the_layout, const Tensor& queries, const KvCache& cache)
      : layout(the_layout),
        q(queries),
        k(nullptr, DType::kF32, Tensor::Extents()),
        v(k),
        kv_cache(&cache) {}

  Layout layout;
  Tensor q, k, v;              // one dtype: kF32, kF16 or kBF16; k, v unused with a kv_cache
  std::optional<float> scale;  // none: 1 / sqrt(Dqk)
  float softcap = 0;           // > 0: s = softcap * tanh(s / softcap)
  Mask mask;                   // empty where mask_plan is given
  const MaskPlan* mask_plan = nullptr;
  std::optional<Tensor> bias;          // broadcastable like a dense mask; -inf hides the pair
  std::optional<Tensor> alibi_slopes;  // f32 [Hq] or [B, Hq]
  Alignment alibi_alignment = Alignment::kUnset;  // required with alibi_slopes
  float dropout_rate = 0;                         // in [0, 1)
  uint64_t dropout_seed = 0, dropout_offset = 0;
  std::optional<Tensor> sink;           // f32 [Hq]
  int64_t q_offset = 0, kv_offset = 0;  // of this shard in a larger problem
  int64_t global_q_len = 0, global_kv_len = 0;
  std::optional<Tensor> block_table;  // i32 [B, pages per sequence]
  int64_t page_size = 0;
  int32_t* device_status = nullptr;  // device memory, TANDEM_DEVICE_STATUS_* bits
  const KvCache* kv_cache = nullptr;
};

// out: the layout's shape, q's dtype or f32. lse: f32 [B, Hq, Sq] ([Hq, Tq] packed), natural
// logarithm, -inf for empty rows.
struct Outputs {
  Outputs(const Tensor& the_out, const std::optional<Tensor>& the_lse = {})  // NOLINT
      : out(the_out), lse(the_lse) {}
  Tensor out;
  std::optional<Tensor> lse;
};

struct Options {
  Device device = Device::kUnset;
  int32_t device_index = 0;
  int32_t threads = 0;                        // CPU; 0: OpenMP's default
  std::string kernel{};                       // empty, or the one kernel to use
  const tandem_executor* executor = nullptr;  // null: OpenMP; must outlive plans made with it
};

// The backward pass: dout in (and dlse, if given), gradients out, each in the shape of what it is
// the gradient of.
struct Gradients {
  explicit Gradients(const Tensor& the_dout) : dout(the_dout) {}
  bool deterministic = false;
  Tensor dout;
  std::optional<Tensor> dlse, dq, dk, dv, dbias, dsink, dalibi;
};

// Host memory aligned for workspaces and mask plans. Throws std::bad_alloc.
class HostBuffer {
 public:
  explicit HostBuffer(size_t size)
      : size_(size), data_(::operator new(size == 0 ? 1 : size, kAlignment)) {}
  void* data() const noexcept { return data_.get(); }
  size_t size() const noexcept { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{256};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  size_t size_;
  std::unique_ptr<void, Free> data_;
};

namespace internal {

inline const tandem_tensor* Pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &tensor->c() : nullptr;
}

// The C structs of a call, over values that outlive it.
class CProblem {
 public:
  inline explicit CProblem(const Problem& problem);
  CProblem(const CProblem&) = delete;
  CProblem& operator=(const CProblem&) = delete;
  const tandem_problem* get() const { return &c_; }

 private:
  std::vector<const tandem_mask_term*> terms_;
  tandem_problem c_ = TANDEM_PROBLEM_INIT;
};

inline tandem_outputs COutputs(const Outputs& outputs) {
  tandem_outputs c = TANDEM_OUTPUTS_INIT;
  c.out = &outputs.out.c();
  c.lse = Pointer(outputs.lse);
  return c;
}

inline tandem_gradients CGradients(const Gradients& gradients) {
  tandem_gradients c = TANDEM_GRADIENTS_INIT;
  c.deterministic = gradients.deterministic;
  c.dout = &gradients.dout.c();
  c.dlse = Pointer(gradients.dlse);
  c.dq = Pointer(gradients.dq);
  c.dk = Pointer(gradients.dk);
  c.dv = Pointer(gradients.dv);
  c.dbias = Pointer(gradients.dbias);
  c.dsink = Pointer(gradients.dsink);
  c.dalibi = Pointer(gradients.dalibi);
  return c;
}

inline tandem_options COptions(const Options& options) {
  tandem_options c = TANDEM_OPTIONS_INIT;
  c.device_type = static_cast<tandem_device_type>(options.device);
  c.device_index = options.device_index;
  c.threads = options.threads;
  c.kernel = options.kernel.empty() ? nullptr : options.kernel.c_str();
  c.executor = options.executor;
  return c;
}

template <auto destroy>
struct Destroy {
  template <typename Handle>
  void operator()(Handle* handle) const {
    destroy(handle);
  }
};

}  // namespace internal

// Bytes that a mask plan of this problem needs, on the device of its options.
inline size_t MaskPlanSize(const Problem& problem, const Options& options = {}) {
  const internal::CProblem c_problem(problem);
  const tandem_options c_options = internal::COptions(options);
  size_t size = 0;
  internal::Check(tandem_mask_plan_size(c_problem.get(), &c_options, &size));
  return size;
}

// A mask prepared once and used by many problems of the same shape: set Problem::mask_plan, and
// leave Problem::mask empty. May be shared between threads.
class MaskPlan {
 public:
  // For the CPU, in memory of its own. The terms' arrays may be freed afterwards.
  explicit MaskPlan(const Problem& problem, const Options& options = {})
      : memory_(std::in_place, MaskPlanSize(problem, options)) {
    Create(problem, memory_->data(), memory_->size(), nullptr, options);
  }
  // In the caller's memory (MaskPlanSize bytes, aligned to 256, on the device), which must outlive
  // the plan and every run that uses it. On CUDA the preparation is launched on `stream`.
  MaskPlan(const Problem& problem, void* memory, size_t size, void* stream,
           const Options& options = {}) {
    Create(problem, memory, size, stream, options);
  }

  const tandem_mask_plan* c() const noexcept { return plan_.get(); }

 private:
  void Create(const Problem& problem, void* memory, size_t size, void* stream,
              const Options& options) {
    const internal::CProblem c_problem(problem);
    const tandem_options c_options = internal::COptions(options);
    tandem_mask_plan* plan = nullptr;
    internal::Check(
        tandem_mask_plan_create(c_problem.get(), &c_options, memory, size, stream, &plan));
    plan_.reset(plan);
  }

  std::optional<HostBuffer> memory_;
  std::unique_ptr<tandem_mask_plan, internal::Destroy<tandem_mask_plan_destroy>> plan_;
};

// What a cache is made for: as tandem_kv_cache_config.
struct KvCacheConfig {
  DType dtype;  // kF32, kF16 or kBF16
  int64_t batch, kv_heads;
  int64_t capacity;  // the most keys of one sequence: Sk of problems that use the cache
  int64_t qk_dim, v_dim;
};

namespace internal {

inline tandem_kv_cache_config CConfig(const KvCacheConfig& config) {
  tandem_kv_cache_config c = TANDEM_KV_CACHE_CONFIG_INIT;
  c.dtype = static_cast<tandem_dtype>(config.dtype);
  c.batch = config.batch;
  c.kv_heads = config.kv_heads;
  c.capacity = config.capacity;
  c.qk_dim = config.qk_dim;
  c.v_dim = config.v_dim;
  return c;
}

}  // namespace internal

// Bytes that a cache needs.
inline size_t KvCacheSize(const KvCacheConfig& config) {
  const tandem_kv_cache_config c_config = internal::CConfig(config);
  size_t size = 0;
  internal::Check(tandem_kv_cache_size(&c_config, &size));
  return size;
}

// Keys and values of growing sequences, in host memory. While a thread changes it (Append,
// Truncate, Clear), no other may use it.
class KvCache {
 public:
  // In memory of its own.
  explicit KvCache(const KvCacheConfig& config)
      : config_(config), memory_(std::in_place, KvCacheSize(config)) {
    Create(memory_->data(), memory_->size());
  }
  // In the caller's memory: KvCacheSize bytes, aligned to 256, which must outlive the cache.
  KvCache(const KvCacheConfig& config, void* memory, size_t size) : config_(config) {
    Create(memory, size);
  }

  // Appends all rows of k and v to every sequence, or the first lengths[b] to sequence b. layout:
  // kBHSD or kBSHD.
  void Append(Layout layout, const Tensor& k, const Tensor& v,
              const std::optional<Indices>& lengths = {}) {
    internal::Check(tandem_kv_cache_append(cache_.get(), static_cast<tandem_layout>(layout), &k.c(),
                                           &v.c(), lengths ? &lengths->tensor().c() : nullptr));
  }
  // Keeps the first lengths[b] keys of sequence b.
  void Truncate(const Indices& lengths) {
    internal::Check(tandem_kv_cache_truncate(cache_.get(), &lengths.tensor().c()));
  }
  void Clear() { internal::Check(tandem_kv_cache_truncate(cache_.get(), nullptr)); }

  const KvCacheConfig& config() const noexcept { return config_; }
  std::vector<int32_t> lengths() const {
    std::vector<int32_t> lengths(static_cast<size_t>(config_.batch));
    internal::Check(tandem_kv_cache_lengths(cache_.get(), lengths.data()));
    return lengths;
  }
  const tandem_kv_cache* c() const noexcept { return cache_.get(); }

 private:
  void Create(void* memory, size_t size) {
    const tandem_kv_cache_config c_config = internal::CConfig(config_);
    tandem_kv_cache* cache = nullptr;
    internal::Check(tandem_kv_cache_create(&c_config, memory, size, &cache));
    cache_.reset(cache);
  }

  KvCacheConfig config_;
  std::optional<HostBuffer> memory_;
  std::unique_ptr<tandem_kv_cache, internal::Destroy<tandem_kv_cache_destroy>> cache_;
};

inline internal::CProblem::CProblem(const Problem& problem) : terms_(problem.mask.c()) {
  c_.layout = static_cast<tandem_layout>(problem.layout);
  c_.q = &problem.q.c();
  c_.k = problem.kv_cache == nullptr ? &problem.k.c() : nullptr;
  c_.v = problem.kv_cache == nullptr ? &problem.v.c() : nullptr;
  c_.kv_cache = problem.kv_cache == nullptr ? nullptr : problem.kv_cache->c();
  c_.has_scale = problem.scale.has_value();
  c_.scale = problem.scale.value_or(0.0f);
  c_.softcap = problem.softcap;
  c_.mask_term_count = static_cast<int32_t>(terms_.size());
  c_.mask_terms = terms_.data();
  c_.mask_plan = problem.mask_plan == nullptr ? nullptr : problem.mask_plan->c();
  c_.bias = Pointer(problem.bias);
  c_.alibi_slopes = Pointer(problem.alibi_slopes);
  c_.alibi_alignment = static_cast<tandem_alignment>(problem.alibi_alignment);
  c_.dropout_rate = problem.dropout_rate;
  c_.dropout_seed = problem.dropout_seed;
  c_.dropout_offset = problem.dropout_offset;
  c_.sink = Pointer(problem.sink);
  c_.q_offset = problem.q_offset;
  c_.kv_offset = problem.kv_offset;
  c_.global_q_len = problem.global_q_len;
  c_.global_kv_len = problem.global_kv_len;
  c_.block_table = Pointer(problem.block_table);
  c_.page_size = problem.page_size;
  c_.device_status = problem.device_status;
}

}  // namespace tandem

#endif  // TANDEM_PROBLEM_HPP_
