// Mask plans: the mask of a problem copied and prepared into the caller's memory.
#include "core/mask_plan.h"

#include <memory>
#include <vector>

#include "core/mask_prepare.h"
#include "core/validate.h"
#include "dispatch/error.h"
#include "dispatch/plan.h"
#include "dispatch/registry.h"

namespace tandem::dispatch {
namespace {

// Collects the arrays a mask points at, gives each a place behind the prepared part, and repoints
// the mask there.
class Snapshot {
 public:
  Snapshot(char* memory, int64_t offset) : memory_(memory), offset_(offset) {}

  struct Axis {
    int64_t extent;
    int64_t* stride;  // becomes the copy's
  };

  template <typename T>
  void Add(const T** pointer, int64_t element_size, std::initializer_list<Axis> axes) {
    if (*pointer == nullptr) return;
    core::ArrayCopy copy = {};
    copy.source = *pointer;
    copy.element_size = element_size;
    copy.rank = static_cast<int32_t>(axes.size());
    int d = 0;
    for (const Axis& axis : axes) {
      copy.shape[d] = *axis.stride == 0 ? 1 : axis.extent;
      copy.source_strides[d] = *axis.stride;
      ++d;
    }
    int64_t count = 1;
    for (d = copy.rank - 1; d >= 0; --d) {
      copy.destination_strides[d] = copy.shape[d] == 1 ? 0 : count;
      count *= copy.shape[d];
    }
    d = 0;
    for (const Axis& axis : axes) *axis.stride = copy.destination_strides[d++];
    copy.destination = memory_ + offset_;
    *pointer = reinterpret_cast<const T*>(memory_ + offset_);
    offset_ = core::RoundUp(offset_ + count * element_size, core::kBufferAlignment);
    if (count > 0) copies_.push_back(copy);
  }

  void AddIndex(core::IndexVector* vector, int64_t extent) {
    Add(&vector->data, core::ElementSize(vector->dtype), {{extent, &vector->stride}});
  }

  int64_t size() const { return offset_; }
  const std::vector<core::ArrayCopy>& copies() const { return copies_; }

 private:
  char* memory_;
  int64_t offset_;
  std::vector<core::ArrayCopy> copies_;
};

void AddMask(core::Problem* p, Snapshot* snapshot) {
  const bool packed = core::IsPacked(*p);
  for (int t = 0; t < p->mask.band_count; ++t) {
    core::BandTerm& band = p->mask.bands[t];
    for (core::HeadArray* array : {&band.left_per_head, &band.right_per_head}) {
      snapshot->Add(&array->data, 4,
                    {{p->batch, &array->batch_stride}, {p->q_heads, &array->head_stride}});
    }
    snapshot->Add(&band.prefix, 4, {{p->batch, &band.prefix_stride}});
  }
  for (int t = 0; t < p->mask.row_ranges_count; ++t) {
    core::RowRangesTerm& term = p->mask.row_ranges[t];
    snapshot->Add(&term.data, 4,
                  {{p->batch, &term.batch_stride},
                   {p->q_heads, &term.head_stride},
                   {p->global_q_len, &term.row_stride},
                   {term.count, &term.range_stride},
                   {2, &term.end_stride}});
  }
  for (int t = 0; t < p->mask.segments_count; ++t) {
    core::SegmentsTerm& term = p->mask.segments[t];
    snapshot->Add(&term.q, 4,
                  {{p->batch, &term.q_batch_stride},
                   {packed ? p->q_total : p->global_q_len, &term.q_stride}});
    snapshot->Add(&term.kv, 4,
                  {{p->batch, &term.kv_batch_stride},
                   {packed ? p->kv_total : p->global_kv_len, &term.kv_stride}});
  }
  snapshot->AddIndex(&p->cu_seqlens_q, p->batch + 1);
  snapshot->AddIndex(&p->cu_seqlens_k, p->batch + 1);
  snapshot->AddIndex(&p->q_lengths, p->batch);
  snapshot->AddIndex(&p->kv_lengths, p->batch);
}

tandem_status ReadMask(const tandem_problem* problem, const tandem_options* options,
                       core::Problem* result) {
  tandem_options read;
  tandem_status status = ReadOptions(options, &read);
  if (status != TANDEM_STATUS_OK) return status;
  status = core::Validate(problem, nullptr, nullptr, result, &LastError());
  if (status != TANDEM_STATUS_OK) return status;
  if (problem->mask_plan != nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "mask_plan is given, must be null where a mask plan is made");
  }
  if (result->has_kv_cache) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "kv_cache is given, must be null where a mask plan is made: it would keep lengths "
                "that change");
  }
  if ((read.device_type == TANDEM_DEVICE_CPU || read.device_type == TANDEM_DEVICE_CUDA) &&
      read.device_type != result->device_type) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "options: device_type is %d, must be that of the tensors, %d", read.device_type,
                result->device_type);
  }
  return TANDEM_STATUS_OK;
}

