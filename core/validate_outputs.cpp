#include "core/validate_outputs.h"

#include <string>
#include <vector>

#include "core/validate_mask.h"

namespace tandem::core {
namespace {

struct NamedTensor {
  const char* name;
  const tandem_tensor* tensor;  // null: not given
};

class OutputValidator {
 public:
  OutputValidator(const tandem_problem& in, Checker* check, Problem* p)
      : in_(in), check_(*check), p_(*p) {
    read_ = {{"q", in.q},
             {"k", in.k},
             {"v", in.v},
             {"bias", in.bias},
             {"sink", in.sink},
             {"alibi_slopes", in.alibi_slopes},
             {"block_table", in.block_table}};
  }

  bool Forward(const tandem_outputs& outputs) {
    if (!Header(outputs) || !LikeOut("out", outputs.out, &p_.out)) return false;
    if (!LikeLse("lse", outputs.lse, &p_.lse)) return false;
    return Written("out", outputs.out) && Written("lse", outputs.lse);
  }

  bool Backward(const tandem_outputs& outputs, const tandem_gradients& gradients) {
    if (!Header(outputs)) return false;
    if (gradients.struct_size != sizeof(tandem_gradients)) {
      return check_.Fail("gradients: struct_size is %u, must be %zu (use TANDEM_GRADIENTS_INIT)",
                         gradients.struct_size, sizeof(tandem_gradients));
    }
    p_.is_backward = 1;
    p_.deterministic = gradients.deterministic != 0;
    if (outputs.lse == nullptr) {
      return check_.Fail("lse is null, must be the lse of the forward pass with gradients");
    }
    if (!LikeOut("out", outputs.out, &p_.out) || !LikeLse("lse", outputs.lse, &p_.lse) ||
        !LikeOut("dout", gradients.dout, &p_.dout) || !LikeLse("dlse", gradients.dlse, &p_.dlse)) {
      return false;
    }
    for (const NamedTensor& input :
         {NamedTensor{"out", outputs.out}, NamedTensor{"lse", outputs.lse},
          NamedTensor{"dout", gradients.dout}, NamedTensor{"dlse", gradients.dlse}}) {
      read_.push_back(input);
    }
    return Gradients(gradients);
  }

 private:
  bool Header(const tandem_outputs& outputs) {
    if (outputs.struct_size == sizeof(tandem_outputs)) return true;
    return check_.Fail("outputs: struct_size is %u, must be %zu (use TANDEM_OUTPUTS_INIT)",
                       outputs.struct_size, sizeof(tandem_outputs));
  }

  bool Tensor(const char* name, const tandem_tensor* t, std::initializer_list<tandem_dtype> dtypes,
              int rank) {
    return check_.Tensor(name, t, dtypes, {rank}) && check_.SameDevice(name, *t, "q", *in_.q);
  }

  // A tensor of the shape of out.
  bool LikeOut(const char* name, const tandem_tensor* t, Array4* view) {
    const auto [batch, head, row, column] = AxesOf(p_.layout);
    if (!Tensor(name, t, {in_.q->dtype, TANDEM_DTYPE_F32}, p_.layout == Layout::kTHD ? 3 : 4))
      return false;
    *view = ViewOf(p_.layout, *t);
    return (batch < 0 || check_.Dimension(name, *t, batch, p_.batch, "the batch of q")) &&
           check_.Dimension(name, *t, head, p_.q_heads, "the heads of q") &&
           check_.Dimension(name, *t, row, in_.q->shape[row], "the rows of q") &&
           check_.Dimension(name, *t, column, p_.v_dim, "the head dimension of v");
  }

  // A tensor of the shape of lse, or null.
  bool LikeLse(const char* name, const tandem_tensor* t, Array4* view) {
    if (t == nullptr) return true;
    const bool packed = p_.layout == Layout::kTHD;
    const int head = packed ? 0 : 1;
    if (!Tensor(name, t, {TANDEM_DTYPE_F32}, packed ? 2 : 3)) return false;
    *view = {};
    view->data = t->data;
    view->dtype = DType::kF32;
    view->batch_stride = packed ? 0 : t->strides[0];
    view->head_stride = t->strides[head];
    view->row_stride = t->strides[head + 1];
    return (packed || check_.Dimension(name, *t, 0, p_.batch, "the batch of q")) &&
           check_.Dimension(name, *t, head, p_.q_heads, "the heads of q") &&
           check_.Dimension(name, *t, head + 1, packed ? p_.q_total : p_.q_rows, "the rows of q");
  }

