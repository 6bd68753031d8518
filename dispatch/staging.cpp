#include "dispatch/staging.h"

#include <cstring>

#include "core/tensor_check.h"
#include "dispatch/error.h"

namespace tandem::dispatch {
namespace {

// Calls visit(source offset, destination offset) for every element.
template <typename Visit>
void ForEachElement(const tandem_tensor& a, const int64_t* strides_a, const int64_t* strides_b,
                    Visit visit) {
  if (core::ElementCount(a) == 0) return;
  int64_t at[TANDEM_MAX_RANK] = {};
  for (;;) {
    int64_t offset_a = 0, offset_b = 0;
    for (int d = 0; d < a.rank; ++d) {
      offset_a += at[d] * strides_a[d];
      offset_b += at[d] * strides_b[d];
    }
    visit(offset_a, offset_b);
    int d = a.rank - 1;
    while (d >= 0 && ++at[d] == a.shape[d]) at[d--] = 0;
    if (d < 0) return;
  }
}

void RowMajor(const tandem_tensor& tensor, int64_t* strides) {
  int64_t count = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    strides[d] = count;
    count *= tensor.shape[d];
  }
}

// Broadcast dimensions have one element in memory.
tandem_tensor WithoutBroadcast(const tandem_tensor& tensor) {
  tandem_tensor unique = tensor;
  for (int d = 0; d < tensor.rank; ++d) {
    if (tensor.strides[d] == 0 && tensor.shape[d] > 1) unique.shape[d] = 1;
  }
  return unique;
}

}  // namespace

Staging::~Staging() {
  for (void* memory : memory_) backend_.release(memory, context_);
}

tandem_status Staging::Allocate(int64_t size, void** memory) {
  memory_.reserve(memory_.size() + 1);
  const tandem_status status = backend_.allocate(core::Max<int64_t>(size, 1), memory, context_);
  if (status == TANDEM_STATUS_OK) memory_.push_back(*memory);
  return status;
}

tandem_status Staging::Stage(const tandem_tensor** slot) {
  if (*slot == nullptr) return TANDEM_STATUS_OK;
  const tandem_tensor& host = **slot;
  tandem_tensor& device = tensors_.emplace_back(host);
  *slot = &device;
  device.device_type = backend_.device_type;
  device.device_index = device_index_;
  const tandem_tensor unique = WithoutBroadcast(host);
  const int64_t count = core::ElementCount(unique);
  if (count == 0 || host.data == nullptr) return TANDEM_STATUS_OK;
  const core::ByteSpan span = core::SpanOf(host);
  const int64_t span_size = span.end - span.begin;
  const int64_t element = core::ElementSize(static_cast<core::DType>(host.dtype));
  void* memory = nullptr;
  // Bits are copied as they lie; so is whatever lies nearly without gaps.
  if (element == 0 || span_size <= count * element + count * element / 4) {
    tandem_status status = Allocate(span_size, &memory);
    if (status != TANDEM_STATUS_OK) return status;
    device.data = static_cast<char*>(memory) + (static_cast<const char*>(host.data) - span.begin);
    return backend_.copy_to_device(memory, span.begin, span_size, context_);
  }
  std::vector<char> gathered(static_cast<size_t>(count * element));
  int64_t strides[TANDEM_MAX_RANK];
  RowMajor(unique, strides);
  const char* source = static_cast<const char*>(host.data);
  ForEachElement(unique, unique.strides, strides, [&](int64_t from, int64_t to) {
    std::memcpy(gathered.data() + to * element, source + from * element,
                static_cast<size_t>(element));
  });
  for (int d = 0; d < host.rank; ++d) {
    device.strides[d] = unique.shape[d] == host.shape[d] ? strides[d] : 0;
  }
  tandem_status status = Allocate(count * element, &memory);
  if (status != TANDEM_STATUS_OK) return status;
  device.data = memory;
  return backend_.copy_to_device(memory, gathered.data(), count * element, context_);
}

tandem_status Staging::StageOutput(const tandem_tensor** slot) {
  if (*slot == nullptr) return TANDEM_STATUS_OK;
  const tandem_tensor* host = *slot;
  tandem_tensor& device = tensors_.emplace_back(*host);
  *slot = &device;
  device.device_type = backend_.device_type;
  device.device_index = device_index_;
  RowMajor(device, device.strides);
  pending_.push_back({host, &device});
  return Allocate(
      core::ElementCount(device) * core::ElementSize(static_cast<core::DType>(device.dtype)),
      &device.data);
}