tandem_status CreateMaskPlan(const tandem_problem* problem, const tandem_options* options,
                             void* memory, size_t size, void* stream, tandem_mask_plan** plan) {
  if (plan == nullptr) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "plan is null, must point to a tandem_mask_plan*");
  }
  core::Problem validated;
  tandem_status status = ReadMask(problem, options, &validated);
  if (status != TANDEM_STATUS_OK) return status;
  const core::Backend* backend =
      UsableBackend(validated.device_type, validated.device_index, &status);
  if (backend == nullptr) return status;
  const core::PreparationLayout layout = core::LayOutPreparation(validated);
  auto made = std::make_unique<tandem_mask_plan>();
  made->problem = validated;
  Snapshot snapshot(static_cast<char*>(memory), layout.size);
  AddMask(&made->problem, &snapshot);
  if (size < static_cast<size_t>(snapshot.size())) {
    return Fail(TANDEM_STATUS_WORKSPACE_TOO_SMALL, "size is %zu, must be at least %lld", size,
                static_cast<long long>(snapshot.size()));
  }
  if (snapshot.size() > 0 &&
      (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % core::kBufferAlignment != 0)) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "memory is %p, must be memory of the device aligned to %lld bytes", memory,
                static_cast<long long>(core::kBufferAlignment));
  }
  const core::Context context = {validated.device_index, 0, nullptr, stream, &LastError()};
  core::BindPreparation(layout, memory, &validated);
  core::BindPreparation(layout, memory, &made->problem);
  if (layout.size > 0) {
    status = backend->prepare_mask(validated, layout, memory, context);
    if (status != TANDEM_STATUS_OK) return status;
  }
  for (const core::ArrayCopy& copy : snapshot.copies()) {
    status = backend->copy_array(copy, context);
    if (status != TANDEM_STATUS_OK) return status;
  }
  *plan = made.release();
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::dispatch

using namespace tandem::dispatch;  // NOLINT: entry points below

extern "C" {

tandem_status tandem_mask_plan_size(const tandem_problem* problem, const tandem_options* options,
                                    size_t* size) {
  return Guard([&]() -> tandem_status {
    if (size == nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "size is null, must point to a size_t");
    }
    tandem::core::Problem validated;
    const tandem_status status = ReadMask(problem, options, &validated);
    if (status != TANDEM_STATUS_OK) return status;
    Snapshot snapshot(nullptr, tandem::core::LayOutPreparation(validated).size);
    AddMask(&validated, &snapshot);
    *size = static_cast<size_t>(snapshot.size());
    return TANDEM_STATUS_OK;
  });
}

tandem_status tandem_mask_plan_create(const tandem_problem* problem, const tandem_options* options,
                                      void* memory, size_t size, void* stream,
                                      tandem_mask_plan** plan) {
  return Guard([&] { return CreateMaskPlan(problem, options, memory, size, stream, plan); });
}

void tandem_mask_plan_destroy(tandem_mask_plan* plan) { delete plan; }

}  // extern "C"
