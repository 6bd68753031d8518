// tandem_merge: partial results over disjoint keys, merged in the order given.
#include <vector>

#include "core/softmax.h"
#include "core/tensor_check.h"
#include "dispatch/error.h"

namespace tandem::dispatch {
namespace {

class Merger {
 public:
  Merger(tandem_layout layout, int32_t count, const tandem_tensor* const* partial_out,
         const tandem_tensor* const* partial_lse)
      : layout_(layout),
        rank_(layout == TANDEM_LAYOUT_THD ? 3 : 4),
        count_(count),
        partial_out_(partial_out),
        partial_lse_(partial_lse),
        check_(&LastError()) {}

  bool Check(const tandem_outputs* outputs) {
    if (layout_ < TANDEM_LAYOUT_BHSD || layout_ > TANDEM_LAYOUT_THD) {
      return check_.Fail("layout is %d, must be TANDEM_LAYOUT_BHSD (1), BSHD (2) or THD (3)",
                         layout_);
    }
    if (count_ < 1) return check_.Fail("count is %d, must be at least 1", count_);
    if (partial_out_ == nullptr || partial_lse_ == nullptr) {
      return check_.Fail("%s is null, must point to %d tensors",
                         partial_out_ == nullptr ? "partial_out" : "partial_lse", count_);
    }
    if (outputs == nullptr || outputs->struct_size != sizeof(tandem_outputs)) {
      return check_.Fail("outputs is %s, must point to a tandem_outputs (TANDEM_OUTPUTS_INIT)",
                         outputs == nullptr ? "null" : "of another size");
    }
    if (!check_.Tensor("out", outputs->out, {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16},
                       {rank_}) ||
        !check_.Writable("out", *outputs->out)) {
      return false;
    }
    out_ = outputs->out;
    // The dimensions of out in the order of the LSE's: batch (but packed), head, row.
    if (layout_ == TANDEM_LAYOUT_BSHD) axis_[1] = 2, axis_[2] = 1;
    if (layout_ == TANDEM_LAYOUT_THD) axis_[0] = 1, axis_[1] = 0;
    lse_ = outputs->lse;
    if (lse_ != nullptr && (!CheckLse("lse", lse_) || !check_.Writable("lse", *lse_) ||
                            !check_.Disjoint("lse", *lse_, "out", *out_))) {
      return false;
    }
    for (int32_t n = 0; n < count_; ++n) {
      if (!CheckPartial(n)) return false;
    }
    return true;
  }

  void Run() {
    if (core::ElementCount(*out_) == 0) return;
    int64_t extent[3] = {1, 1, 1};
    for (int d = 0; d < rank_ - 1; ++d) extent[d] = out_->shape[axis_[d]];
    std::vector<float> row(static_cast<size_t>(out_->shape[rank_ - 1]));
    int64_t at[3];
    for (at[0] = 0; at[0] < extent[0]; ++at[0]) {
      for (at[1] = 0; at[1] < extent[1]; ++at[1]) {
        for (at[2] = 0; at[2] < extent[2]; ++at[2]) MergeRow(at, &row);
      }
    }
  }

  const tandem_tensor& out() const { return *out_; }

 private:
  bool CheckLse(const char* name, const tandem_tensor* lse) {
    if (!check_.Tensor(name, lse, {TANDEM_DTYPE_F32}, {rank_ - 1})) return false;
    for (int d = 0; d < rank_ - 1; ++d) {
      if (!check_.Dimension(name, *lse, d, out_->shape[axis_[d]], "that of out")) return false;
    }
    return check_.SameDevice(name, *lse, "out", *out_);
  }

