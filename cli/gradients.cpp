#include "cli/gradients.h"

#include <cstring>
#include <utility>

#include "cli/errors.h"
#include "cli/inputs.h"
#include "cli/npy.h"
#include "cli/random_data.h"

namespace tandem::cli {
namespace {

void NeedInput(const std::string& option, const void* input, const std::string& needed) {
  if (input == nullptr) throw BadInput(option + " needs " + needed);
}

}  // namespace

Gradients::Gradients(const tandem_problem& problem, const BackwardOptions& options,
                     const std::string& dtype) {
  gradients_.dout = Read("--dout", options.dout, dtype);
  if (!options.dlse.empty()) gradients_.dlse = Read("--dlse", options.dlse, dtype);
  if (!options.dq.empty()) gradients_.dq = NewResult(*problem.q);
  if (!options.dk.empty()) gradients_.dk = NewResult(*problem.k);
  if (!options.dv.empty()) gradients_.dv = NewResult(*problem.v);
  if (!options.dbias.empty()) {
    NeedInput("--dbias", problem.bias, "--bias");
    gradients_.dbias = NewResult(*problem.bias, TANDEM_DTYPE_F32);
  }
  if (!options.dsink.empty()) {
    NeedInput("--dsink", problem.sink, "--sink");
    gradients_.dsink = NewResult(*problem.sink);
  }
  if (!options.dalibi.empty()) {
    NeedInput("--dalibi", problem.alibi_slopes, "--alibi");
    gradients_.dalibi = NewResult(*problem.alibi_slopes);
  }
}

Gradients::Gradients(const tandem_problem& problem, const tandem_outputs& outputs, uint64_t seed) {
  const tandem_tensor* dout = New(*outputs.out);
  int64_t count = 1;
  for (int32_t d = 0; d < dout->rank; ++d) count *= dout->shape[d];
  NormalData(seed).Fill(dout->dtype, count, dout->data);
  gradients_.dout = dout;
  gradients_.dq = NewResult(*problem.q);
  gradients_.dk = NewResult(*problem.k);
  gradients_.dv = NewResult(*problem.v);
  if (problem.bias != nullptr) gradients_.dbias = NewResult(*problem.bias, TANDEM_DTYPE_F32);
  if (problem.sink != nullptr) gradients_.dsink = NewResult(*problem.sink);
  if (problem.alibi_slopes != nullptr) gradients_.dalibi = NewResult(*problem.alibi_slopes);
}

void Gradients::Poison() {
  for (Buffer* buffer : results_) std::memset(buffer->data(), 0xff, buffer->size());
}

const tandem_tensor* Gradients::New(const tandem_tensor& like, tandem_dtype dtype) {
  if (dtype == TANDEM_DTYPE_UNSET) dtype = like.dtype;
  const std::vector<int64_t> shape = ShapeOf(like);
  buffers_.emplace_back(ByteSize(dtype, shape));
  tensors_.push_back(ContiguousTensor(dtype, shape, buffers_.back().data()));
  return &tensors_.back();
}

const tandem_tensor* Gradients::NewResult(const tandem_tensor& like, tandem_dtype dtype) {
  const tandem_tensor* tensor = New(like, dtype);
  results_.push_back(&buffers_.back());
  return tensor;
}

const tandem_tensor* Gradients::Read(const std::string& option, const std::string& path,
                                     const std::string& dtype) {
  NpyArray array = ReadNpy(path);
  const tandem_dtype read = FloatDtype(option + " " + path, array, dtype);
  buffers_.push_back(std::move(array.data));
  tensors_.push_back(ContiguousTensor(read, array.shape, buffers_.back().data()));
  return &tensors_.back();
}

}  // namespace tandem::cli
