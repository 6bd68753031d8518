#include "dispatch/plan.h"

#include <cstring>
#include <memory>

#include "core/mask_prepare.h"
#include "core/validate.h"
#include "dispatch/error.h"
#include "dispatch/registry.h"

namespace tandem::dispatch {
namespace {

// Keeps whether a pointer was given, drops where it points.
template <typename Pointer>
void KeepPresence(Pointer* pointer) {
  if (*pointer == nullptr) return;
  const uintptr_t given = 1;
  std::memcpy(pointer, &given, sizeof(given));
}

bool HasName(const core::Backend* backend, const char* name) {
  for (int n = 0; backend != nullptr && n < backend->kernel_count; ++n) {
    if (std::strcmp(backend->kernels[n].name, name) == 0) return true;
  }
  return false;
}

// A message has room for few reasons: where one kernel was asked for, that one's.
tandem_status NothingServes(const Selection& selection, const core::Backend& backend,
                            const char* wanted) {
  for (const Verdict& verdict : selection.verdicts) {
    if (wanted != nullptr && std::strcmp(verdict.kernel->name, wanted) == 0) {
      return Fail(TANDEM_STATUS_UNSUPPORTED, "kernel %s cannot serve the problem: %s", wanted,
                  verdict.reason.c_str());
    }
  }
  if (wanted != nullptr) {
    return Fail(TANDEM_STATUS_UNSUPPORTED,
                "kernel %s is not one of %s, where the problem is to run", wanted, backend.name);
  }
  return Fail(TANDEM_STATUS_UNSUPPORTED, "no kernel serves the problem on %s: %s", backend.name,
              JoinReasons(selection).c_str());
}

}  // namespace

tandem_status ReadOptions(const tandem_options* options, tandem_options* result) {
  *result = TANDEM_OPTIONS_INIT;
  if (options == nullptr) return TANDEM_STATUS_OK;
  if (options->struct_size != sizeof(tandem_options)) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "options: struct_size is %u, must be %zu (use TANDEM_OPTIONS_INIT)",
                options->struct_size, sizeof(tandem_options));
  }
  *result = *options;
  if (result->device_type < TANDEM_DEVICE_UNSET || result->device_type > TANDEM_DEVICE_AUTO) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "options: device_type is %d, must be one of TANDEM_DEVICE_* (0 to 3)",
                result->device_type);
  }
  if (result->device_index < 0) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "options: device_index is %d, must be >= 0",
                result->device_index);
  }
  if (result->threads < 0 || result->threads > 4096) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "options: threads is %d, must be in [0, 4096] (0: OpenMP's default)",
                result->threads);
  }
  const tandem_executor* executor = result->executor;
  if (executor != nullptr && (executor->struct_size != sizeof(tandem_executor) ||
                              executor->concurrency < 1 || executor->parallel_for == nullptr)) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "options: executor has struct_size %u, concurrency %d and %s parallel_for, must "
                "have %zu, at least 1, and a function",
                executor->struct_size, executor->concurrency,
                executor->parallel_for == nullptr ? "a null" : "a", sizeof(tandem_executor));
  }
  return TANDEM_STATUS_OK;
}

tandem_status ValidateProblem(const tandem_problem* problem, const tandem_outputs* outputs,
                              const tandem_gradients* gradients, core::Problem* result) {
  if (outputs == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "outputs is null, must point to a tandem_outputs");
  }
  return core::Validate(problem, outputs, gradients, result, &LastError());
}

Selection SelectOn(const core::Backend& backend, const core::Problem& problem,
                   const tandem_options& options, int32_t device_index) {
  const BackendState& state = StateOf(backend.device_type);
  return Select(problem, backend.kernels, backend.kernel_count,
                state.devices[device_index].features, options.kernel);
}

