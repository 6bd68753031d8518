#include "bench/benchmark_case.h"

#include <algorithm>
#include <cstring>

namespace tandem::bench {
namespace {

constexpr int64_t kWindow = 256;
constexpr int64_t kDocumentMean = 200;

size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

const char* NameOf(DType dtype) {
  return dtype == DType::kF32 ? "f32" : (dtype == DType::kF16 ? "f16" : "bf16");
}

const char* NameOf(MaskKind mask) {
  switch (mask) {
    case MaskKind::kCausal:
      return "causal";
    case MaskKind::kWindow:
      return "window256";
    case MaskKind::kPadded:
      return "padded";
    case MaskKind::kPacked:
      return "packed200";
    case MaskKind::kBoolean:
      return "boolean";
    case MaskKind::kBooleanPrepared:
      return "boolean_with_preparation";
    case MaskKind::kBias:
      return "bias";
    default:
      return "none";
  }
}

bool IsBoolean(MaskKind mask) {
  return mask == MaskKind::kBoolean || mask == MaskKind::kBooleanPrepared;
}

// A linear congruential generator; the upper bits are random enough to time and to compare.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  // The sum of four uniform numbers, of variance 1.
  float Normal() {
    const uint32_t a = Next(), b = Next();
    const uint32_t sum = (a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16);
    return (static_cast<float>(sum) * 0x1p-16f - 2.0f) * 1.7320508f;
  }

 private:
  uint64_t state_;
};

// f16 and bf16 are cut, not rounded: they are inputs.
std::vector<char> RandomValues(DType dtype, int64_t count, Random& random) {
  std::vector<char> bytes(static_cast<size_t>(count) * SizeOf(dtype));
  for (int64_t n = 0; n < count; ++n) {
    const float value = random.Normal();
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kF32) {
      std::memcpy(&bytes[4 * n], &bits, 4);
      continue;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kF16) {
      const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
      half = exponent <= 0 ? 0
                           : static_cast<uint16_t>((bits >> 31 << 15) | (exponent << 10) |
                                                   ((bits >> 13) & 1023));
    }
    std::memcpy(&bytes[2 * n], &half, 2);
  }
  return bytes;
}

std::vector<int32_t> PaddedLengths(const CaseSpec& spec) {
  std::vector<int32_t> lengths;
  const int64_t steps = std::max<int64_t>(1, spec.batch - 1);
  for (int64_t b = 0; b < spec.batch; ++b) {
    lengths.push_back(static_cast<int32_t>(spec.kv_len - spec.kv_len * 3 * b / (4 * steps)));
  }
  return lengths;
}

// cu_seqlens: documents from a quarter of the mean to seven quarters, the last one cut.
std::vector<int32_t> DocumentStarts(const CaseSpec& spec) {
  Random random(kDocumentMean);
  std::vector<int32_t> starts = {0};
  while (starts.back() < spec.q_len) {
    const int64_t length = kDocumentMean / 4 + random.Next() % (kDocumentMean * 3 / 2 + 1);
    starts.push_back(static_cast<int32_t>(std::min(spec.q_len, starts.back() + length)));
  }
  return starts;
}

double PairsOf(const CaseSpec& spec) {
  double pairs = 0;
  switch (spec.mask) {
    case MaskKind::kCausal:
    case MaskKind::kWindow: {
      const int64_t widest = spec.mask == MaskKind::kWindow ? kWindow + 1 : spec.kv_len;
      for (int64_t i = 0; i < spec.q_len; ++i) {
        pairs += static_cast<double>(std::min({i + 1, widest, spec.kv_len}));
      }
      return pairs * static_cast<double>(spec.batch);
    }
    case MaskKind::kPadded:
      for (const int32_t length : PaddedLengths(spec)) pairs += length;
      return pairs * static_cast<double>(spec.q_len);
    case MaskKind::kPacked: {
      const std::vector<int32_t> starts = DocumentStarts(spec);
      for (size_t n = 1; n < starts.size(); ++n) {
        const double length = starts[n] - starts[n - 1];
        pairs += length * length;
      }
      return pairs;
    }
    default:
      return static_cast<double>(spec.batch * spec.q_len * spec.kv_len);
  }
}

