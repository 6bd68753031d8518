// Every kernel for CUDA, forward and backward, on tensors that are on the GPU: captured into a
// graph and replayed over other data, and a thousand times over the same data, it gives the bits of
// one call. Where dQ has no order of its own (IsOrdered), that is asked of dK and dV.
#include <functional>
#include <memory>

#include "tests/cuda/device_array.h"
#include "tests/cuda/on_gpu.h"

namespace tandem::test {
namespace {

constexpr int64_t kHeads = 4, kKeyHeads = 2;

struct DeviceCase {
  const char* name;
  int64_t q_rows, kv_rows, dim;
  enum class Hides { kNothing, kCausal, kDenseMask, kDocuments, kBias } hides;
};
using Hides = DeviceCase::Hides;

constexpr DeviceCase kCases[] = {
    {"plain", 300, 300, 128, Hides::kNothing},
    {"causal", 300, 300, 64, Hides::kCausal},
    {"dense mask", 200, 330, 128, Hides::kDenseMask},
    {"documents", 300, 300, 64, Hides::kDocuments},
    {"bias", 200, 264, 128, Hides::kBias},
    {"ragged", 129, 77, 40, Hides::kCausal},
    {"wide", 130, 200, 256, Hides::kDenseMask},
    {"decoding", 1, 3000, 128, Hides::kNothing},
    {"few rows", 5, 700, 64, Hides::kDenseMask},
};

// A problem on the GPU, its gradients, and data that can be replaced in place.
class OnDevice {
 public:
  OnDevice(DType dtype, const DeviceCase& c, bool is_ordered)
      : dtype_(dtype),
        is_ordered_(is_ordered),
        case_(c),
        q_(Bytes(kHeads * c.q_rows)),
        k_(Bytes(kKeyHeads * c.kv_rows)),
        v_(Bytes(kKeyHeads * c.kv_rows)),
        dout_(Bytes(kHeads * c.q_rows)),
        bias_(Bytes(c.q_rows * c.kv_rows / c.dim + 1)),
        mask_(RandomBytes(c.q_rows * c.kv_rows)),
        cu_(std::vector<int32_t>{0, 100, 101, static_cast<int32_t>(c.q_rows)}),
        out_(kHeads * c.q_rows * c.dim),
        lse_(kHeads * c.q_rows),
        dq_(kHeads * c.q_rows * c.dim),
        dk_(kKeyHeads * c.kv_rows * c.dim),
        dv_(kKeyHeads * c.kv_rows * c.dim),
        problem_(IsPacked() ? Layout::kTHD : Layout::kBHSD, Rows(q_, dtype, kHeads, c.q_rows),
                 Rows(k_, dtype, kKeyHeads, c.kv_rows), Rows(v_, dtype, kKeyHeads, c.kv_rows)),
        outputs_(Rows(out_, DType::kF32, kHeads, c.q_rows),
                 IsPacked() ? lse_.View(DType::kF32, {kHeads, c.q_rows})
                            : lse_.View(DType::kF32, {1, kHeads, c.q_rows})),
        gradients_(Rows(dout_, dtype, kHeads, c.q_rows)) {
    switch (c.hides) {
      case Hides::kNothing:
        break;
      case Hides::kCausal:
        problem_.mask = Causal(Alignment::kTopLeft);
        break;
      case Hides::kDenseMask:
        problem_.mask = Dense(mask_.View(DType::kBool, {c.q_rows, c.kv_rows}));
        break;
      case Hides::kDocuments: {
        const tandem::Tensor cu(cu_.data(), DType::kI32, {4}, {}, Device::kCuda);
        problem_.mask = Packed(cu, cu, c.q_rows, c.q_rows) & Causal(Alignment::kTopLeft);
        break;
      }
      case Hides::kBias:
        problem_.bias = bias_.View(dtype, {c.q_rows, c.kv_rows});
        break;
    }
    gradients_.dq = Rows(dq_, DType::kF32, kHeads, c.q_rows);
    gradients_.dk = Rows(dk_, DType::kF32, kKeyHeads, c.kv_rows);
    gradients_.dv = Rows(dv_, DType::kF32, kKeyHeads, c.kv_rows);
    gradients_.deterministic = is_ordered;
  }