tandem_status CheckKernelName(const tandem_options& options) {
  if (options.kernel == nullptr) return TANDEM_STATUS_OK;
  if (HasName(StateOf(TANDEM_DEVICE_CPU).backend, options.kernel)) return TANDEM_STATUS_OK;
  const BackendState& cuda = StateOf(TANDEM_DEVICE_CUDA);
  if (HasName(cuda.backend, options.kernel)) return TANDEM_STATUS_OK;
  if (cuda.backend == nullptr && std::strncmp(options.kernel, "efficient_cuda", 14) == 0) {
    return Fail(TANDEM_STATUS_DEVICE_UNAVAILABLE, "kernel %s: device cuda: %s", options.kernel,
                cuda.unavailable.c_str());
  }
  return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
              "options: kernel is \"%s\", must be a name that tandem_kernel_name lists",
              options.kernel);
}

int64_t WorkspaceSize(const core::KernelRecord& kernel, const core::Problem& problem) {
  return core::LayOutPreparation(problem).size + kernel.workspace_size(problem);
}

tandem_status MakePlan(const core::Problem& problem, const tandem_options& options,
                       tandem_plan* plan) {
  tandem_status status = CheckKernelName(options);
  if (status != TANDEM_STATUS_OK) return status;
  const core::Backend* backend = UsableBackend(problem.device_type, problem.device_index, &status);
  if (backend == nullptr) return status;
  const Selection selection = SelectOn(*backend, problem, options, problem.device_index);
  if (selection.chosen < 0) return NothingServes(selection, *backend, options.kernel);
  plan->structure = StructureOf(problem);
  plan->backend = backend;
  plan->kernel = selection.verdicts[selection.chosen].kernel;
  plan->workspace_size = WorkspaceSize(*plan->kernel, problem);
  plan->device_index = problem.device_index;
  plan->threads = options.threads;
  plan->executor = options.executor;
  return TANDEM_STATUS_OK;
}

tandem_status RunPlan(const tandem_plan& plan, core::Problem* problem, void* workspace,
                      void* stream) {
  const core::PreparationLayout layout = core::LayOutPreparation(*problem);
  core::BindPreparation(layout, workspace, problem);
  const core::Context context = {plan.device_index, plan.threads, plan.executor, stream,
                                 &LastError()};
  if (layout.size > 0) {
    const tandem_status status = plan.backend->prepare_mask(*problem, layout, workspace, context);
    if (status != TANDEM_STATUS_OK) return status;
  }
  return plan.kernel->run(*problem, static_cast<char*>(workspace) + layout.size, context);
}

core::Problem StructureOf(const core::Problem& problem) {
  core::Problem s = problem;
  for (core::Array4* array : {&s.q, &s.k, &s.v, &s.out, &s.lse, &s.bias, &s.dout, &s.dlse, &s.dq,
                              &s.dk, &s.dv, &s.dbias}) {
    KeepPresence(&array->data);
  }
  for (core::IndexVector* v : {&s.cu_seqlens_q, &s.cu_seqlens_k, &s.q_lengths, &s.kv_lengths}) {
    KeepPresence(&v->data);
  }
  for (core::BandTerm& band : s.mask.bands) {
    KeepPresence(&band.left_per_head.data);
    KeepPresence(&band.right_per_head.data);
    KeepPresence(&band.prefix);
  }
  for (core::RowRangesTerm& term : s.mask.row_ranges) KeepPresence(&term.data);
  for (core::SegmentsTerm& term : s.mask.segments) {
    KeepPresence(&term.q);
    KeepPresence(&term.kv);
  }
  for (core::BlockSparseTerm& term : s.mask.block_sparse) KeepPresence(&term.bits);
  KeepPresence(&s.mask.dense.words);
  KeepPresence(&s.mask.dense.classes);
  for (core::DenseSource& source : s.sources.dense) {
    KeepPresence(&source.data);
    KeepPresence(&source.offsets);
  }
  for (core::BlockSparseSource& source : s.sources.block_sparse) {
    for (core::BlockListSource* list : {&source.partial, &source.full}) {
      KeepPresence(&list->counts);
      KeepPresence(&list->indices);
    }
  }
  KeepPresence(&s.page_table.pages);
  KeepPresence(&s.alibi_slopes);
  KeepPresence(&s.sink);
  KeepPresence(&s.dsink);
  KeepPresence(&s.dalibi);
  s.device_status = nullptr;
  s.scale = 0;
  s.softcap = s.softcap > 0 ? 1.0f : 0.0f;
  s.dropout = {};
  s.dropout.enabled = problem.dropout.enabled;
  if (core::IsPacked(s) && s.device_type == TANDEM_DEVICE_CPU) {
    // Longest lengths are read from the data, and what follows from them.
    s.q_rows = s.kv_rows = s.global_q_len = s.global_kv_len = 0;
    if (s.sources.dense_row_extent > 1) s.sources.dense_row_extent = 2;
    for (core::BlockSparseSource& source : s.sources.block_sparse) {
      source.q_blocks = source.kv_blocks = 0;
    }
  }
  return s;
}

}  // namespace tandem::dispatch

