// Forward attention on every device that is there, by Google Benchmark: the same cases, named
// forward/<device>/<dtype>/b/h/hk/q/k/d/<mask>. Counters: FLOP/s over visible pairs
// (4 * heads * batch * dim * pairs), and the bytes of K and V per second.
//
//   tandem_benchmark --benchmark_filter='cpu/f32/.*d64' --benchmark_format=json
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tandem/tandem.hpp>
#include <vector>

#if defined(TANDEM_BENCHMARK_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

using tandem::Device;
using tandem::DType;

struct Shape {
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
};

enum class MaskKind { kNone, kCausal, kWindow, kBoolean };

const char* Name(MaskKind mask) {
  switch (mask) {
    case MaskKind::kCausal:
      return "causal";
    case MaskKind::kWindow:
      return "window256";
    case MaskKind::kBoolean:
      return "boolean";
    default:
      return "none";
  }
}

const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : (dtype == DType::kF16 ? "f16" : "bf16");
}

// Memory of one device. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer(Device device, size_t size) : device_(device) {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device == Device::kCuda) {
      if (cudaMalloc(&data_, size) != cudaSuccess) throw std::bad_alloc();
      return;
    }
#endif
    data_ = std::aligned_alloc(256, (size + 255) / 256 * 256);
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device_ == Device::kCuda) {
      cudaFree(data_);
      return;
    }
#endif
    std::free(data_);
  }
  void Fill(const std::vector<char>& bytes) {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device_ == Device::kCuda) {
      cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
      return;
    }
#endif
    std::memcpy(data_, bytes.data(), bytes.size());
  }
  void* data() const { return data_; }

 private:
  Device device_;
  void* data_ = nullptr;
};

