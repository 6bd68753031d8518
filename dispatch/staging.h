// Copies of a problem's host tensors on a device, for the one-call functions.
#ifndef TANDEM_DISPATCH_STAGING_H_
#define TANDEM_DISPATCH_STAGING_H_

#include <deque>
#include <vector>

#include "core/backend.h"

namespace tandem::dispatch {

// Owns the device memory and the rewritten descriptors of one call. Every function returns a status
// with the thread's last error set; the destructor releases all device memory.
class Staging {
 public:
  Staging(const core::Backend& backend, const core::Context& context, int32_t device_index)
      : backend_(backend), context_(context), device_index_(device_index) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // All were validated on the host; gradients null: forward. `validated` supplies the longest
  // lengths.
  tandem_status Upload(const tandem_problem& problem, const tandem_outputs& outputs,
                       const tandem_gradients* gradients, const core::Problem& validated);
  const tandem_problem& problem() const { return problem_; }
  const tandem_outputs& outputs() const { return outputs_; }
  // Null where none were uploaded.
  const tandem_gradients* gradients() const { return has_gradients_ ? &gradients_ : nullptr; }

  tandem_status Allocate(int64_t size, void** memory);

  // Copies the results into the caller's tensors; call after the device has finished.
  tandem_status Download();

 private:
  // Points *slot at a device copy of the host tensor; null stays null.
  tandem_status Stage(const tandem_tensor** slot);
  tandem_status StageTerm(const tandem_mask_term* term, const core::Problem& validated);
  // Points *slot at a device tensor of the same shape, row-major, not filled.
  tandem_status StageOutput(const tandem_tensor** slot);
  tandem_status StageGradients(bool has_pairs);

  struct PendingOutput {
    const tandem_tensor* host;
    const tandem_tensor* device;  // without data: zeros
  };
  union Term {
    tandem_mask_term head;
    tandem_band_term band;
    tandem_row_ranges_term row_ranges;
    tandem_lengths_term lengths;
    tandem_packed_term packed;
    tandem_segments_term segments;
    tandem_dense_term dense;
    tandem_block_sparse_term block_sparse;
  };

  const core::Backend& backend_;
  core::Context context_;
  int32_t device_index_;
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
  tandem_gradients gradients_ = TANDEM_GRADIENTS_INIT;
  bool has_gradients_ = false;
  std::deque<tandem_tensor> tensors_;
  std::deque<Term> terms_;
  std::vector<const tandem_mask_term*> term_pointers_;
  std::vector<void*> memory_;
  std::vector<PendingOutput> pending_;
};

}  // namespace tandem::dispatch

#endif  // TANDEM_DISPATCH_STAGING_H_