std::vector<int64_t> ShapeOf(const CaseSpec& spec, int64_t heads, int64_t rows) {
  if (spec.mask == MaskKind::kPacked) return {rows, heads, spec.dim};
  return {spec.batch, heads, rows, spec.dim};
}

}  // namespace

std::string CaseSpec::Name(Device device) const {
  return std::string("forward/") + (device == Device::kCuda ? "cuda/" : "cpu/") + NameOf(dtype) +
         "/b" + std::to_string(batch) + "/h" + std::to_string(heads) + "/hk" +
         std::to_string(kv_heads) + "/q" + std::to_string(q_len) + "/k" + std::to_string(kv_len) +
         "/d" + std::to_string(dim) + "/" + NameOf(mask);
}

double CaseSpec::Flops() const { return 4.0 * static_cast<double>(heads * dim) * PairsOf(*this); }

double CaseSpec::KvBytes() const {
  return 2.0 * static_cast<double>(batch * kv_heads * kv_len * dim) *
         static_cast<double>(SizeOf(dtype));
}

std::vector<CaseSpec> CaseTable() {
  std::vector<CaseSpec> table;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const int64_t dim : {64, 128}) {
      for (const MaskKind mask :
           {MaskKind::kNone, MaskKind::kCausal, MaskKind::kWindow, MaskKind::kPacked,
            MaskKind::kBoolean, MaskKind::kBooleanPrepared, MaskKind::kBias}) {
        table.push_back({dtype, 1, 8, 8, 2048, 2048, dim, mask});
      }
      table.push_back({dtype, 4, 8, 8, 1024, 1024, dim, MaskKind::kPadded});
    }
    table.push_back({dtype, 1, 32, 8, 1024, 1024, 128, MaskKind::kCausal});
    table.push_back({dtype, 1, 32, 8, 1, 8192, 128, MaskKind::kNone});
    for (const MaskKind mask : {MaskKind::kNone, MaskKind::kCausal, MaskKind::kBoolean,
                                MaskKind::kBooleanPrepared, MaskKind::kBias}) {
      table.push_back({dtype, 4, 16, 16, 4096, 4096, 128, mask});
    }
  }
  return table;
}

HostCase::HostCase(const CaseSpec& spec) : spec_(spec) {
  Random random(1);
  q_ = RandomValues(spec.dtype, spec.batch * spec.heads * spec.q_len * spec.dim, random);
  const int64_t kv_count = spec.batch * spec.kv_heads * spec.kv_len * spec.dim;
  k_ = RandomValues(spec.dtype, kv_count, random);
  v_ = RandomValues(spec.dtype, kv_count, random);
  const int64_t pairs = spec.batch * spec.q_len * spec.kv_len;
  if (IsBoolean(spec.mask)) {
    mask_.resize(static_cast<size_t>(pairs));
    for (char& visible : mask_) visible = random.Next() % 10 != 0;
  } else if (spec.mask == MaskKind::kBias) {
    bias_ = RandomValues(spec.dtype, pairs, random);
  } else if (spec.mask == MaskKind::kPadded) {
    lengths_ = PaddedLengths(spec);
  } else if (spec.mask == MaskKind::kPacked) {
    lengths_ = DocumentStarts(spec);
    for (size_t n = 1; n < lengths_.size(); ++n) {
      longest_ = std::max<int64_t>(longest_, lengths_[n] - lengths_[n - 1]);
    }
  }
}

PlacedInputs::PlacedInputs(const HostCase& host, Device device)
    : device_(device), problem_(MakeProblem(host)) {}

Tensor PlacedInputs::Upload(const void* data, size_t size, DType dtype,
                            const std::vector<int64_t>& shape) {
  buffers_.emplace_back(device_, size);
  buffers_.back().CopyFrom(data);
  return Tensor(buffers_.back().data(), dtype, shape, {}, device_);
}