  void Fill(uint64_t seed) {
    for (DeviceArray<uint8_t>* array : {&q_, &k_, &v_, &dout_, &bias_}) {
      array->Store(Numbers(dtype_, array->count() / ElementSize(), seed++));
    }
    for (const bool is_backward : {false, true}) {
      for (DeviceArray<float>* array : Results(is_backward)) array->Poison();
    }
  }
  // What a pass writes.
  std::vector<float> Fetch(bool is_backward) {
    std::vector<float> all;
    for (const DeviceArray<float>* array : Results(is_backward)) {
      const std::vector<float> values = array->Fetch();
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
  // The LSE and O that gradients are computed from, by whichever kernel dispatch chooses.
  void Forward() { Attention(problem_, outputs_); }

  const tandem::Problem& problem() const { return problem_; }
  const tandem::Outputs& outputs() const { return outputs_; }
  const tandem::Gradients& gradients() const { return gradients_; }

 private:
  bool IsPacked() const { return case_.hides == Hides::kDocuments; }
  int64_t ElementSize() const { return dtype_ == DType::kF32 ? 4 : 2; }
  int64_t Bytes(int64_t rows) const { return rows * case_.dim * ElementSize(); }
  static std::vector<uint8_t> RandomBytes(int64_t count) {
    Random random(4);
    std::vector<uint8_t> mask(static_cast<size_t>(count));
    for (uint8_t& pair : mask) pair = random.Chance(0.6);
    return mask;
  }
  std::vector<DeviceArray<float>*> Results(bool is_backward) {
    if (is_backward && !is_ordered_) return {&dk_, &dv_};
    if (is_backward) return {&dq_, &dk_, &dv_};
    return {&out_, &lse_};
  }
  template <typename T>
  tandem::Tensor Rows(const DeviceArray<T>& array, DType dtype, int64_t heads, int64_t rows) const {
    if (IsPacked()) return array.View(dtype, {rows, heads, case_.dim});
    return array.View(dtype, {1, heads, rows, case_.dim});
  }

  DType dtype_;
  bool is_ordered_;
  DeviceCase case_;
  DeviceArray<uint8_t> q_, k_, v_, dout_, bias_, mask_;
  DeviceArray<int32_t> cu_;
  DeviceArray<float> out_, lse_, dq_, dk_, dv_;
  tandem::Problem problem_;
  tandem::Outputs outputs_;
  tandem::Gradients gradients_;
};

// What `launch` puts on a stream, as a graph. Capture fails where that allocates, waits or
// synchronises.
class Graph {
 public:
  explicit Graph(const std::function<void(cudaStream_t)>& launch) {
    CheckCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CheckCuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    launch(stream_);
    CheckCuda(cudaStreamEndCapture(stream_, &graph_));
    CheckCuda(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  void Replay() {
    CheckCuda(cudaGraphLaunch(executable_, stream_));
    CheckCuda(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

class EveryKernel : public EachCudaKernel {};

// The plan of this kernel, forward or backward; null where it declines.
std::unique_ptr<Plan> PlanOf(const Kernel& kernel, const OnDevice& c, bool is_backward) {
  Options options;
  options.device = Device::kCuda;
  options.kernel = kernel.name;
  try {
    return is_backward ? std::make_unique<Plan>(c.problem(), c.outputs(), c.gradients(), options)
                       : std::make_unique<Plan>(c.problem(), c.outputs(), options);
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), Status::kUnsupported) << error.what();
    return nullptr;
  }
}

// Calls check(problem, launch on a stream, is_backward) for every case that the kernel serves.
void ForEveryCase(
    const Kernel& kernel,
    const std::function<void(OnDevice&, const std::function<void(cudaStream_t)>&, bool)>& check) {
  int served = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DeviceCase& device_case : kCases) {
      for (const bool is_backward : {false, true}) {
        SCOPED_TRACE(testing::Message() << device_case.name << ", dtype " << static_cast<int>(dtype)
                                        << (is_backward ? ", backward" : ""));
        OnDevice c(dtype, device_case, IsOrdered(kernel));
        const std::unique_ptr<Plan> plan = PlanOf(kernel, c, is_backward);
        if (plan == nullptr) continue;
        ++served;
        const size_t size = plan->workspace_size();
        const DeviceArray<uint8_t> workspace(static_cast<int64_t>(size));
        const auto launch = [&](cudaStream_t stream) {
          if (is_backward) {
            plan->Run(c.problem(), c.outputs(), c.gradients(), workspace.data(), size, stream);
          } else {
            plan->Run(c.problem(), c.outputs(), workspace.data(), size, stream);
          }
        };
        check(c, launch, is_backward);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
  EXPECT_GT(served, 0) << "it declined every case";
}

TEST_P(EveryKernel, ReplaysInAGraph) {
  ForEveryCase(GetParam(), [](OnDevice& c, const auto& launch, bool is_backward) {
    Graph graph(launch);
    for (const uint64_t seed : {10, 20}) {
      std::vector<float> results[2];
      for (const bool is_replayed : {false, true}) {
        c.Fill(seed);
        if (is_backward) c.Forward();
        is_replayed ? graph.Replay() : launch(nullptr);
        results[is_replayed] = c.Fetch(is_backward);
      }
      ASSERT_TRUE(SameBits(results[0], results[1])) << "seed " << seed;
    }
  });
}

TEST_P(EveryKernel, ThousandRunsAreEqual) {
  ForEveryCase(GetParam(), [](OnDevice& c, const auto& launch, bool is_backward) {
    c.Fill(30);
    if (is_backward) c.Forward();
    launch(nullptr);
    const std::vector<float> first = c.Fetch(is_backward);
    for (int run = 1; run < 1000; ++run) {
      launch(nullptr);
      ASSERT_TRUE(SameBits(c.Fetch(is_backward), first)) << "run " << run;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Cuda, EveryKernel, ::testing::ValuesIn(CudaKernels()),
                         [](const auto& info) { return TestName(info.param.name); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(EveryKernel);

}  // namespace
}  // namespace tandem::test
