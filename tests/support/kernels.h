// The registered kernels, and how a test runs one of them on a case.
#ifndef TANDEM_TESTS_SUPPORT_KERNELS_H_
#define TANDEM_TESTS_SUPPORT_KERNELS_H_

#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "oracle/bounds.h"
#include "tandem/tandem.h"
#include "tests/support/case.h"

namespace tandem::test {

struct Kernel {
  std::string name;
  tandem_device_type device = TANDEM_DEVICE_CPU;
  std::string unavailable;  // empty: this machine can run it

  bool Available() const { return unavailable.empty(); }
};
std::ostream& operator<<(std::ostream& stream, const Kernel& kernel);

std::vector<Kernel> RegisteredKernels();
// Those that this machine can run.
std::vector<Kernel> AvailableKernels();
// Those of them that compute the forward pass; tests/kernels/backward.h has the others.
std::vector<Kernel> ForwardKernels();

// Whether all results are the same bits on every run, on request at least. The fused gradients of
// Hopper add dQ up in the order in which blocks come, and decline gradients.deterministic.
bool IsOrdered(const Kernel& kernel);

// "flash_cpu.avx2" -> "flash_cpu_avx2": what a test's name may hold.
std::string TestName(const std::string& text);
// Names the tests of a suite whose parameters are a kernel and a case.
struct KernelAndCaseName {
  template <typename Info>
  std::string operator()(const Info& info) const {
    return TestName(std::get<0>(info.param).name + "__" + std::get<1>(info.param).name);
  }
};

struct RunSettings {
  int32_t threads = 0;
  const tandem_executor* executor = nullptr;
};
// One call of tandem_attention by this kernel on its device; host tensors are staged for CUDA.
tandem_status RunKernel(const Kernel& kernel, const tandem_problem& problem,
                        const tandem_outputs& outputs, const RunSettings& settings = {});
tandem_status RunKernel(const Kernel& kernel, const Case& problem,
                        const RunSettings& settings = {});

// How its error is bounded.
oracle::Arithmetic ArithmeticOf(const Kernel& kernel, const CaseSpec& spec);

// Whether a kernel may not decline a case of this kind. What it declines beyond that is counted,
// but is no failure; without this list a kernel that declines everything would pass every test.
bool MustAccept(const Kernel& kernel, const CaseSpec& spec);
// Whether there is no bias, or one that the kernels of sm_90a serve: of q's type, in rows that the
// tensor memory accelerator can copy.
bool IsBiasOnHopper(const CaseSpec& spec);

// TANDEM_REQUIRE holds a comma-separated list of hardware whose absence is a failure: cuda, avx2,
// avx512, amx.
bool IsRequired(const std::string& hardware);
// Whether TANDEM_REQUIRE asks for the hardware that this kernel lacks.
bool IsRequired(const Kernel& kernel);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_SUPPORT_KERNELS_H_