Problem PlacedInputs::MakeProblem(const HostCase& host) {
  const CaseSpec& spec = host.spec();
  const bool packed = spec.mask == MaskKind::kPacked;
  const auto upload = [&](const std::vector<char>& values, int64_t heads, int64_t rows) {
    return Upload(values.data(), values.size(), spec.dtype, ShapeOf(spec, heads, rows));
  };
  Problem problem(packed ? Layout::kTHD : Layout::kBHSD, upload(host.q(), spec.heads, spec.q_len),
                  upload(host.k(), spec.kv_heads, spec.kv_len),
                  upload(host.v(), spec.kv_heads, spec.kv_len));
  const std::vector<int64_t> pairs = {spec.batch, 1, spec.q_len, spec.kv_len};
  const auto lengths = [&] {
    return Upload(host.lengths().data(), host.lengths().size() * 4, DType::kI32,
                  {static_cast<int64_t>(host.lengths().size())});
  };
  if (spec.mask == MaskKind::kCausal) {
    problem.mask = Causal(Alignment::kTopLeft);
  } else if (spec.mask == MaskKind::kWindow) {
    problem.mask = Window(kWindow, 0, Alignment::kTopLeft);
  } else if (spec.mask == MaskKind::kPadded) {
    problem.mask = KvLengths(lengths());
  } else if (packed) {
    const Tensor starts = lengths();
    const int64_t longest = device_ == Device::kCuda ? host.longest() : 0;
    problem.mask = Packed(starts, starts, longest, longest);
  } else if (IsBoolean(spec.mask)) {
    problem.mask = Dense(Upload(host.mask().data(), host.mask().size(), DType::kBool, pairs));
  } else if (spec.mask == MaskKind::kBias) {
    problem.bias = Upload(host.bias().data(), host.bias().size(), spec.dtype, pairs);
  }
  return problem;
}

size_t OutBytes(const CaseSpec& spec) {
  return static_cast<size_t>(spec.batch * spec.heads * spec.q_len * spec.dim) * SizeOf(spec.dtype);
}

size_t LseBytes(const CaseSpec& spec) {
  return static_cast<size_t>(spec.batch * spec.heads * spec.q_len) * sizeof(float);
}

Outputs OutputsIn(const CaseSpec& spec, void* out, void* lse, Device device) {
  std::vector<int64_t> lse_shape = {spec.batch, spec.heads, spec.q_len};
  if (spec.mask == MaskKind::kPacked) lse_shape.erase(lse_shape.begin());
  return {Tensor(out, spec.dtype, ShapeOf(spec, spec.heads, spec.q_len), {}, device),
          Tensor(lse, DType::kF32, lse_shape, {}, device)};
}

PlacedCase::PlacedCase(const HostCase& host, Device device)
    : device_(device),
      inputs_(host, device),
      problem_(inputs_.problem()),
      out_(device, OutBytes(host.spec())),
      lse_(device, LseBytes(host.spec())),
      outputs_(OutputsIn(host.spec(), out_.data(), lse_.data(), device)) {
  if (host.spec().mask == MaskKind::kBoolean) PrepareMask();
  plan_.emplace(problem_, outputs_);
  workspace_.emplace(device, plan_->workspace_size());
}

void PlacedCase::PrepareMask() {
  mask_plan_bytes_ = MaskPlanSize(problem_);
  mask_plan_memory_.emplace(device_, mask_plan_bytes_);
  mask_plan_.emplace(problem_, mask_plan_memory_->data(), mask_plan_bytes_, nullptr);
  problem_.mask = Mask();
  problem_.mask_plan = &*mask_plan_;
}

Answer PlacedCase::Result() const {
  Answer answer;
  answer.out.resize(out_.size());
  answer.lse.resize(lse_.size());
  out_.CopyTo(answer.out.data());
  lse_.CopyTo(answer.lse.data());
  return answer;
}

}  // namespace tandem::bench
