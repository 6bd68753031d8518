// tandem_merge: partial results over disjoint keys, merged in the order given.
#include <string>
#include <vector>

#include "core/softmax.h"
#include "core/tensor_check.h"
#include "dispatch/error.h"

namespace tandem::dispatch {
namespace {

tandem_status Merge(tandem_layout layout, int32_t count, const tandem_tensor* const* partial_out,
                    const tandem_tensor* const* partial_lse, const tandem_outputs* outputs) {
  core::Checker check(&LastError());
  const tandem_status invalid = TANDEM_STATUS_INVALID_ARGUMENT;
  if (layout < TANDEM_LAYOUT_BHSD || layout > TANDEM_LAYOUT_THD) {
    return Fail(invalid, "layout is %d, must be TANDEM_LAYOUT_BHSD (1), BSHD (2) or THD (3)",
                layout);
  }
  if (count < 1) return Fail(invalid, "count is %d, must be at least 1", count);
  if (partial_out == nullptr || partial_lse == nullptr) {
    return Fail(invalid, "%s is null, must point to %d tensors",
                partial_out == nullptr ? "partial_out" : "partial_lse", count);
  }
  if (outputs == nullptr || outputs->struct_size != sizeof(tandem_outputs)) {
    return Fail(invalid, "outputs is %s, must point to a tandem_outputs (TANDEM_OUTPUTS_INIT)",
                outputs == nullptr ? "null" : "of another size");
  }
  const bool packed = layout == TANDEM_LAYOUT_THD;
  const int rank = packed ? 3 : 4;
  const std::initializer_list<tandem_dtype> dtypes = {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16,
                                                      TANDEM_DTYPE_BF16};
  if (!check.Tensor("out", outputs->out, dtypes, {rank})) return invalid;
  const tandem_tensor& out = *outputs->out;
  if (out.device_type != TANDEM_DEVICE_CPU) {
    return Fail(TANDEM_STATUS_UNSUPPORTED, "tandem_merge serves CPU tensors only; out is on CUDA");
  }
  // Dimensions of out, in the order of the LSE's: (batch, head, row), packed (head, row).
  const int lse_rank = rank - 1;
  int axis[3] = {0, 1, 2};
  if (layout == TANDEM_LAYOUT_BSHD) axis[1] = 2, axis[2] = 1;
  if (packed) axis[0] = 1, axis[1] = 0;
  auto check_lse = [&](const std::string& name, const tandem_tensor* lse) {
    if (!check.Tensor(name.c_str(), lse, {TANDEM_DTYPE_F32}, {lse_rank})) return false;
    for (int d = 0; d < lse_rank; ++d) {
      if (!check.Dimension(name.c_str(), *lse, d, out.shape[axis[d]], "that of out")) return false;
    }
    return check.SameDevice(name.c_str(), *lse, "out", out);
  };
  if (!check.Writable("out", out)) return invalid;
  if (outputs->lse != nullptr &&
      (!check_lse("lse", outputs->lse) || !check.Writable("lse", *outputs->lse) ||
       !check.Disjoint("lse", *outputs->lse, "out", out))) {
    return invalid;
  }
  for (int32_t n = 0; n < count; ++n) {
    const std::string index = "[" + std::to_string(n) + "]";
    const std::string out_name = "partial_out" + index, lse_name = "partial_lse" + index;
    if (!check.Tensor(out_name.c_str(), partial_out[n], {TANDEM_DTYPE_F32}, {rank}) ||
        !check.SameDevice(out_name.c_str(), *partial_out[n], "out", out)) {
      return invalid;
    }
    for (int d = 0; d < rank; ++d) {
      if (!check.Dimension(out_name.c_str(), *partial_out[n], d, out.shape[d], "that of out"))
        return invalid;
    }
    if (!check_lse(lse_name, partial_lse[n])) return invalid;
    for (const tandem_tensor* input : {partial_out[n], partial_lse[n]}) {
      const char* name = input == partial_out[n] ? out_name.c_str() : lse_name.c_str();
      if (!check.Disjoint("out", out, name, *input)) return invalid;
      if (outputs->lse != nullptr && !check.Disjoint("lse", *outputs->lse, name, *input))
        return invalid;
    }
  }
  if (core::ElementCount(out) == 0) return TANDEM_STATUS_OK;

  const int64_t width = out.shape[rank - 1];
  std::vector<float> row(static_cast<size_t>(width));
  int64_t extent[3] = {1, 1, 1};
  for (int d = 0; d < lse_rank; ++d) extent[d] = out.shape[axis[d]];
  int64_t at[3];
  auto out_offset = [&](const tandem_tensor& t) {
    int64_t offset = 0;
    for (int d = 0; d < lse_rank; ++d) offset += at[d] * t.strides[axis[d]];
    return offset;
  };
  auto lse_offset = [&](const tandem_tensor& t) {
    int64_t offset = 0;
    for (int d = 0; d < lse_rank; ++d) offset += at[d] * t.strides[d];
    return offset;
  };
  for (at[0] = 0; at[0] < extent[0]; ++at[0]) {
    for (at[1] = 0; at[1] < extent[1]; ++at[1]) {
      for (at[2] = 0; at[2] < extent[2]; ++at[2]) {
        float lse = core::NegativeInfinity();
        for (int32_t n = 0; n < count; ++n) {
          const float* values =
              static_cast<const float*>(partial_out[n]->data) + out_offset(*partial_out[n]);
          const float partial =
              static_cast<const float*>(partial_lse[n]->data)[lse_offset(*partial_lse[n])];
          const core::MergeWeights weights = core::MergePartials(lse, partial);
          for (int64_t d = 0; d < width; ++d) {
            row[d] =
                core::MergeValue(weights, row[d], values[d * partial_out[n]->strides[rank - 1]]);
          }
          lse = weights.lse;
        }
        const int64_t offset = out_offset(out);
        for (int64_t d = 0; d < width; ++d) {
          core::StoreFloat(out.data, static_cast<core::DType>(out.dtype),
                           offset + d * out.strides[rank - 1], row[d]);
        }
        if (outputs->lse != nullptr) {
          static_cast<float*>(outputs->lse->data)[lse_offset(*outputs->lse)] = lse;
        }
      }
    }
  }
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::dispatch

extern "C" tandem_status tandem_merge(tandem_layout layout, int32_t count,
                                      const tandem_tensor* const* partial_out,
                                      const tandem_tensor* const* partial_lse,
                                      const tandem_outputs* outputs, void* stream) {
  return tandem::dispatch::Guard([&]() -> tandem_status {
    if (stream != nullptr) {
      return tandem::dispatch::Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                                    "stream is %p, must be null for CPU tensors", stream);
    }
    return tandem::dispatch::Merge(layout, count, partial_out, partial_lse, outputs);
  });
}
