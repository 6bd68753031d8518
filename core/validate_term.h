// Checks of one mask term's arrays, with the term's place in every message; used by
// core/validate_mask.cpp and core/validate_packed.cpp only.
#ifndef TANDEM_CORE_VALIDATE_TERM_H_
#define TANDEM_CORE_VALIDATE_TERM_H_

#include <string>

#include "core/problem.h"
#include "core/tensor_check.h"

namespace tandem::core {

class TermCheck {
 public:
  TermCheck(const tandem_problem& in, Checker* check) : in_(in), check_(*check) {}

 protected:
  void Begin(int term) { prefix_ = "mask_terms[" + std::to_string(term) + "]."; }

  template <typename Term>
  static const Term* As(const tandem_mask_term* term) {
    return reinterpret_cast<const Term*>(term);
  }
  template <typename Term>
  bool Sized(const tandem_mask_term& head) {
    if (head.struct_size == sizeof(Term)) return true;
    return check_.Fail("%sstruct_size is %u, must be %zu (use the TANDEM_*_TERM_INIT macro)",
                       Prefix(), head.struct_size, sizeof(Term));
  }
  const char* Prefix() const { return prefix_.c_str(); }

  bool Tensor(const char* field, const tandem_tensor* t, std::initializer_list<tandem_dtype> dtypes,
              std::initializer_list<int> ranks) {
    const std::string name = prefix_ + field;
    return check_.Tensor(name.c_str(), t, dtypes, ranks) &&
           check_.SameDevice(name.c_str(), *t, "q", *in_.q);
  }
  bool Extent(const char* field, const tandem_tensor& t, int dimension, int64_t wanted,
              const char* meaning) {
    return check_.Dimension((prefix_ + field).c_str(), t, dimension, wanted, meaning);
  }
  bool BroadcastExtent(const char* field, const tandem_tensor& t, int dimension, int64_t wanted,
                       const char* meaning) {
    return check_.Broadcastable((prefix_ + field).c_str(), t, dimension, wanted, meaning);
  }

  bool OnHost() const { return in_.q->device_type == TANDEM_DEVICE_CPU; }

  const tandem_problem& in_;
  Checker& check_;
  std::string prefix_;
};

}  // namespace tandem::core

#endif  // TANDEM_CORE_VALIDATE_TERM_H_