  bool CheckPartial(int32_t n) {
    core::Text out_name, lse_name;
    core::Format(&out_name, "partial_out[%d]", n);
    core::Format(&lse_name, "partial_lse[%d]", n);
    const tandem_tensor* partial = partial_out_[n];
    if (!check_.Tensor(out_name.data, partial, {TANDEM_DTYPE_F32}, {rank_}) ||
        !check_.SameDevice(out_name.data, *partial, "out", *out_)) {
      return false;
    }
    for (int d = 0; d < rank_; ++d) {
      if (!check_.Dimension(out_name.data, *partial, d, out_->shape[d], "that of out"))
        return false;
    }
    return CheckLse(lse_name.data, partial_lse_[n]) &&
           check_.Disjoint("out", *out_, out_name.data, *partial) &&
           check_.Disjoint("out", *out_, lse_name.data, *partial_lse_[n]) &&
           (lse_ == nullptr || (check_.Disjoint("lse", *lse_, out_name.data, *partial) &&
                                check_.Disjoint("lse", *lse_, lse_name.data, *partial_lse_[n])));
  }

  int64_t OutOffset(const tandem_tensor& t, const int64_t* at) const {
    int64_t offset = 0;
    for (int d = 0; d < rank_ - 1; ++d) offset += at[d] * t.strides[axis_[d]];
    return offset;
  }
  int64_t LseOffset(const tandem_tensor& t, const int64_t* at) const {
    int64_t offset = 0;
    for (int d = 0; d < rank_ - 1; ++d) offset += at[d] * t.strides[d];
    return offset;
  }

  void MergeRow(const int64_t* at, std::vector<float>* row) {
    float lse = core::NegativeInfinity();
    row->assign(row->size(), 0.0f);
    for (int32_t n = 0; n < count_; ++n) {
      const tandem_tensor& partial = *partial_out_[n];
      const float* values = static_cast<const float*>(partial.data) + OutOffset(partial, at);
      const core::MergeWeights weights = core::MergePartials(
          lse, static_cast<const float*>(partial_lse_[n]->data)[LseOffset(*partial_lse_[n], at)]);
      for (size_t d = 0; d < row->size(); ++d) {
        const float value = values[static_cast<int64_t>(d) * partial.strides[rank_ - 1]];
        (*row)[d] = core::MergeValue(weights, (*row)[d], value);
      }
      lse = weights.lse;
    }
    const int64_t offset = OutOffset(*out_, at);
    for (size_t d = 0; d < row->size(); ++d) {
      core::StoreFloat(out_->data, static_cast<core::DType>(out_->dtype),
                       offset + static_cast<int64_t>(d) * out_->strides[rank_ - 1], (*row)[d]);
    }
    if (lse_ != nullptr) static_cast<float*>(lse_->data)[LseOffset(*lse_, at)] = lse;
  }

  tandem_layout layout_;
  int rank_;
  int32_t count_;
  const tandem_tensor* const* partial_out_;
  const tandem_tensor* const* partial_lse_;
  core::Checker check_;
  const tandem_tensor* out_ = nullptr;
  const tandem_tensor* lse_ = nullptr;
  int axis_[3] = {0, 1, 2};
};

}  // namespace
}  // namespace tandem::dispatch

extern "C" tandem_status tandem_merge(tandem_layout layout, int32_t count,
                                      const tandem_tensor* const* partial_out,
                                      const tandem_tensor* const* partial_lse,
                                      const tandem_outputs* outputs, void* stream) {
  using tandem::dispatch::Fail;
  return tandem::dispatch::Guard([&]() -> tandem_status {
    tandem::dispatch::Merger merger(layout, count, partial_out, partial_lse);
    if (!merger.Check(outputs)) return TANDEM_STATUS_INVALID_ARGUMENT;
    if (merger.out().device_type != TANDEM_DEVICE_CPU) {
      return Fail(TANDEM_STATUS_UNSUPPORTED, "out is on CUDA; tandem_merge serves CPU tensors");
    }
    if (stream != nullptr) {
      return Fail(TANDEM_STATUS_INVALID_ARGUMENT, "stream is %p, must be null for CPU tensors",
                  stream);
    }
    merger.Run();
    return TANDEM_STATUS_OK;
  });
}
