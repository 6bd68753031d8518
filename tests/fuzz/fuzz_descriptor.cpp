// Fuzz target: bytes choose a small valid problem, forward or with gradients, and then damage some
// of its fields. The library must answer each with a status, and run those that it accepts.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "tests/fuzz/descriptor.h"

namespace {

alignas(256) unsigned char workspace[1 << 22];

// Every failure has a message.
void CheckAnswer(tandem_status status) {
  if (status != TANDEM_STATUS_OK && std::string_view(tandem_last_error()).empty()) std::abort();
  if (status == TANDEM_STATUS_INTERNAL) std::abort();
}

bool IsSmall(const tandem_problem& problem) {
  double work = 1;
  for (const tandem_tensor* t : {problem.q, problem.k}) {
    for (int32_t n = 0; n < t->rank; ++n) work *= static_cast<double>(t->shape[n]);
  }
  return work < 1e8;
}

// By the kernel of the options and by the reference.
void RunGradients(const Descriptor& d) {
  tandem_plan* plan = nullptr;
  const tandem_status planned =
      tandem_plan_create(&d.problem(), &d.outputs(), d.gradients(), &d.options(), &plan);
  CheckAnswer(planned);
  if (planned != TANDEM_STATUS_OK) return;
  if (IsSmall(d.problem()) && tandem_plan_workspace_size(plan) <= sizeof(workspace)) {
    CheckAnswer(tandem_plan_run(plan, &d.problem(), &d.outputs(), d.gradients(), workspace,
                                sizeof(workspace), nullptr));
    tandem_options options = TANDEM_OPTIONS_INIT;
    options.kernel = "reference.cpu";
    options.threads = 1;
    CheckAnswer(tandem_attention_backward(&d.problem(), &d.outputs(), d.gradients(), &options));
  }
  tandem_plan_destroy(plan);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::memset(pool, 0x3c, sizeof(pool));  // small numbers, true
  Bytes bytes(data, size);
  const Descriptor d(&bytes);
  tandem_explanation* explanation = nullptr;
  CheckAnswer(tandem_explain(&d.problem(), &d.outputs(), nullptr, &d.options(), &explanation));
  tandem_explanation_destroy(explanation);
  if (d.gradients() != nullptr) RunGradients(d);
  tandem_plan* plan = nullptr;
  const tandem_status planned =
      tandem_plan_create(&d.problem(), &d.outputs(), nullptr, &d.options(), &plan);
  CheckAnswer(planned);
  if (planned != TANDEM_STATUS_OK) return 0;
  if (IsSmall(d.problem()) && tandem_plan_workspace_size(plan) <= sizeof(workspace)) {
    CheckAnswer(tandem_plan_run(plan, &d.problem(), &d.outputs(), nullptr, workspace,
                                sizeof(workspace), nullptr));
    tandem_options options = TANDEM_OPTIONS_INIT;
    options.kernel = "reference.cpu";
    options.threads = 1;
    CheckAnswer(tandem_attention(&d.problem(), &d.outputs(), &options));
  }
  tandem_plan_destroy(plan);
  return 0;
}
