#include "tests/support/backward_case.h"

#include <algorithm>

namespace tandem::test {
namespace {

CaseSpec WithLse(CaseSpec spec) {
  spec.lse = true;
  return spec;
}

// A tensor of the same shape that may be written.
Tensor Like(const Tensor& tensor, tandem_dtype dtype, Strides strides, Placement placement) {
  strides.broadcast = 0;
  return Tensor(dtype, tensor.shape(), strides, placement);
}

}  // namespace

BackwardCase::BackwardCase(CaseSpec given) : case_(WithLse(std::move(given))) {
  const CaseSpec& s = spec();
  const tandem_dtype dtype = s.out_f32 ? TANDEM_DTYPE_F32 : s.dtype;
  const Placement place = s.placement;
  Random random(s.seed * 64 + 40);
  dout_.emplace(Like(case_.out(), dtype, s.out_strides, place));
  dout_->FillNormal(random, 1.0);
  dlse_.emplace(Like(*case_.lse(), TANDEM_DTYPE_F32, s.lse_strides, place));
  dlse_->FillNormal(random, 1.0);
  dq_.emplace(Like(case_.q(), dtype, s.q_strides, place));
  dk_.emplace(Like(case_.k(), dtype, s.k_strides, place));
  dv_.emplace(Like(case_.v(), dtype, s.v_strides, place));
  gradients_.dout = dout_->get();
  gradients_.dlse = dlse_->get();
  gradients_.dq = dq_->get();
  gradients_.dk = dk_->get();
  gradients_.dv = dv_->get();
  if (case_.bias()) {
    dbias_.emplace(Like(*case_.bias(), TANDEM_DTYPE_F32, s.bias.strides, place));
    gradients_.dbias = dbias_->get();
  }
  if (case_.sink()) {
    dsink_.emplace(Like(*case_.sink(), TANDEM_DTYPE_F32, {}, place));
    gradients_.dsink = dsink_->get();
  }
  if (case_.alibi()) {
    dalibi_.emplace(Like(*case_.alibi(), TANDEM_DTYPE_F32, {}, place));
    gradients_.dalibi = dalibi_->get();
  }
}

tandem_status BackwardCase::RunForward() {
  case_.PrefillOutputs();
  return RunKernel({"reference.cpu", TANDEM_DEVICE_CPU, ""}, case_);
}

std::vector<Tensor*> BackwardCase::Written() {
  std::vector<Tensor*> all;
  for (std::optional<Tensor>* tensor : {&dq_, &dk_, &dv_, &dbias_, &dsink_, &dalibi_}) {
    if (tensor->has_value()) all.push_back(&**tensor);
  }
  return all;
}

void BackwardCase::PrefillGradients(uint8_t byte) {
  for (Tensor* tensor : Written()) tensor->FillBytes(byte);
}

std::vector<uint8_t> BackwardCase::GradientBytes() {
  std::vector<uint8_t> bytes;
  for (const Tensor* tensor : Written()) {
    const std::vector<uint8_t> one = tensor->ElementBytes();
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  return bytes;
}

bool BackwardCase::GradientsHold(uint8_t byte) {
  const std::vector<Tensor*> all = Written();
  return std::all_of(all.begin(), all.end(), [byte](const Tensor* tensor) {
    const std::vector<uint8_t> bytes = tensor->Bytes();
    return std::all_of(bytes.begin(), bytes.end(), [byte](uint8_t b) { return b == byte; });
  });
}

bool BackwardCase::GapsHold(uint8_t byte) {
  const std::vector<Tensor*> all = Written();
  return std::all_of(all.begin(), all.end(),
                     [byte](const Tensor* tensor) { return tensor->GapsHold(byte); });
}

tandem_status RunBackward(const Kernel& kernel, BackwardCase& problem,
                          const RunSettings& settings) {
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.device_type = kernel.device;
  options.kernel = kernel.name.c_str();
  options.threads = settings.threads;
  options.executor = settings.executor;
  return tandem_attention_backward(&problem.forward().problem(), &problem.forward().outputs(),
                                   &problem.gradients(), &options);
}

namespace {

// efficient_cuda_backward.sm90. With a bias, which has rows of its own, and all gradients at once
// (`is_fused`) rows see one interval of keys beside dense masks. Scores are scaled products and
// that bias, or, in 16 bits alone, go through other terms.
bool MustAcceptBackwardOnHopper(const CaseSpec& spec, bool is_fused) {
  const bool is_f32 = spec.dtype == TANDEM_DTYPE_F32 || spec.out_f32;
  const bool has_bias = spec.bias.dtype != TANDEM_DTYPE_UNSET;
  const bool sees_intervals = is_fused || has_bias;
  const bool has_score_terms =
      spec.softcap != 0.0f || spec.alibi_rank != 0 || spec.dropout_rate != 0.0f;
  const auto is_served = [&](const TermSpec& term) {
    switch (term.kind) {
      case TANDEM_MASK_LENGTHS:
        return true;
      case TANDEM_MASK_DENSE:
        return spec.kv_offset % 64 == 0;
      case TANDEM_MASK_BAND:
        return !sees_intervals || !term.prefix || (term.left < 0 && !term.widths_per_head);
      case TANDEM_MASK_ROW_RANGES:
        return false;
      case TANDEM_MASK_SEGMENTS:
        return !sees_intervals && (is_f32 || has_score_terms);
      default:
        return !sees_intervals;
    }
  };
  const bool is_bias_served = !has_bias || (IsBiasOnHopper(spec) && !is_f32 && !is_fused &&
                                            spec.bias.per_row && spec.q_rows > 1);
  return std::max(spec.qk_dim, spec.v_dim) <= 128 && is_bias_served &&
         !(has_score_terms && (is_fused || has_bias || is_f32)) &&
         std::all_of(spec.terms.begin(), spec.terms.end(), is_served);
}

}  // namespace

bool MustAcceptBackward(const Kernel& kernel, const CaseSpec& spec) {
  if (kernel.name == "reference.cpu" || kernel.name == "fake_cuda.reference") return true;
  const bool is_cuda = kernel.name.starts_with("efficient_cuda_backward.");
  if (!is_cuda && !kernel.name.starts_with("flash_cpu_backward.")) return false;
  const bool dtype = (kernel.name.ends_with(".f32") && spec.dtype == TANDEM_DTYPE_F32) ||
                     (kernel.name.ends_with(".f16") && spec.dtype == TANDEM_DTYPE_F16) ||
                     (kernel.name.ends_with(".bf16") && spec.dtype == TANDEM_DTYPE_BF16);
  if (!dtype) return false;
  if (kernel.name.starts_with("efficient_cuda_backward.sm90_fused.")) {
    return MustAcceptBackwardOnHopper(spec, true) && !spec.out_f32;
  }
  if (kernel.name.starts_with("efficient_cuda_backward.sm90.")) {
    return MustAcceptBackwardOnHopper(spec, false);
  }
  return std::max(spec.qk_dim, spec.v_dim) <= (is_cuda ? 256 : 512);
}

}  // namespace tandem::test
