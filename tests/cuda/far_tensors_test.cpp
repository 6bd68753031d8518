// Every kernel for CUDA, forward and backward, on tensors whose heads or rows lie more than 2^32
// elements apart: the bits are those of the same tensors without gaps.
#include "tests/cuda/device_array.h"
#include "tests/cuda/on_gpu.h"

namespace tandem::test {
namespace {

constexpr int64_t kHeads = 2, kRows = 70, kDim = 64;
constexpr int64_t kElements = kHeads * kRows * kDim;

// Where element (head, row, 0) of each tensor lies.
struct Gaps {
  const char* name;
  int64_t head_stride, row_stride;
};
// Strides of 16 bytes' multiples, as Hopper's kernels ask.
constexpr Gaps kCompact = {"compact", kRows* kDim, kDim};
constexpr Gaps kFar[] = {{"heads", (int64_t{1} << 32) + 8, kDim},
                         {"rows", kDim, (int64_t{1} << 26) + 8}};

// Q, K, V, dO, O, dQ, dK and dV, in this order, share one piece of memory: a gap costs it once.
constexpr int kTensors = 8, kInputs = 4;

class Tensors {
 public:
  Tensors(DType dtype, const Gaps& gaps)
      : dtype_(dtype),
        size_(dtype == DType::kF32 ? 4 : 2),
        gaps_(gaps),
        memory_(Elements(gaps) * size_),
        lse_(kHeads * kRows) {
    for (int n = 0; n < kInputs; ++n) Store(n, Numbers(dtype, kElements, n + 1));
  }
  static int64_t Elements(const Gaps& gaps) {
    return (kHeads - 1) * gaps.head_stride + (kRows - 1) * gaps.row_stride + kTensors * kElements;
  }

  tandem::Tensor View(int n) const {
    return tandem::Tensor(At(n, 0, 0), dtype_, {1, kHeads, kRows, kDim},
                          {0, gaps_.head_stride, gaps_.row_stride, 1}, Device::kCuda);
  }
  tandem::Problem Problem() const {
    tandem::Problem problem(Layout::kBHSD, View(0), View(1), View(2));
    problem.mask = Causal(Alignment::kTopLeft);
    return problem;
  }
  tandem::Outputs Outputs() const {
    return tandem::Outputs(View(4), lse_.View(DType::kF32, {1, kHeads, kRows}));
  }
  tandem::Gradients Gradients(bool is_ordered) const {
    tandem::Gradients gradients(View(3));
    gradients.dq = View(5);
    gradients.dk = View(6);
    gradients.dv = View(7);
    gradients.deterministic = is_ordered;
    return gradients;
  }
  // Tensors [first, last) and the LSE, without gaps.
  std::vector<uint8_t> Fetch(int first, int last) const {
    const std::vector<float> lse = lse_.Fetch();
    std::vector<uint8_t> all(lse.size() * sizeof(float));
    std::memcpy(all.data(), lse.data(), all.size());
    for (int n = first; n < last; ++n) {
      std::vector<uint8_t> bytes(static_cast<size_t>(kElements * size_));
      Copy(n, bytes.data(), cudaMemcpyDeviceToHost);
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }

 private:
  // With gaps between heads, tensors lie one behind another; between rows, rows of all of them do.
  uint8_t* At(int n, int64_t head, int64_t row) const {
    const int64_t own = gaps_.row_stride > kDim ? kHeads * kDim : kHeads * kRows * kDim;
    return memory_.data() + (n * own + head * gaps_.head_stride + row * gaps_.row_stride) * size_;
  }
  void Store(int n, std::vector<uint8_t> bytes) const {
    Copy(n, bytes.data(), cudaMemcpyHostToDevice);
  }
  void Copy(int n, uint8_t* host, cudaMemcpyKind kind) const {
    const int64_t width = kDim * size_, pitch = gaps_.row_stride * size_;
    for (int64_t head = 0; head < kHeads; ++head) {
      uint8_t* to = host + head * kRows * width;
      uint8_t* from = At(n, head, 0);
      if (kind == cudaMemcpyHostToDevice) {
        CheckCuda(cudaMemcpy2D(from, pitch, to, width, width, kRows, kind));
      } else {
        CheckCuda(cudaMemcpy2D(to, width, from, pitch, width, kRows, kind));
      }
    }
  }

  DType dtype_;
  int64_t size_;
  Gaps gaps_;
  DeviceArray<uint8_t> memory_;
  DeviceArray<float> lse_;
};

class FarTensors : public EachCudaKernel {};

// Whether the kernel served the pass; its results are in `tensors` then.
bool Serves(const Kernel& kernel, const Tensors& tensors, bool is_backward) {
  Options options;
  options.device = Device::kCuda;
  options.kernel = kernel.name;
  try {
    if (!is_backward) {
      Attention(tensors.Problem(), tensors.Outputs(), options);
      return true;
    }
    Attention(tensors.Problem(), tensors.Outputs());
    AttentionBackward(tensors.Problem(), tensors.Outputs(), tensors.Gradients(IsOrdered(kernel)),
                      options);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), Status::kUnsupported) << error.what();
    return false;
  }
}

TEST_P(FarTensors, OffsetsBeyond2To32) {
  int served = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const bool is_backward : {false, true}) {
      const Tensors compact(dtype, kCompact);
      if (!Serves(GetParam(), compact, is_backward)) continue;
      // Without an order dQ has other bits in every run.
      const int first = !is_backward ? 4 : IsOrdered(GetParam()) ? 5 : 6;
      const int last = is_backward ? kTensors : 5;
      for (const Gaps& gaps : kFar) {
        SCOPED_TRACE(testing::Message()
                     << "far " << gaps.name << ", dtype " << static_cast<int>(dtype)
                     << (is_backward ? ", backward" : ""));
        size_t available, total;
        CheckCuda(cudaMemGetInfo(&available, &total));
        const int64_t bytes = Tensors::Elements(gaps) * (dtype == DType::kF32 ? 4 : 2);
        if (static_cast<int64_t>(available) < bytes + (int64_t{1} << 30)) {
          GTEST_SKIP() << "the GPU has " << available << " bytes free";
        }
        const Tensors far(dtype, gaps);
        ASSERT_TRUE(Serves(GetParam(), far, is_backward));
        EXPECT_EQ(far.Fetch(first, last), compact.Fetch(first, last));
        ++served;
      }
    }
  }
  EXPECT_GT(served, 0) << "it declined every case";
}

INSTANTIATE_TEST_SUITE_P(Cuda, FarTensors, ::testing::ValuesIn(CudaKernels()),
                         [](const auto& info) { return TestName(info.param.name); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FarTensors);

}  // namespace
}  // namespace tandem::test