  // A tensor of the very shape of `like`.
  bool Like(const NamedTensor& gradient, const NamedTensor& like,
            std::initializer_list<tandem_dtype> dtypes) {
    if (like.tensor == nullptr) {
      return check_.Fail("%s is given, must be null without %s", gradient.name, like.name);
    }
    const std::string meaning = std::string("that of ") + like.name;
    if (!Tensor(gradient.name, gradient.tensor, dtypes, like.tensor->rank)) return false;
    for (int d = 0; d < like.tensor->rank; ++d) {
      if (!check_.Dimension(gradient.name, *gradient.tensor, d, like.tensor->shape[d],
                            meaning.c_str())) {
        return false;
      }
    }
    return true;
  }

  bool Gradients(const tandem_gradients& gradients) {
    const struct {
      const char* name;
      const tandem_tensor* tensor;
      NamedTensor like;
      Array4* view;
    } inputs[] = {{"dq", gradients.dq, {"q", in_.q}, &p_.dq},
                  {"dk", gradients.dk, {"k", in_.k}, &p_.dk},
                  {"dv", gradients.dv, {"v", in_.v}, &p_.dv}};
    for (const auto& g : inputs) {
      if (g.tensor == nullptr) continue;
      if (!Like({g.name, g.tensor}, g.like, {in_.q->dtype, TANDEM_DTYPE_F32}) ||
          !Written(g.name, g.tensor)) {
        return false;
      }
      *g.view = ViewOf(p_.layout, *g.tensor);
    }
    return BiasGradient(gradients.dbias) && SinkGradient(gradients.dsink) &&
           AlibiGradient(gradients.dalibi);
  }

  bool BiasGradient(const tandem_tensor* t) {
    if (t == nullptr) return true;
    if (!Like({"dbias", t}, {"bias", in_.bias}, {TANDEM_DTYPE_F32}) || !Written("dbias", t))
      return false;
    p_.dbias.data = t->data;
    p_.dbias.dtype = DType::kF32;
    return ScoreMatrixStrides("dbias", *t, p_, &check_, &p_.dbias.batch_stride,
                              &p_.dbias.head_stride, &p_.dbias.row_stride, &p_.dbias.column_stride);
  }

  bool SinkGradient(const tandem_tensor* t) {
    if (t == nullptr) return true;
    if (!Like({"dsink", t}, {"sink", in_.sink}, {TANDEM_DTYPE_F32}) || !Written("dsink", t))
      return false;
    p_.dsink = static_cast<float*>(t->data);
    p_.dsink_stride = t->strides[0];
    return true;
  }

  bool AlibiGradient(const tandem_tensor* t) {
    if (t == nullptr) return true;
    if (!Like({"dalibi", t}, {"alibi_slopes", in_.alibi_slopes}, {TANDEM_DTYPE_F32}) ||
        !Written("dalibi", t)) {
      return false;
    }
    p_.dalibi = static_cast<float*>(t->data);
    p_.dalibi_batch_stride = t->rank == 2 ? BroadcastStride(*t, 0) : 0;
    p_.dalibi_head_stride = BroadcastStride(*t, t->rank - 1);
    return true;
  }

  // A result needs memory of its own. It joins those that further results may not touch.
  bool Written(const char* name, const tandem_tensor* t) {
    if (t == nullptr) return true;
    if (!check_.Writable(name, *t)) return false;
    for (const NamedTensor& other : read_) {
      if (other.tensor != nullptr && !check_.Disjoint(name, *t, other.name, *other.tensor))
        return false;
    }
    read_.push_back({name, t});
    return DisjointFromTerms(in_, &check_, name, *t);
  }

  const tandem_problem& in_;
  Checker& check_;
  Problem& p_;
  std::vector<NamedTensor> read_;
};

}  // namespace

Axes AxesOf(Layout layout) {
  if (layout == Layout::kTHD) return {-1, 1, 0, 2};
  return layout == Layout::kBHSD ? Axes{0, 1, 2, 3} : Axes{0, 2, 1, 3};
}

Array4 ViewOf(Layout layout, const tandem_tensor& tensor) {
  const Axes axes = AxesOf(layout);
  Array4 a = {};
  a.data = tensor.data;
  a.dtype = static_cast<DType>(tensor.dtype);
  a.batch_stride = axes.batch < 0 ? 0 : tensor.strides[axes.batch];
  a.head_stride = tensor.strides[axes.head];
  a.row_stride = tensor.strides[axes.row];
  a.column_stride = tensor.strides[axes.column];
  return a;
}

bool OutputTensors(const tandem_problem& in, const tandem_outputs& outputs,
                   const tandem_gradients* gradients, Checker* check, Problem* p) {
  OutputValidator validator(in, check, p);
  return gradients == nullptr ? validator.Forward(outputs)
                              : validator.Backward(outputs, *gradients);
}

}  // namespace tandem::core