tandem_status Staging::StageTerm(const tandem_mask_term* source, const core::Problem& validated) {
  Term& term = terms_.emplace_back();
  std::memcpy(&term, source, source->struct_size);
  term_pointers_.push_back(&term.head);
  std::vector<const tandem_tensor**> slots;
  switch (source->kind) {
    case TANDEM_MASK_BAND:
      slots = {&term.band.left_per_head, &term.band.right_per_head, &term.band.prefix};
      break;
    case TANDEM_MASK_ROW_RANGES:
      slots = {&term.row_ranges.ranges};
      break;
    case TANDEM_MASK_LENGTHS:
      slots = {&term.lengths.q_lengths, &term.lengths.kv_lengths};
      break;
    case TANDEM_MASK_PACKED:
      slots = {&term.packed.cu_seqlens_q, &term.packed.cu_seqlens_k};
      term.packed.max_q_len =
          core::Min<int64_t>(core::Max<int64_t>(validated.q_rows, 1), validated.q_total);
      term.packed.max_kv_len =
          core::Min<int64_t>(core::Max<int64_t>(validated.kv_rows, 1), validated.kv_total);
      break;
    case TANDEM_MASK_SEGMENTS:
      slots = {&term.segments.q_segments, &term.segments.kv_segments};
      break;
    case TANDEM_MASK_DENSE:
      slots = {&term.dense.mask, &term.dense.sequence_offsets};
      break;
    default:
      slots = {&term.block_sparse.counts, &term.block_sparse.indices,
               &term.block_sparse.full_counts, &term.block_sparse.full_indices};
      break;
  }
  for (const tandem_tensor** slot : slots) {
    const tandem_status status = Stage(slot);
    if (status != TANDEM_STATUS_OK) return status;
  }
  return TANDEM_STATUS_OK;
}

tandem_status Staging::StageGradients(bool has_pairs) {
  for (const tandem_tensor** slot :
       {&outputs_.out, &outputs_.lse, &gradients_.dout, &gradients_.dlse}) {
    const tandem_status status = Stage(slot);
    if (status != TANDEM_STATUS_OK) return status;
  }
  if (!has_pairs && gradients_.dbias != nullptr) {
    tandem_tensor& zeros = tensors_.emplace_back(*gradients_.dbias);
    RowMajor(zeros, zeros.strides);
    zeros.data = nullptr;
    pending_.push_back({gradients_.dbias, &zeros});
    gradients_.dbias = nullptr;
  }
  for (const tandem_tensor** slot : {&gradients_.dq, &gradients_.dk, &gradients_.dv,
                                     &gradients_.dbias, &gradients_.dsink, &gradients_.dalibi}) {
    const tandem_status status = StageOutput(slot);
    if (status != TANDEM_STATUS_OK) return status;
  }
  return TANDEM_STATUS_OK;
}

tandem_status Staging::Upload(const tandem_problem& problem, const tandem_outputs& outputs,
                              const tandem_gradients* gradients, const core::Problem& validated) {
  problem_ = problem;
  outputs_ = outputs;
  has_gradients_ = gradients != nullptr;
  if (has_gradients_) gradients_ = *gradients;
  problem_.device_status = nullptr;  // the host has checked the data
  // Packed sequences without a single pair: their longest length is 0, which a device problem
  // cannot say, and no term but the lengths has a meaning.
  const bool has_pairs =
      validated.layout != core::Layout::kTHD || (validated.q_rows > 0 && validated.kv_rows > 0);
  if (!has_pairs) problem_.bias = nullptr;
  for (const tandem_tensor** slot :
       {&problem_.q, &problem_.k, &problem_.v, &problem_.bias, &problem_.alibi_slopes,
        &problem_.sink, &problem_.block_table}) {
    const tandem_status status = Stage(slot);
    if (status != TANDEM_STATUS_OK) return status;
  }
  for (int t = 0; t < problem.mask_term_count; ++t) {
    const tandem_mask_kind kind = problem.mask_terms[t]->kind;
    if (!has_pairs && kind != TANDEM_MASK_PACKED && kind != TANDEM_MASK_LENGTHS) continue;
    const tandem_status status = StageTerm(problem.mask_terms[t], validated);
    if (status != TANDEM_STATUS_OK) return status;
  }
  problem_.mask_terms = term_pointers_.data();
  problem_.mask_term_count = static_cast<int32_t>(term_pointers_.size());
  if (has_gradients_) return StageGradients(has_pairs);
  const tandem_status status = StageOutput(&outputs_.out);
  return status == TANDEM_STATUS_OK ? StageOutput(&outputs_.lse) : status;
}

tandem_status Staging::Download() {
  // Everything is fetched before anything is written.
  std::vector<std::vector<char>> fetched;
  for (const PendingOutput& output : pending_) {
    const int64_t element = core::ElementSize(static_cast<core::DType>(output.host->dtype));
    const int64_t size = core::ElementCount(*output.device) * element;
    std::vector<char>& buffer = fetched.emplace_back(static_cast<size_t>(size));
    if (size == 0 || output.device->data == nullptr) continue;
    const tandem_status status =
        backend_.copy_to_host(buffer.data(), output.device->data, size, context_);
    if (status != TANDEM_STATUS_OK) return status;
  }
  for (size_t n = 0; n < pending_.size(); ++n) {
    const tandem_tensor& host = *pending_[n].host;
    const int64_t element = core::ElementSize(static_cast<core::DType>(host.dtype));
    char* destination = static_cast<char*>(host.data);
    ForEachElement(host, pending_[n].device->strides, host.strides, [&](int64_t from, int64_t to) {
      std::memcpy(destination + to * element, fetched[n].data() + from * element,
                  static_cast<size_t>(element));
    });
  }
  return TANDEM_STATUS_OK;
}

}  // namespace tandem::dispatch
