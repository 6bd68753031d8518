// The packed term: which rows are whose, and the longest sequences.
#include "core/mask_prepare.h"
#include "core/validate_mask.h"
#include "core/validate_term.h"

namespace tandem::core {
namespace {

class PackedValidator : public TermCheck {
 public:
  PackedValidator(const tandem_problem& in, Checker* check, Problem* p)
      : TermCheck(in, check), p_(*p) {}

  bool Packed() {
    const tandem_packed_term* packed = nullptr;
    for (int t = 0; t < in_.mask_term_count; ++t) {
      const tandem_mask_term* term = in_.mask_terms[t];
      if (term == nullptr || term->kind != TANDEM_MASK_PACKED) continue;
      Begin(t);
      if (packed != nullptr) {
        return check_.Fail("%skind is PACKED, must be given once", Prefix());
      }
      if (!Sized<tandem_packed_term>(*term)) return false;
      packed = As<tandem_packed_term>(term);
    }
    if (packed == nullptr) {
      return check_.Fail("mask_terms has no packed term, must have one with TANDEM_LAYOUT_THD");
    }
    if (!IndexTensor("cu_seqlens_q", packed->cu_seqlens_q, &p_.cu_seqlens_q) ||
        !IndexTensor("cu_seqlens_k", packed->cu_seqlens_k, &p_.cu_seqlens_k)) {
      return false;
    }
    const tandem_tensor &cu_q = *packed->cu_seqlens_q, &cu_k = *packed->cu_seqlens_k;
    if (cu_q.shape[0] < 1) {
      return check_.Fail("%scu_seqlens_q: shape is %s, must be [B + 1]", Prefix(),
                         ShapeString(cu_q).c_str());
    }
    const std::string name_k = prefix_ + "cu_seqlens_k";
    if (!check_.Dimension(name_k.c_str(), cu_k, 0, cu_q.shape[0], "that of cu_seqlens_q")) {
      return false;
    }
    if (cu_q.dtype != cu_k.dtype) {
      return check_.Fail("%scu_seqlens_k: dtype is %s, must be that of cu_seqlens_q, %s", Prefix(),
                         DTypeName(static_cast<DType>(cu_k.dtype)),
                         DTypeName(static_cast<DType>(cu_q.dtype)));
    }
    p_.batch = cu_q.shape[0] - 1;
    return LongestLength("cu_seqlens_q", "max_q_len", p_.cu_seqlens_q, p_.q_total,
                         packed->max_q_len, &p_.q_rows) &&
           LongestLength("cu_seqlens_k", "max_kv_len", p_.cu_seqlens_k, p_.kv_total,
                         packed->max_kv_len, &p_.kv_rows);
  }

 private:
  bool IndexTensor(const char* field, const tandem_tensor* t, IndexVector* vector) {
    if (!Tensor(field, t, {TANDEM_DTYPE_I32, TANDEM_DTYPE_I64}, {1})) return false;
    *vector = {t->data, static_cast<DType>(t->dtype), 0, t->strides[0]};
    return true;
  }

  bool LongestLength(const char* field, const char* max_field, const IndexVector& cu, int64_t total,
                     int64_t given, int64_t* longest) {
    if (given < 0 || given > total) {
      return check_.Fail("%s%s is %lld, must be in [0, %lld] (the rows of the tensor)", Prefix(),
                         max_field, static_cast<long long>(given), static_cast<long long>(total));
    }
    if (!OnHost()) {
      if (given == 0 && total > 0) {
        return check_.Fail("%s%s is 0, must be the longest length, since %s is on a device",
                           Prefix(), max_field, field);
      }
      *longest = given;
      return true;
    }
    int64_t longest_seen = 0;
    for (int64_t b = 0; b <= p_.batch; ++b) {
      const int64_t value = LoadIndex(cu, b);
      const int64_t before = b == 0 ? 0 : LoadIndex(cu, b - 1);
      if (value < before || value > total) {
        return check_.Fail(
            "%s%s[%lld] is %lld, must be in [%lld, %lld] (not decreasing, within "
            "the rows of the tensor)",
            Prefix(), field, static_cast<long long>(b), static_cast<long long>(value),
            static_cast<long long>(before), static_cast<long long>(total));
      }
      if (b > 0) longest_seen = Max(longest_seen, value - before);
    }
    if (given != 0 && longest_seen > given) {
      return check_.Fail("%s%s is %lld, must be at least the longest sequence of %s, %lld",
                         Prefix(), max_field, static_cast<long long>(given), field,
                         static_cast<long long>(longest_seen));
    }
    *longest = given != 0 ? given : longest_seen;
    return true;
  }

  Problem& p_;
};

}  // namespace

bool PackedSequences(const tandem_problem& in, Checker* check, Problem* p) {
  return PackedValidator(in, check, p).Packed();
}

}  // namespace tandem::core