using namespace tandem::dispatch;  // NOLINT: entry points below

extern "C" {

tandem_status tandem_plan_create(const tandem_problem* problem, const tandem_outputs* outputs,
                                 const tandem_gradients* gradients, const tandem_options* options,
                                 tandem_plan** plan) {
  return Guard([&]() -> tandem_status {
    if (plan == nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "plan is null, must point to a tandem_plan*");
    }
    tandem_options read;
    tandem_status status = ReadOptions(options, &read);
    if (status != TANDEM_STATUS_OK) return status;
    auto made = std::make_unique<tandem_plan>();
    tandem::core::Problem validated;
    status = ValidateProblem(problem, outputs, gradients, &validated);
    if (status != TANDEM_STATUS_OK) return status;
    if (read.device_type == TANDEM_DEVICE_CPU || read.device_type == TANDEM_DEVICE_CUDA) {
      if (read.device_type != validated.device_type) {
        return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                    "options: device_type is %d, must be that of the tensors, %d (only the "
                    "one-call functions copy between devices)",
                    read.device_type, validated.device_type);
      }
    }
    status = MakePlan(validated, read, made.get());
    if (status == TANDEM_STATUS_OK) *plan = made.release();
    return status;
  });
}

void tandem_plan_destroy(tandem_plan* plan) { delete plan; }

size_t tandem_plan_workspace_size(const tandem_plan* plan) {
  return plan == nullptr ? 0 : static_cast<size_t>(plan->workspace_size);
}

const char* tandem_plan_kernel(const tandem_plan* plan) {
  return plan == nullptr ? nullptr : plan->kernel->name;
}

tandem_status tandem_plan_run(const tandem_plan* plan, const tandem_problem* problem,
                              const tandem_outputs* outputs, const tandem_gradients* gradients,
                              void* workspace, size_t workspace_size, void* stream) {
  return Guard([&]() -> tandem_status {
    if (plan == nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "plan is null, must be a plan");
    }
    tandem::core::Problem validated;
    const tandem_status status = ValidateProblem(problem, outputs, gradients, &validated);
    if (status != TANDEM_STATUS_OK) return status;
    const tandem::core::Problem structure = StructureOf(validated);
    if (std::memcmp(&structure, &plan->structure, sizeof(structure)) != 0) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                  "problem: its shapes, strides, dtypes, device or mask terms are not those the "
                  "plan was made for; make a new plan");
    }
    const int64_t needed = WorkspaceSize(*plan->kernel, validated);
    if (workspace_size < static_cast<size_t>(needed)) {
      return Fail(TANDEM_STATUS_WORKSPACE_TOO_SMALL,
                  "workspace_size is %zu, must be at least %lld (packed sequences longer than the "
                  "planned ones need a new plan)",
                  workspace_size, static_cast<long long>(needed));
    }
    if (needed > 0 &&
        (workspace == nullptr ||
         reinterpret_cast<uintptr_t>(workspace) % tandem::core::kBufferAlignment != 0)) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                  "workspace is %p, must be memory of the plan's device aligned to %lld bytes",
                  workspace, static_cast<long long>(tandem::core::kBufferAlignment));
    }
    return RunPlan(*plan, &validated, workspace, stream);
  });
}

}  // extern "C"
