// Tandem for C++20: a thin, header-only layer over the C ABI of tandem.h. Values own the C structs
// they stand for, handles are RAII, and a failure is a tandem::Error.
//
//   tandem::Tensor q(q_data, {batch, heads, q_len, dim});  // and k, v, out
//   tandem::Problem problem(tandem::Layout::kBHSD, q, k, v);
//   problem.mask = tandem::Causal(tandem::Alignment::kBottomRight) & tandem::KvLengths({17, 36});
//   tandem::Attention(problem, out);
//
// Shapes use the symbols of tandem.h (B, Hq, Hk, Sq, Sk, Dqk, Dv, Tq, Tk); docs/semantics.md has
// their meaning. Array data is always borrowed: it must outlive the calls that use it, never more.
#ifndef TANDEM_TANDEM_HPP_
#define TANDEM_TANDEM_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tandem/mask.hpp"
#include "tandem/problem.hpp"
#include "tandem/tandem.h"
#include "tandem/tensor.hpp"

namespace tandem {

// Computes attention, and waits. Allocates; host tensors may be run on CUDA (Options::device).
// Throws any status; outputs are written only on success.
inline void Attention(const Problem& problem, const Outputs& outputs, const Options& options = {}) {
  const internal::CProblem c_problem(problem);
  const tandem_outputs c_outputs = internal::COutputs(outputs);
  const tandem_options c_options = internal::COptions(options);
  internal::Check(tandem_attention(c_problem.get(), &c_outputs, &c_options));
}

// The backward pass: reads out and lse of the outputs, writes the gradients, and waits.
inline void AttentionBackward(const Problem& problem, const Outputs& outputs,
                              const Gradients& gradients, const Options& options = {}) {
  const internal::CProblem c_problem(problem);
  const tandem_outputs c_outputs = internal::COutputs(outputs);
  const tandem_gradients c_gradients = internal::CGradients(gradients);
  const tandem_options c_options = internal::COptions(options);
  internal::Check(tandem_attention_backward(c_problem.get(), &c_outputs, &c_gradients, &c_options));
}

// A problem's structure validated, with the kernel that serves it. Immutable: many threads may run
// it at once, each with its own workspace.
class Plan {
 public:
  // Throws kUnsupported where no kernel serves it: the message has each one's reason.
  Plan(const Problem& problem, const Outputs& outputs, const Options& options = {})
      : Plan(problem, outputs, nullptr, options) {}
  Plan(const Problem& problem, const Outputs& outputs, const Gradients& gradients,
       const Options& options = {})
      : Plan(problem, outputs, &gradients, options) {}

  size_t workspace_size() const noexcept { return tandem_plan_workspace_size(plan_.get()); }
  std::string kernel() const { return tandem_plan_kernel(plan_.get()); }

  // The same structure as planned, with any data. workspace: workspace_size() bytes, aligned to
  // 256, on the plan's device. stream: a cudaStream_t; on CUDA the call only launches.
  void Run(const Problem& problem, const Outputs& outputs, void* workspace, size_t workspace_size,
           void* stream = nullptr) const {
    RunAny(problem, outputs, nullptr, workspace, workspace_size, stream);
  }
  void Run(const Problem& problem, const Outputs& outputs, const Gradients& gradients,
           void* workspace, size_t workspace_size, void* stream = nullptr) const {
    RunAny(problem, outputs, &gradients, workspace, workspace_size, stream);
  }

 private:
  Plan(const Problem& problem, const Outputs& outputs, const Gradients* gradients,
       const Options& options) {
    const internal::CProblem c_problem(problem);
    const tandem_outputs c_outputs = internal::COutputs(outputs);
    const tandem_options c_options = internal::COptions(options);
    std::optional<tandem_gradients> c_gradients;
    if (gradients != nullptr) c_gradients = internal::CGradients(*gradients);
    tandem_plan* plan = nullptr;
    internal::Check(tandem_plan_create(c_problem.get(), &c_outputs,
                                       c_gradients ? &*c_gradients : nullptr, &c_options, &plan));
    plan_.reset(plan);
  }

  void RunAny(const Problem& problem, const Outputs& outputs, const Gradients* gradients,
              void* workspace, size_t workspace_size, void* stream) const {
    const internal::CProblem c_problem(problem);
    const tandem_outputs c_outputs = internal::COutputs(outputs);
    std::optional<tandem_gradients> c_gradients;
    if (gradients != nullptr) c_gradients = internal::CGradients(*gradients);
    internal::Check(tandem_plan_run(plan_.get(), c_problem.get(), &c_outputs,
                                    c_gradients ? &*c_gradients : nullptr, workspace,
                                    workspace_size, stream));
  }

