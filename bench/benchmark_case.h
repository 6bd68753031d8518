// The cases of tandem_benchmark: one list for both devices, with the same inputs on both.
#ifndef TANDEM_BENCH_BENCHMARK_CASE_H_
#define TANDEM_BENCH_BENCHMARK_CASE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tandem/tandem.hpp>
#include <vector>

#include "bench/device_memory.h"

namespace tandem::bench {

enum class MaskKind {
  kNone,
  kCausal,
  kWindow,           // the query's own key and 256 before it
  kPadded,           // keys from all of them in the first sequence down to a quarter in the last
  kPacked,           // documents of 200 on average
  kBoolean,          // [B, 1, Sq, Sk], random, 90 % visible; prepared once
  kBooleanPrepared,  // the same, with its preparation in every call
  kBias,             // [B, 1, Sq, Sk] in the type of q
};

struct CaseSpec {
  DType dtype;
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  MaskKind mask;

  // forward/cpu/bf16/b1/h8/hk8/q2048/k2048/d128/causal
  std::string Name(Device device) const;
  // 4 * heads * dim * visible pairs; a random dense mask leaves every tile partial, so all pairs
  // count there.
  double Flops() const;
  // Keys and values, read once.
  double KvBytes() const;
};

std::vector<CaseSpec> CaseTable();

// A case's inputs in host memory: random, the same in every run.
class HostCase {
 public:
  explicit HostCase(const CaseSpec& spec);

  const CaseSpec& spec() const { return spec_; }
  const std::vector<char>& q() const { return q_; }
  const std::vector<char>& k() const { return k_; }
  const std::vector<char>& v() const { return v_; }
  const std::vector<char>& mask() const { return mask_; }  // boolean, else empty
  const std::vector<char>& bias() const { return bias_; }
  const std::vector<int32_t>& lengths() const { return lengths_; }  // kv_lengths or cu_seqlens
  int64_t longest() const { return longest_; }

 private:
  CaseSpec spec_;
  std::vector<char> q_, k_, v_, mask_, bias_;
  std::vector<int32_t> lengths_;
  int64_t longest_ = 0;
};

// The inputs in the memory of one device, as a problem whose mask is terms.
class PlacedInputs {
 public:
  PlacedInputs(const HostCase& host, Device device);
  PlacedInputs(const PlacedInputs&) = delete;
  PlacedInputs& operator=(const PlacedInputs&) = delete;

  const Problem& problem() const { return problem_; }

 private:
  Tensor Upload(const void* data, size_t size, DType dtype, const std::vector<int64_t>& shape);
  Problem MakeProblem(const HostCase& host);

  Device device_;
  std::vector<Buffer> buffers_;
  Problem problem_;
};

// Memory for a case's O and LSE, as its problem wants them.
Outputs OutputsIn(const CaseSpec& spec, void* out, void* lse, Device device);
size_t OutBytes(const CaseSpec& spec);
size_t LseBytes(const CaseSpec& spec);

// O and LSE in host memory.
struct Answer {
  std::vector<char> out, lse;
};

// A case on one device, planned: Run() neither validates nor allocates. Throws what tandem throws,
// and std::bad_alloc.
class PlacedCase {
 public:
  PlacedCase(const HostCase& host, Device device);
  PlacedCase(const PlacedCase&) = delete;
  PlacedCase& operator=(const PlacedCase&) = delete;

  void Run() { plan_->Run(problem_, outputs_, workspace_->data(), workspace_->size()); }

  std::string kernel() const { return plan_->kernel(); }
  size_t workspace_bytes() const { return plan_->workspace_size() + mask_plan_bytes_; }
  Answer Result() const;

 private:
  void PrepareMask();

  Device device_;
  PlacedInputs inputs_;
  Problem problem_;  // with the mask plan, where there is one
  Buffer out_, lse_;
  Outputs outputs_;
  size_t mask_plan_bytes_ = 0;
  std::optional<Buffer> mask_plan_memory_;
  std::optional<MaskPlan> mask_plan_;
  std::optional<Plan> plan_;
  std::optional<Buffer> workspace_;
};

}  // namespace tandem::bench

#endif  // TANDEM_BENCH_BENCHMARK_CASE_H_
