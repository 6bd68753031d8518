#include "core/validate.h"

#include <cmath>
#include <cstring>

#include "core/mask_plan.h"
#include "core/mask_prepare.h"
#include "core/tensor_check.h"
#include "core/validate_cache.h"
#include "core/validate_mask.h"
#include "core/validate_outputs.h"
#include "core/validate_pages.h"

namespace tandem::core {
namespace {

constexpr int64_t kMostHeads = int64_t{1} << 24;
constexpr int64_t kMostSequences = (int64_t{1} << 31) - 1;
constexpr int64_t kWidestHead = int64_t{1} << 16;

class ProblemValidator {
 public:
  ProblemValidator(const tandem_problem& input, Problem* p, Text* error)
      : in_(input), p_(*p), check_(error) {}

  bool Run(const tandem_outputs* outputs, const tandem_gradients* gradients) {
    needs_data_ = outputs != nullptr;
    has_gradients_ = gradients != nullptr;
    return Header() && Inputs() && Shapes() && Sequences() && Scalars() && Terms() &&
           ScoreTensors() && Sizes() &&
           (outputs == nullptr || OutputTensors(in_, *outputs, gradients, &check_, &p_));
  }

 private:
  bool Header() {
    if (in_.struct_size != sizeof(tandem_problem)) {
      return check_.Fail("problem: struct_size is %u, must be %zu (use TANDEM_PROBLEM_INIT)",
                         in_.struct_size, sizeof(tandem_problem));
    }
    if (in_.layout < TANDEM_LAYOUT_BHSD || in_.layout > TANDEM_LAYOUT_THD) {
      return check_.Fail("layout is %d, must be TANDEM_LAYOUT_BHSD (1), BSHD (2) or THD (3)",
                         in_.layout);
    }
    p_.layout = static_cast<Layout>(in_.layout);
    return true;
  }

  bool Inputs() {
    const int rank = p_.layout == Layout::kTHD ? 3 : 4;
    const bool paged = in_.block_table != nullptr;
    const std::initializer_list<tandem_dtype> dtypes = {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16,
                                                        TANDEM_DTYPE_BF16};
    if (!check_.Tensor("q", in_.q, dtypes, {rank}, needs_data_)) return false;
    if (in_.kv_cache != nullptr) {
      if (!TakeCache(in_, has_gradients_, &check_, &cached_, &p_)) return false;
      in_.k = &cached_.k;
      in_.v = &cached_.v;
    }
    const int kv_rank = paged ? 4 : rank;
    if (!check_.Tensor("k", in_.k, {in_.q->dtype}, {kv_rank}, needs_data_)) return false;
    if (!check_.Tensor("v", in_.v, {in_.q->dtype}, {kv_rank}, needs_data_)) return false;
    p_.dtype = static_cast<DType>(in_.q->dtype);
    p_.device_type = in_.q->device_type;
    p_.device_index = in_.q->device_index;
    return SameDevice("k", in_.k) && SameDevice("v", in_.v);
  }

  bool SameDevice(const char* name, const tandem_tensor* tensor) {
    return check_.SameDevice(name, *tensor, "q", *in_.q);
  }

