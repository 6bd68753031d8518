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

class MaskPlan;

// One attention problem. Everything after v is optional and has the meaning that it has in
// tandem_problem.
struct Problem {
  Problem(Layout the_layout, const Tensor& queries, const Tensor& keys, const Tensor& values)
      : layout(the_layout), q(queries), k(keys), v(values) {}

  Layout layout;
  Tensor q, k, v;              // one dtype: kF32, kF16 or kBF16
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

inline internal::CProblem::CProblem(const Problem& problem) : terms_(problem.mask.c()) {
  c_.layout = static_cast<tandem_layout>(problem.layout);
  c_.q = &problem.q.c();
  c_.k = &problem.k.c();
  c_.v = &problem.v.c();
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
