// A case with everything of its backward pass: O and LSE of a forward pass, dO and dLSE, and the
// gradients that a kernel writes.
#ifndef TANDEM_TESTS_SUPPORT_BACKWARD_CASE_H_
#define TANDEM_TESTS_SUPPORT_BACKWARD_CASE_H_

#include <optional>
#include <vector>

#include "tests/support/case.h"
#include "tests/support/kernels.h"

namespace tandem::test {

class BackwardCase {
 public:
  // The case with LSE. Gradients lie as the tensors they belong to, in their dtypes, or all in f32
  // with spec.out_f32.
  explicit BackwardCase(CaseSpec spec);

  Case& forward() { return case_; }
  const CaseSpec& spec() const { return case_.spec(); }
  const tandem_gradients& gradients() const { return gradients_; }
  tandem_gradients& gradients() { return gradients_; }
  Tensor& dout() { return *dout_; }
  Tensor& dlse() { return *dlse_; }
  Tensor& dq() { return *dq_; }
  Tensor& dk() { return *dk_; }
  Tensor& dv() { return *dv_; }
  std::optional<Tensor>& dbias() { return dbias_; }
  std::optional<Tensor>& dsink() { return dsink_; }
  std::optional<Tensor>& dalibi() { return dalibi_; }

  // O and LSE by reference.cpu.
  tandem_status RunForward();

  // Writes the byte over the gradients, gaps included.
  void PrefillGradients(uint8_t byte = 0xff);
  // The elements of all gradients, for bitwise comparison.
  std::vector<uint8_t> GradientBytes();
  // Every byte of every gradient holds the prefill.
  bool GradientsHold(uint8_t byte);
  // Nothing was written beside the gradients.
  bool GapsHold(uint8_t byte);

 private:
  std::vector<Tensor*> Written();

  Case case_;
  std::optional<Tensor> dout_, dlse_, dq_, dk_, dv_, dbias_, dsink_, dalibi_;
  tandem_gradients gradients_ = TANDEM_GRADIENTS_INIT;
};

// One call of tandem_attention_backward by this kernel on its device.
tandem_status RunBackward(const Kernel& kernel, BackwardCase& problem,
                          const RunSettings& settings = {});

// Whether a kernel may not decline the gradients of a case of this kind.
bool MustAcceptBackward(const Kernel& kernel, const CaseSpec& spec);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_BACKWARD_CASE_H_