  bool Shapes() {
    const auto [batch, head, row, column] = AxesOf(p_.layout);
    const tandem_tensor &q = *in_.q, &k = *in_.k, &v = *in_.v;
    p_.q = ViewOf(p_.layout, q);
    p_.k = ViewOf(p_.layout, k);
    p_.v = ViewOf(p_.layout, v);
    p_.q_heads = q.shape[head];
    p_.qk_dim = q.shape[column];
    p_.kv_heads = k.shape[head];
    p_.v_dim = v.shape[column];
    p_.batch = batch < 0 ? 0 : q.shape[batch];
    if (p_.q_heads < 1 || p_.q_heads > kMostHeads) {
      return check_.Fail("q: shape is %s; it has %lld heads, must have 1 to 2^24",
                         ShapeString(q).c_str(), static_cast<long long>(p_.q_heads));
    }
    if (p_.qk_dim < 1 || p_.qk_dim > kWidestHead) {
      return check_.Fail("q: shape is %s; the head dimension is %lld, must be 1 to 65536",
                         ShapeString(q).c_str(), static_cast<long long>(p_.qk_dim));
    }
    if (p_.v_dim < 1 || p_.v_dim > kWidestHead) {
      return check_.Fail("v: shape is %s; the head dimension is %lld, must be 1 to 65536",
                         ShapeString(v).c_str(), static_cast<long long>(p_.v_dim));
    }
    if (p_.batch > kMostSequences) {
      return check_.Fail("q: shape is %s; the batch is %lld, must be below 2^31",
                         ShapeString(q).c_str(), static_cast<long long>(p_.batch));
    }
    if (in_.block_table != nullptr) return TakePages(in_, needs_data_, &check_, &p_);
    if (p_.kv_heads < 1 || p_.q_heads % p_.kv_heads != 0) {
      return check_.Fail("k: shape is %s; it has %lld heads, must divide the %lld heads of q",
                         ShapeString(k).c_str(), static_cast<long long>(p_.kv_heads),
                         static_cast<long long>(p_.q_heads));
    }
    p_.group = p_.q_heads / p_.kv_heads;
    if (batch >= 0 && !(check_.Dimension("k", k, batch, p_.batch, "the batch of q") &&
                        check_.Dimension("v", v, batch, p_.batch, "the batch of q"))) {
      return false;
    }
    if (!(check_.Dimension("k", k, column, p_.qk_dim, "the head dimension of q") &&
          check_.Dimension("v", v, head, p_.kv_heads, "the heads of k") &&
          check_.Dimension("v", v, row, k.shape[row], "the rows of k"))) {
      return false;
    }
    p_.q_rows = q.shape[row];
    p_.kv_rows = k.shape[row];
    return true;
  }

  bool Sequences() {
    const bool packed = p_.layout == Layout::kTHD;
    if (in_.mask_term_count < 0 || in_.mask_term_count > kMostMaskTerms) {
      return check_.Fail("mask_term_count is %d, must be in [0, %d]", in_.mask_term_count,
                         kMostMaskTerms);
    }
    if (in_.mask_term_count > 0 && in_.mask_terms == nullptr) {
      return check_.Fail("mask_terms is null, must point to %d terms", in_.mask_term_count);
    }
    if (in_.mask_plan != nullptr && in_.mask_term_count != 0) {
      return check_.Fail("mask_term_count is %d, must be 0 with a mask_plan", in_.mask_term_count);
    }
    if (packed) {
      p_.q_total = p_.q_rows;
      p_.kv_total = p_.kv_rows;
      if (in_.mask_plan != nullptr) {
        p_.batch = in_.mask_plan->problem.batch;
        p_.q_rows = in_.mask_plan->problem.q_rows;
        p_.kv_rows = in_.mask_plan->problem.kv_rows;
      } else if (!PackedSequences(in_, &check_, &p_)) {
        return false;
      }
    }
    if (p_.q_rows > kLongestSequence || p_.kv_rows > kLongestSequence) {
      return check_.Fail(
          "%s has %lld rows in one sequence, must have below 2^31 - 64",
          p_.q_rows > kLongestSequence ? "q" : "k",
          static_cast<long long>(p_.q_rows > kLongestSequence ? p_.q_rows : p_.kv_rows));
    }
    return Shard();
  }

  bool Shard() {
    const struct {
      const char* offset_name;
      const char* length_name;
      int64_t offset;
      int64_t length;
      int64_t rows;
      int64_t* offset_out;
      int64_t* length_out;
    } sides[] = {
        {"q_offset", "global_q_len", in_.q_offset, in_.global_q_len, p_.q_rows, &p_.q_offset,
         &p_.global_q_len},
        {"kv_offset", "global_kv_len", in_.kv_offset, in_.global_kv_len, p_.kv_rows, &p_.kv_offset,
         &p_.global_kv_len},
    };
    for (const auto& side : sides) {
      if (p_.layout == Layout::kTHD && (side.offset != 0 || side.length != 0)) {
        return check_.Fail("%s is %lld and %s is %lld, must be 0 with layout THD", side.offset_name,
                           static_cast<long long>(side.offset), side.length_name,
                           static_cast<long long>(side.length));
      }
      if (side.length < 0 || side.length > kLongestSequence) {
        return check_.Fail("%s is %lld, must be in [0, 2^31 - 65]", side.length_name,
                           static_cast<long long>(side.length));
      }
      const int64_t length = side.length == 0 ? side.rows : side.length;
      if (side.offset < 0 || side.offset > length - side.rows) {
        return check_.Fail("%s is %lld, must be in [0, %lld] (%s %lld less the %lld rows here)",
                           side.offset_name, static_cast<long long>(side.offset),
                           static_cast<long long>(length - side.rows), side.length_name,
                           static_cast<long long>(length), static_cast<long long>(side.rows));
      }
      *side.offset_out = side.offset;
      *side.length_out = length;
    }
    return true;
  }

