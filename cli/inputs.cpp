#include "cli/inputs.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cli/errors.h"
#include "cli/random_data.h"

namespace tandem::cli {
namespace {

tandem_dtype ParseDtype(const std::string& text) {
  if (text.empty() || text == "f32") return TANDEM_DTYPE_F32;
  if (text == "f16") return TANDEM_DTYPE_F16;
  if (text == "bf16") return TANDEM_DTYPE_BF16;
  throw BadInput("--dtype is '" + text + "'; it may be f32, f16 or bf16");
}

// The six sizes of --shape.
struct Sizes {
  int64_t batch, q_heads, kv_heads, q_rows, kv_rows, dim;
};

std::vector<int64_t> TensorShape(tandem_layout layout, int64_t batch, int64_t heads, int64_t rows,
                                 int64_t dim) {
  if (layout == TANDEM_LAYOUT_THD) return {rows, heads, dim};
  if (layout == TANDEM_LAYOUT_BSHD) return {batch, rows, heads, dim};
  return {batch, heads, rows, dim};
}

Sizes ParseSizes(const std::string& text) {
  const std::vector<int64_t> n = ParseNumbers("--shape", text);
  if (n.size() != 6) {
    throw BadInput("--shape has " + std::to_string(n.size()) +
                   " numbers; it must have six: B,Hq,Hk,Sq,Sk,D");
  }
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

}  // namespace

size_t ByteSize(tandem_dtype dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = 1;
  switch (dtype) {
    case TANDEM_DTYPE_F32:
    case TANDEM_DTYPE_I32:
      bytes = 4;
      break;
    case TANDEM_DTYPE_F16:
    case TANDEM_DTYPE_BF16:
      bytes = 2;
      break;
    case TANDEM_DTYPE_F64:
    case TANDEM_DTYPE_I64:
      bytes = 8;
      break;
    default:
      break;
  }
  for (const int64_t extent : shape) {
    if (extent < 0)
      throw BadInput("a size is " + std::to_string(extent) + "; it must not be negative");
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      throw BadInput("the sizes given need more memory than 64 bits can count");
    }
  }
  return static_cast<size_t>(bytes);
}

std::vector<int64_t> ShapeOf(const tandem_tensor& tensor) {
  return {tensor.shape, tensor.shape + tensor.rank};
}

NpyType FileType(tandem_dtype dtype) {
  if (dtype == TANDEM_DTYPE_F16) return NpyType::kF16;
  if (dtype == TANDEM_DTYPE_BF16) return NpyType::kU16;
  return dtype == TANDEM_DTYPE_F64 ? NpyType::kF64 : NpyType::kF32;
}

tandem_tensor ContiguousTensor(tandem_dtype dtype, const std::vector<int64_t>& shape, void* data) {
  tandem_tensor tensor = TANDEM_TENSOR_INIT;
  tensor.dtype = dtype;
  tensor.device_type = TANDEM_DEVICE_CPU;
  tensor.rank = static_cast<int32_t>(shape.size());
  tensor.data = data;
  int64_t stride = 1;
  for (size_t n = shape.size(); n-- > 0;) {
    tensor.shape[n] = shape[n];
    tensor.strides[n] = stride;
    stride *= std::max<int64_t>(shape[n], 1);
  }
  return tensor;
}

tandem_dtype FloatDtype(const std::string& option, const NpyArray& array,
                        const std::string& dtype) {
  tandem_dtype read = TANDEM_DTYPE_UNSET;
  const bool is_bf16 = dtype == "bf16";
  if (array.type == NpyType::kF32) read = TANDEM_DTYPE_F32;
  if (array.type == NpyType::kF16) read = TANDEM_DTYPE_F16;
  if (array.type == NpyType::kF64) read = TANDEM_DTYPE_F64;
  if (array.type == NpyType::kU16 && is_bf16) read = TANDEM_DTYPE_BF16;
  if (read == TANDEM_DTYPE_UNSET) {
    throw BadInput(option + " holds " + NpyTypeName(array.type) +
                   "; it may hold float32, float16, or uint16 with --dtype bf16");
  }
  return read;
}

Inputs::Inputs(const ProblemOptions& options, Source source) {
  ChooseLayout(options);
  AddPacked(options.mask);
  if (source == Source::kData && options.shape.empty()) {
    LoadData(options);
  } else {
    MakeShapes(options, source);
  }
  AddScores(options);
  AddMask(options.mask);
  problem_.mask_terms = terms_.data();
  problem_.mask_term_count = static_cast<int32_t>(terms_.size());
}

tandem_tensor* Inputs::NewTensor(tandem_dtype dtype, const std::vector<int64_t>& shape,
                                 void* data) {
  tensors_.push_back(ContiguousTensor(dtype, shape, data));
  return &tensors_.back();
}

tandem_tensor* Inputs::Own(NpyArray array, tandem_dtype dtype) {
  buffers_.push_back(std::move(array.data));
  return NewTensor(dtype, array.shape, buffers_.back().data());
}

const tandem_tensor* Inputs::ReadTensor(const std::string& option, const std::string& path,
                                        const std::string& dtype) {
  NpyArray array = ReadNpy(path);
  const tandem_dtype read = FloatDtype(option + " " + path, array, dtype);
  return Own(std::move(array), read);
}

const tandem_tensor* Inputs::ReadMask(const std::string& option, const std::string& path) {
  NpyArray array = ReadNpy(path);
  if (array.type != NpyType::kBool && array.type != NpyType::kU8) {
    throw BadInput(option + " " + path + " holds " + NpyTypeName(array.type) +
                   "; it may hold bool or uint8 (true is visible)");
  }
  return Own(std::move(array), TANDEM_DTYPE_BOOL);
}

const tandem_tensor* Inputs::NewInt32(const std::vector<int64_t>& shape, int32_t** data) {
  buffers_.emplace_back(ByteSize(TANDEM_DTYPE_I32, shape));
  *data = reinterpret_cast<int32_t*>(buffers_.back().data());
  return NewTensor(TANDEM_DTYPE_I32, shape, *data);
}

const tandem_tensor* Inputs::ReadInt32(const std::string& option, const std::string& path) {
  NpyArray array = ReadNpy(path);
  if (array.type == NpyType::kI32) return Own(std::move(array), TANDEM_DTYPE_I32);
  if (array.type != NpyType::kI64) {
    throw BadInput(option + " " + path + " holds " + NpyTypeName(array.type) +
                   "; it may hold int32 or int64");
  }
  int32_t* narrow;
  const tandem_tensor* tensor = NewInt32(array.shape, &narrow);
  const int64_t* wide = reinterpret_cast<const int64_t*>(array.data.data());
  const size_t count = array.data.size() / sizeof(int64_t);
  for (size_t n = 0; n < count; ++n) narrow[n] = NarrowToInt32(option, wide[n]);
  return tensor;
}

const tandem_tensor* Inputs::ReadFloat32(const std::string& option, const std::string& path) {
  NpyArray array = ReadNpy(path);
  if (array.type != NpyType::kF32) {
    throw BadInput(option + " " + path + " holds " + NpyTypeName(array.type) +
                   "; it must hold float32");
  }
  return Own(std::move(array), TANDEM_DTYPE_F32);
}

void Inputs::ChooseLayout(const ProblemOptions& options) {
  NeedBoth(options.mask.cu_seqlens_q, "--cu-seqlens-q", options.mask.cu_seqlens_k,
           "--cu-seqlens-k");
  if (!options.mask.cu_seqlens_q.empty()) {
    if (!options.layout.empty()) {
      throw BadInput("--layout is given with --cu-seqlens-q; packed tensors are [T, H, D]");
    }
    problem_.layout = TANDEM_LAYOUT_THD;
  } else if (options.layout.empty() || options.layout == "bhsd") {
    problem_.layout = TANDEM_LAYOUT_BHSD;
  } else if (options.layout == "bshd") {
    problem_.layout = TANDEM_LAYOUT_BSHD;
  } else {
    throw BadInput("--layout is '" + options.layout + "'; it may be bhsd or bshd");
  }
}

void Inputs::LoadData(const ProblemOptions& options) {
  if (options.q.empty() || options.k.empty() || options.v.empty()) {
    throw BadInput("--q, --k and --v are needed, or --shape");
  }
  ParseDtype(options.dtype);
  problem_.q = ReadTensor("--q", options.q, options.dtype);
  problem_.k = ReadTensor("--k", options.k, options.dtype);
  problem_.v = ReadTensor("--v", options.v, options.dtype);
  if (!options.dtype.empty() && ParseDtype(options.dtype) != problem_.q->dtype) {
    throw BadInput("--dtype is " + options.dtype + ", but --q " + options.q +
                   " holds another type");
  }
}

void Inputs::MakeShapes(const ProblemOptions& options, Source source) {
  const tandem_dtype dtype = ParseDtype(options.dtype);
  std::vector<int64_t> q, k;
  const bool has_tensors = !(options.q + options.k + options.v + options.kv).empty();
  if (!options.shape.empty()) {
    if (has_tensors) throw BadInput("--shape is given with --q; it must be one or the other");
    const Sizes s = ParseSizes(options.shape);
    if (problem_.layout == TANDEM_LAYOUT_THD && s.batch != 1) {
      throw BadInput("--shape has B = " + std::to_string(s.batch) +
                     "; it must be 1 with --cu-seqlens-q (Sq and Sk are all rows)");
    }
    q = TensorShape(problem_.layout, s.batch, s.q_heads, s.q_rows, s.dim);
    k = TensorShape(problem_.layout, s.batch, s.kv_heads, s.kv_rows, s.dim);
  } else {
    if (options.q.empty() || options.kv.empty())
      throw BadInput("--q and --kv, or --shape, are needed");
    q = ParseNumbers("--q", options.q);
    k = ParseNumbers("--kv", options.kv);
    if (q.size() > TANDEM_MAX_RANK || k.size() > TANDEM_MAX_RANK) {
      throw BadInput("--q and --kv must have 4 numbers (3 with --cu-seqlens-q)");
    }
  }
  const size_t q_bytes = ByteSize(dtype, q);
  const size_t k_bytes = ByteSize(dtype, k);
  if (source == Source::kShapes) {
    problem_.q = NewTensor(dtype, q, nullptr);
    problem_.k = NewTensor(dtype, k, nullptr);
    problem_.v = NewTensor(dtype, k, nullptr);
    return;
  }
  NormalData data(options.data_seed);
  const auto draw = [&](const std::vector<int64_t>& shape, size_t bytes) {
    buffers_.emplace_back(bytes);
    void* memory = buffers_.back().data();
    data.Fill(dtype, static_cast<int64_t>(bytes) / (dtype == TANDEM_DTYPE_F32 ? 4 : 2), memory);
    return NewTensor(dtype, shape, memory);
  };
  problem_.q = draw(q, q_bytes);
  problem_.k = draw(k, k_bytes);
  problem_.v = draw(k, k_bytes);
}

void Inputs::AddScores(const ProblemOptions& options) {
  if (options.scale.has_value()) {
    problem_.has_scale = 1;
    problem_.scale = *options.scale;
  }
  problem_.softcap = options.softcap;
  problem_.dropout_rate = options.dropout;
  problem_.dropout_seed = options.dropout_seed;
  if (!options.bias.empty()) problem_.bias = ReadTensor("--bias", options.bias, options.dtype);
  if (!options.sink.empty()) problem_.sink = ReadFloat32("--sink", options.sink);
  NeedBoth(options.alibi, "--alibi", options.alibi_align, "--alibi-align");
  if (!options.alibi.empty()) {
    problem_.alibi_slopes = ReadFloat32("--alibi", options.alibi);
    problem_.alibi_alignment = ParseAlignment("--alibi-align", options.alibi_align);
  }
}

Outputs::Outputs(const tandem_problem& problem) {
  const tandem_tensor& q = *problem.q;
  std::vector<int64_t> shape = ShapeOf(q);
  shape.back() = problem.v->shape[problem.v->rank - 1];
  std::vector<int64_t> lse_shape;
  if (problem.layout == TANDEM_LAYOUT_THD) {
    lse_shape = {shape[1], shape[0]};
  } else if (problem.layout == TANDEM_LAYOUT_BSHD) {
    lse_shape = {shape[0], shape[2], shape[1]};
  } else {
    lse_shape = {shape[0], shape[1], shape[2]};
  }
  out_data_ = Buffer(ByteSize(q.dtype, shape));
  lse_data_ = Buffer(ByteSize(TANDEM_DTYPE_F32, lse_shape));
  out_ = ContiguousTensor(q.dtype, shape, out_data_.data());
  lse_ = ContiguousTensor(TANDEM_DTYPE_F32, lse_shape, lse_data_.data());
  outputs_.out = &out_;
  outputs_.lse = &lse_;
  Poison();
}

void Outputs::Poison() {
  std::memset(out_data_.data(), 0xff, out_data_.size());
  std::memset(lse_data_.data(), 0xff, lse_data_.size());
}

}  // namespace tandem::cli
