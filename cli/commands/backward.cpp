#include "cli/commands/backward.h"

#include <deque>
#include <utility>

#include "cli/errors.h"
#include "cli/explanation.h"
#include "cli/inputs.h"

namespace tandem::cli {
namespace {

// Gradient arrays and their memory.
class Gradients {
 public:
  // As `like`, in dtype (unset: its own).
  const tandem_tensor* New(const tandem_tensor& like, tandem_dtype dtype = TANDEM_DTYPE_UNSET) {
    if (dtype == TANDEM_DTYPE_UNSET) dtype = like.dtype;
    const std::vector<int64_t> shape = ShapeOf(like);
    buffers_.emplace_back(ByteSize(dtype, shape));
    tensors_.push_back(ContiguousTensor(dtype, shape, buffers_.back().data()));
    return &tensors_.back();
  }
  const tandem_tensor* Read(const std::string& option, const std::string& path,
                            const std::string& dtype) {
    NpyArray array = ReadNpy(path);
    const tandem_dtype read = FloatDtype(option + " " + path, array, dtype);
    buffers_.push_back(std::move(array.data));
    tensors_.push_back(ContiguousTensor(read, array.shape, buffers_.back().data()));
    return &tensors_.back();
  }

 private:
  std::deque<Buffer> buffers_;
  std::deque<tandem_tensor> tensors_;
};

void NeedInput(const std::string& option, const void* input, const std::string& needed) {
  if (input == nullptr) throw BadInput(option + " needs " + needed);
}

}  // namespace

void RefuseBackward(const tandem_problem& problem, const tandem_outputs& outputs,
                    const BackwardOptions& backward, const std::string& dtype,
                    const tandem_options& options) {
  Gradients arrays;
  tandem_gradients gradients = TANDEM_GRADIENTS_INIT;
  gradients.dout = backward.dout.empty() ? arrays.New(*outputs.out)
                                         : arrays.Read("--dout", backward.dout, dtype);
  if (!backward.dlse.empty()) gradients.dlse = arrays.Read("--dlse", backward.dlse, dtype);
  gradients.dq = arrays.New(*problem.q);
  gradients.dk = arrays.New(*problem.k);
  gradients.dv = arrays.New(*problem.v);
  if (!backward.dbias.empty()) {
    NeedInput("--dbias", problem.bias, "--bias");
    gradients.dbias = arrays.New(*problem.bias, TANDEM_DTYPE_F32);
  }
  if (!backward.dsink.empty()) {
    NeedInput("--dsink", problem.sink, "--sink");
    gradients.dsink = arrays.New(*problem.sink);
  }
  if (!backward.dalibi.empty()) {
    NeedInput("--dalibi", problem.alibi_slopes, "--alibi");
    gradients.dalibi = arrays.New(*problem.alibi_slopes);
  }
  const std::vector<KernelVerdict> verdicts =
      ExplainKernels(problem, &outputs, &gradients, options);
  const KernelVerdict& chosen = ChosenKernel(verdicts, options);
  throw CannotServe(chosen.kernel + " serves the backward pass, but this command does not run it");
}

}  // namespace tandem::cli