  bool Scalars() {
    if (in_.has_scale != 0 && in_.has_scale != 1) {
      return check_.Fail("has_scale is %d, must be 0 or 1", in_.has_scale);
    }
    p_.scale = in_.has_scale ? in_.scale
                             : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p_.qk_dim)));
    if (!std::isfinite(p_.scale)) {
      return check_.Fail("scale is %g, must be finite", static_cast<double>(p_.scale));
    }
    if (!std::isfinite(in_.softcap) || in_.softcap < 0) {
      return check_.Fail("softcap is %g, must be finite and >= 0 (0: none)",
                         static_cast<double>(in_.softcap));
    }
    p_.softcap = in_.softcap;
    if (!(in_.dropout_rate >= 0.0f && in_.dropout_rate < 1.0f)) {
      return check_.Fail("dropout_rate is %g, must be in [0, 1)",
                         static_cast<double>(in_.dropout_rate));
    }
    if (in_.dropout_rate > 0.0f) {
      if (in_.dropout_offset > UINT32_MAX) {
        return check_.Fail("dropout_offset is %llu, must be below 2^32",
                           static_cast<unsigned long long>(in_.dropout_offset));
      }
      if (p_.batch * p_.q_heads > int64_t{UINT32_MAX}) {
        return check_.Fail("dropout_rate is %g, must be 0 where batch * heads exceeds 2^32",
                           static_cast<double>(in_.dropout_rate));
      }
      p_.dropout.enabled = 1;
      p_.dropout.seed = in_.dropout_seed;
      p_.dropout.offset = in_.dropout_offset;
      const double rate = static_cast<double>(in_.dropout_rate);
      p_.dropout.threshold = static_cast<uint32_t>(std::floor(rate * 4294967296.0));
      p_.dropout.keep_scale = static_cast<float>(1.0 / (1.0 - rate));
    }
    p_.device_status = in_.device_status;
    return true;
  }

  bool Terms() {
    if (in_.mask_plan == nullptr)
      return MaskTerms(in_, &check_, &p_) && CachedLengths(in_, &check_, p_) &&
             ListedPages(needs_data_, &check_, p_);
    const Problem& plan = in_.mask_plan->problem;
    const struct {
      const char* what;
      int64_t mine, planned;
    } pairs[] = {
        {"layout", static_cast<int64_t>(p_.layout), static_cast<int64_t>(plan.layout)},
        {"device type", p_.device_type, plan.device_type},
        {"device index", p_.device_index, plan.device_index},
        {"batch", p_.batch, plan.batch},
        {"number of query heads", p_.q_heads, plan.q_heads},
        {"number of query rows", p_.layout == Layout::kTHD ? p_.q_total : p_.q_rows,
         p_.layout == Layout::kTHD ? plan.q_total : plan.q_rows},
        {"number of key rows", p_.layout == Layout::kTHD ? p_.kv_total : p_.kv_rows,
         p_.layout == Layout::kTHD ? plan.kv_total : plan.kv_rows},
        {"q_offset", p_.q_offset, plan.q_offset},
        {"kv_offset", p_.kv_offset, plan.kv_offset},
        {"global_q_len", p_.global_q_len, plan.global_q_len},
        {"global_kv_len", p_.global_kv_len, plan.global_kv_len},
    };
    for (const auto& pair : pairs) {
      if (pair.mine != pair.planned) {
        return check_.Fail(
            "mask_plan: it was made for a %s of %lld, must be that of the problem, "
            "%lld",
            pair.what, static_cast<long long>(pair.planned), static_cast<long long>(pair.mine));
      }
    }
    AdoptMask(plan, &p_);
    return ListedPages(needs_data_, &check_, p_);
  }

  bool ScoreTensors() {
    if (in_.bias != nullptr) {
      const std::initializer_list<tandem_dtype> dtypes = {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16,
                                                          TANDEM_DTYPE_BF16};
      if (!check_.Tensor("bias", in_.bias, dtypes, {2, 3, 4}) || !SameDevice("bias", in_.bias))
        return false;
      p_.bias.data = in_.bias->data;
      p_.bias.dtype = static_cast<DType>(in_.bias->dtype);
      if (!ScoreMatrixStrides("bias", *in_.bias, p_, &check_, &p_.bias.batch_stride,
                              &p_.bias.head_stride, &p_.bias.row_stride, &p_.bias.column_stride)) {
        return false;
      }
    }
    if (in_.alibi_slopes != nullptr) {
      const tandem_tensor& t = *in_.alibi_slopes;
      if (!check_.Tensor("alibi_slopes", &t, {TANDEM_DTYPE_F32}, {1, 2})) return false;
      if (!SameDevice("alibi_slopes", &t)) return false;
      if (!check_.Dimension("alibi_slopes", t, t.rank - 1, p_.q_heads, "the heads of q"))
        return false;
      if (t.rank == 2 && !check_.Dimension("alibi_slopes", t, 0, p_.batch, "the batch"))
        return false;
      if (in_.alibi_alignment != TANDEM_ALIGN_TOP_LEFT &&
          in_.alibi_alignment != TANDEM_ALIGN_BOTTOM_RIGHT) {
        return check_.Fail(
            "alibi_alignment is %d, must be TANDEM_ALIGN_TOP_LEFT (1) or "
            "TANDEM_ALIGN_BOTTOM_RIGHT (2)",
            in_.alibi_alignment);
      }
      p_.alibi_slopes = static_cast<const float*>(t.data);
      p_.alibi_batch_stride = t.rank == 2 ? BroadcastStride(t, 0) : 0;
      p_.alibi_head_stride = BroadcastStride(t, t.rank - 1);
      p_.alibi_alignment = static_cast<Alignment>(in_.alibi_alignment);
    }
    if (in_.sink != nullptr) {
      if (!check_.Tensor("sink", in_.sink, {TANDEM_DTYPE_F32}, {1})) return false;
      if (!SameDevice("sink", in_.sink)) return false;
      if (!check_.Dimension("sink", *in_.sink, 0, p_.q_heads, "the heads of q")) return false;
      p_.sink = static_cast<const float*>(in_.sink->data);
      p_.sink_stride = in_.sink->strides[0];
    }
    return true;
  }

  // Every size that is later computed by multiplication fits.
  bool Sizes() {
    auto fits = [](std::initializer_list<int64_t> factors) {
      int64_t product = 64;  // head room for element sizes and tile padding
      for (int64_t factor : factors) {
        if (__builtin_mul_overflow(product, factor + 64, &product)) return false;
      }
      return true;
    };
    const int64_t rows_q =
        p_.layout == Layout::kTHD ? p_.q_total + 64 * p_.batch : p_.batch * (p_.q_rows + 64);
    const int64_t rows_k =
        p_.layout == Layout::kTHD ? p_.kv_total + 64 * p_.batch : p_.batch * (p_.kv_rows + 64);
    if (!fits({rows_q, p_.q_heads, p_.qk_dim + p_.v_dim})) {
      return check_.Fail("q: shape is %s; the problem has more than 2^63 bytes of rows",
                         ShapeString(*in_.q).c_str());
    }
    if (!fits({rows_k, p_.kv_heads, p_.qk_dim + p_.v_dim})) {
      return check_.Fail("k: shape is %s; the problem has more than 2^63 bytes of rows",
                         ShapeString(*in_.k).c_str());
    }
    return PreparationFits(&check_, p_);
  }

  tandem_problem in_;  // k and v are those of the cache, where it is given
  CachedTensors cached_;
  bool needs_data_ = true;
  bool has_gradients_ = false;
  Problem& p_;
  Checker check_;
};

}  // namespace

tandem_status Validate(const tandem_problem* problem, const tandem_outputs* outputs,
                       const tandem_gradients* gradients, Problem* result, Text* error) {
  std::memset(result, 0, sizeof(*result));
  if (problem == nullptr) {
    Format(error, "problem is null, must point to a tandem_problem");
    return TANDEM_STATUS_INVALID_ARGUMENT;
  }
  return ProblemValidator(*problem, result, error).Run(outputs, gradients)
             ? TANDEM_STATUS_OK
             : TANDEM_STATUS_INVALID_ARGUMENT;
}

}  // namespace tandem::core