  std::unique_ptr<tandem_plan, internal::Destroy<tandem_plan_destroy>> plan_;
};

// Merges partial results over disjoint keys in the order given: f32 partial_out[n] with
// partial_lse[n] into outputs. On one device; only CPU tensors are served yet.
inline void Merge(Layout layout, std::span<const Tensor> partial_out,
                  std::span<const Tensor> partial_lse, const Outputs& outputs,
                  void* stream = nullptr) {
  internal::Require(partial_out.size() == partial_lse.size(),
                    "tandem::Merge: partial_out and partial_lse need one entry per partial result");
  std::vector<const tandem_tensor*> out, lse;
  for (const Tensor& tensor : partial_out) out.push_back(&tensor.c());
  for (const Tensor& tensor : partial_lse) lse.push_back(&tensor.c());
  const tandem_outputs c_outputs = internal::COutputs(outputs);
  internal::Check(tandem_merge(static_cast<tandem_layout>(layout), static_cast<int32_t>(out.size()),
                               out.data(), lse.data(), &c_outputs, stream));
}

// A rectangle of the score matrix of one sequence and query head.
struct Rectangle {
  int64_t q_begin, q_count, kv_begin, kv_count;
};

// The truth of a mask whose terms are on the host: [q_count * kv_count], 1 where visible.
inline std::vector<uint8_t> Visible(const Problem& problem, int64_t batch, int64_t head,
                                    const Rectangle& at) {
  internal::Require(at.q_count >= 0 && at.kv_count >= 0,
                    "tandem::Visible: the counts may not be negative");
  std::vector<uint8_t> visible(static_cast<size_t>(at.q_count) * static_cast<size_t>(at.kv_count));
  const internal::CProblem c_problem(problem);
  internal::Check(tandem_mask_inspect(c_problem.get(), batch, head, at.q_begin, at.q_count,
                                      at.kv_begin, at.kv_count, visible.data(), nullptr));
  return visible;
}

// What the kernels make of a rectangle: kPartial may be said of one that is in truth full or empty,
// never else.
inline TileClass Classify(const Problem& problem, int64_t batch, int64_t head,
                          const Rectangle& at) {
  const internal::CProblem c_problem(problem);
  tandem_tile_class tile = TANDEM_TILE_PARTIAL;
  internal::Check(tandem_mask_inspect(c_problem.get(), batch, head, at.q_begin, at.q_count,
                                      at.kv_begin, at.kv_count, nullptr, &tile));
  return static_cast<TileClass>(tile);
}

// A kernel, and why it does not serve (a problem, or this machine); no reason where it does.
struct Kernel {
  std::string name;
  Device device;
  std::optional<std::string> reason;
};

// Every kernel's answer to a problem, best first. chosen: an index of kernels, or none.
struct Explanation {
  std::vector<Kernel> kernels;
  std::optional<size_t> chosen;
};

namespace internal {

inline Kernel MakeKernel(const char* name, tandem_device_type device, const char* reason) {
  Kernel kernel{name, static_cast<Device>(device), {}};
  if (reason != nullptr) kernel.reason = reason;
  return kernel;
}

}  // namespace internal

// Which kernel would serve a problem, and why each other one would not. gradients: null (forward).
inline Explanation Explain(const Problem& problem, const Outputs& outputs,
                           const Options& options = {}, const Gradients* gradients = nullptr) {
  const internal::CProblem c_problem(problem);
  const tandem_outputs c_outputs = internal::COutputs(outputs);
  const tandem_options c_options = internal::COptions(options);
  std::optional<tandem_gradients> c_gradients;
  if (gradients != nullptr) c_gradients = internal::CGradients(*gradients);
  tandem_explanation* handle = nullptr;
  internal::Check(tandem_explain(c_problem.get(), &c_outputs, c_gradients ? &*c_gradients : nullptr,
                                 &c_options, &handle));
  const std::unique_ptr<tandem_explanation, internal::Destroy<tandem_explanation_destroy>> owner(
      handle);
  Explanation explanation;
  for (int32_t i = 0; i < tandem_explanation_count(handle); ++i) {
    explanation.kernels.push_back(internal::MakeKernel(tandem_explanation_kernel(handle, i),
                                                       tandem_explanation_device(handle, i),
                                                       tandem_explanation_reason(handle, i)));
  }
  const int32_t chosen = tandem_explanation_chosen(handle);
  if (chosen >= 0) explanation.chosen = static_cast<size_t>(chosen);
  return explanation;
}

// Every kernel compiled in or loaded, best first; the reason says why this machine cannot run it.
inline std::vector<Kernel> Kernels() {
  std::vector<Kernel> kernels;
  for (int32_t i = 0; i < tandem_kernel_count(); ++i) {
    kernels.push_back(internal::MakeKernel(tandem_kernel_name(i), tandem_kernel_device(i),
                                           tandem_kernel_unavailable_reason(i)));
  }
  return kernels;
}

// Devices of a type that can be used now, a line about each.
inline std::vector<std::string> Devices(Device type) {
  const tandem_device_type c_type = static_cast<tandem_device_type>(type);
  std::vector<std::string> devices;
  for (int32_t i = 0; i < tandem_device_count(c_type); ++i) {
    const char* description = tandem_device_description(c_type, i);
    devices.emplace_back(description == nullptr ? "" : description);
  }
  return devices;
}

// Why there is no device of a type; none where there is one.
inline std::optional<std::string> DeviceUnavailableReason(Device type) {
  const char* reason = tandem_device_unavailable_reason(static_cast<tandem_device_type>(type));
  if (reason == nullptr) return std::nullopt;
  return reason;
}

}  // namespace tandem

#endif  // TANDEM_TANDEM_HPP_