// Random normal values in any element type: f16 and bf16 bits are made from f32 by truncation,
// which is random enough to time.
std::vector<char> RandomBytes(DType dtype, int64_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<char> bytes(static_cast<size_t>(count) * (dtype == DType::kF32 ? 4 : 2));
  for (int64_t n = 0; n < count; ++n) {
    const float value = normal(random);
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

// A case with its memory, planned.
class Case {
 public:
  Case(Device device, DType dtype, const Shape& shape, MaskKind mask)
      : device_(device),
        dtype_(dtype),
        q_(Make({shape.batch, shape.heads, shape.q_len, shape.dim})),
        k_(Make({shape.batch, shape.kv_heads, shape.kv_len, shape.dim})),
        v_(Make({shape.batch, shape.kv_heads, shape.kv_len, shape.dim})),
        out_(Make({shape.batch, shape.heads, shape.q_len, shape.dim})),
        problem_(tandem::Layout::kBHSD, q_, k_, v_) {
    int64_t pairs = shape.q_len * shape.kv_len;
    if (mask == MaskKind::kCausal) {
      problem_.mask = tandem::Causal(tandem::Alignment::kTopLeft);
      pairs = 0;
      for (int64_t i = 0; i < shape.q_len; ++i) pairs += std::min(i + 1, shape.kv_len);
    } else if (mask == MaskKind::kWindow) {
      problem_.mask = tandem::Window(256, 0, tandem::Alignment::kTopLeft);
      pairs = 0;
      for (int64_t i = 0; i < shape.q_len; ++i) pairs += std::min<int64_t>(i + 1, 257);
    } else if (mask == MaskKind::kBoolean) {
      std::vector<char> bytes(static_cast<size_t>(pairs));
      std::bernoulli_distribution visible(0.9);
      for (char& byte : bytes) byte = visible(random_);
      buffers_.push_back(std::make_unique<Buffer>(device, bytes.size()));
      buffers_.back()->Fill(bytes);
      problem_.mask = tandem::Dense(tandem::Tensor(buffers_.back()->data(), DType::kBool,
                                                   {shape.q_len, shape.kv_len}, {}, device));
    }
    flops = 4.0 * static_cast<double>(shape.batch * shape.heads * shape.dim * pairs);
    bytes = 2.0 * static_cast<double>(shape.batch * shape.kv_heads * shape.kv_len * shape.dim) *
            (dtype == DType::kF32 ? 4 : 2);
    plan_ = std::make_unique<tandem::Plan>(problem_, out_);
    workspace_ = std::make_unique<Buffer>(device, plan_->workspace_size() + 1);
  }

  void Run() { plan_->Run(problem_, out_, workspace_->data(), plan_->workspace_size()); }

  double flops = 0;
  double bytes = 0;

 private:
  tandem::Tensor Make(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    const std::vector<char> data = RandomBytes(dtype_, count, random_);
    buffers_.push_back(std::make_unique<Buffer>(device_, data.size()));
    buffers_.back()->Fill(data);
    return tandem::Tensor(buffers_.back()->data(), dtype_, shape, {}, device_);
  }

  Device device_;
  DType dtype_;
  std::mt19937_64 random_{1};
  std::vector<std::unique_ptr<Buffer>> buffers_;
  tandem::Tensor q_, k_, v_, out_;
  tandem::Problem problem_;
  std::unique_ptr<tandem::Plan> plan_;
  std::unique_ptr<Buffer> workspace_;
};

#if defined(TANDEM_BENCHMARK_CUDA)
// Device time by events, so that launches of one case do not overlap what is measured.
double TimeOnDevice(Case& attention) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  cudaEventRecord(begin);
  attention.Run();
  cudaEventRecord(end);
  cudaEventSynchronize(end);
  float milliseconds = 0;
  cudaEventElapsedTime(&milliseconds, begin, end);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return milliseconds * 1e-3;
}
#endif

void Forward(benchmark::State& state, Device device, DType dtype, Shape shape, MaskKind mask) {
  Case attention(device, dtype, shape, mask);
  attention.Run();
  for (auto _ : state) {
#if defined(TANDEM_BENCHMARK_CUDA)
    if (device == Device::kCuda) {
      state.SetIterationTime(TimeOnDevice(attention));
      continue;
    }
#endif
    attention.Run();
  }
  const auto rate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["FLOP/s"] = benchmark::Counter(attention.flops, rate);
  state.counters["K,V bytes/s"] = benchmark::Counter(attention.bytes, rate);
}

void Register(Device device, const Shape& shape, MaskKind mask) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const std::string name =
        std::string("forward/") + (device == Device::kCuda ? "cuda/" : "cpu/") + Name(dtype) +
        "/b" + std::to_string(shape.batch) + "/h" + std::to_string(shape.heads) + "/hk" +
        std::to_string(shape.kv_heads) + "/q" + std::to_string(shape.q_len) + "/k" +
        std::to_string(shape.kv_len) + "/d" + std::to_string(shape.dim) + "/" + Name(mask);
    auto* registered =
        benchmark::RegisterBenchmark(name.c_str(), Forward, device, dtype, shape, mask);
    registered->Unit(benchmark::kMillisecond);
    if (device == Device::kCuda) {
      registered->UseManualTime();
    } else {
      registered->UseRealTime();
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (Device device : {Device::kCpu, Device::kCuda}) {
#if !defined(TANDEM_BENCHMARK_CUDA)
    if (device == Device::kCuda) continue;
#endif
    if (tandem::Devices(device).empty()) continue;
    for (int64_t dim : {64, 128}) {
      for (MaskKind mask :
           {MaskKind::kNone, MaskKind::kCausal, MaskKind::kWindow, MaskKind::kBoolean}) {
        Register(device, {1, 8, 8, 2048, 2048, dim}, mask);
        if (device == Device::kCuda) Register(device, {4, 16, 16, 4096, 4096, dim}, mask);
      }
    }
    Register(device, {1, 32, 8, 1, 8192, 128}, MaskKind::kNone);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
