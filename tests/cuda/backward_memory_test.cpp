// Gradients of tensors that are on the GPU already: the same bits a thousand times, graphs, and
// metadata on the device that cannot be trusted.
#include <cstring>

#include "tests/cuda/device_array.h"
#include "tests/cuda/on_gpu.h"

namespace tandem::test {
namespace {

constexpr int64_t kHeads = 4, kKeyHeads = 2, kDim = 40;

// Numbers of a type: normals as f32 or bf16, finite numbers as f16.
std::vector<uint8_t> Numbers(DType dtype, int64_t count, uint64_t seed) {
  const std::vector<float> values = Normals(count, seed);
  const size_t size = dtype == DType::kF32 ? 4 : 2;
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t n = 0; n < values.size(); ++n) {
    uint32_t bits;
    std::memcpy(&bits, &values[n], 4);
    if (dtype == DType::kF16) bits &= 0xbfffffffu;
    const uint32_t kept = dtype == DType::kF32 ? bits : bits >> 16;
    std::memcpy(&bytes[size * n], &kept, size);
  }
  return bytes;
}

// Attention over tensors [heads, rows, 40] with every gradient that a mask and a bias give.
struct OnDevice {
  OnDevice(DType dtype, int64_t rows, const Mask& mask)
      : q(Numbers(dtype, kHeads * rows * kDim, 1)),
        k(Numbers(dtype, kKeyHeads * rows * kDim, 2)),
        v(Numbers(dtype, kKeyHeads * rows * kDim, 3)),
        dout(Numbers(dtype, kHeads * rows * kDim, 4)),
        bias(Normals(rows * rows, 5)),
        out(static_cast<int64_t>(Numbers(dtype, kHeads * rows * kDim, 1).size())),
        lse(kHeads * rows),
        dq(kHeads * rows * kDim),
        dk(kKeyHeads * rows * kDim),
        dv(kKeyHeads * rows * kDim),
        dbias(rows * rows),
        problem(Layout::kBHSD, q.View(dtype, {1, kHeads, rows, kDim}),
                k.View(dtype, {1, kKeyHeads, rows, kDim}),
                v.View(dtype, {1, kKeyHeads, rows, kDim})),
        outputs(out.View(dtype, {1, kHeads, rows, kDim}), lse.View(DType::kF32, {1, kHeads, rows})),
        gradients(dout.View(dtype, {1, kHeads, rows, kDim})) {
    problem.mask = mask;
    problem.bias = bias.View(DType::kF32, {rows, rows});
    gradients.dq = dq.View(DType::kF32, {1, kHeads, rows, kDim});
    gradients.dk = dk.View(DType::kF32, {1, kKeyHeads, rows, kDim});
    gradients.dv = dv.View(DType::kF32, {1, kKeyHeads, rows, kDim});
    gradients.dbias = dbias.View(DType::kF32, {rows, rows});
    Attention(problem, outputs);
  }

  std::vector<float> Fetch() const {
    std::vector<float> all;
    for (const DeviceArray<float>* array : {&dq, &dk, &dv, &dbias}) {
      const std::vector<float> values = array->Fetch();
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }

  DeviceArray<uint8_t> q, k, v, dout;
  DeviceArray<float> bias;
  DeviceArray<uint8_t> out;
  DeviceArray<float> lse, dq, dk, dv, dbias;
  tandem::Problem problem;
  tandem::Outputs outputs;
  tandem::Gradients gradients;
};

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class BackwardMemory : public OnGpu {};

TEST_F(BackwardMemory, ThousandRunsAreEqual) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const bool has_bias : {false, true}) {
      OnDevice c(dtype, 300, Causal(Alignment::kTopLeft));
      if (!has_bias) {
        c.problem.bias.reset();
        c.gradients.dbias.reset();
        Attention(c.problem, c.outputs);
      }
      const Plan plan(c.problem, c.outputs, c.gradients);
      DeviceArray<uint8_t> workspace(static_cast<int64_t>(plan.workspace_size()));
      std::vector<float> first;
      for (int run = 0; run < 1000; ++run) {
        plan.Run(c.problem, c.outputs, c.gradients, workspace.data(), plan.workspace_size(),
                 nullptr);
        const std::vector<float> now = c.Fetch();
        if (run == 0) first = now;
        ASSERT_TRUE(SameBits(first, now)) << "run " << run;
      }
    }
  }
}

TEST_F(BackwardMemory, SmallGraphReplays) {
  OnDevice c(DType::kBF16, 150, Causal(Alignment::kTopLeft));
  const Plan plan(c.problem, c.outputs, c.gradients);
  DeviceArray<uint8_t> workspace(static_cast<int64_t>(plan.workspace_size()));
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  // Capture fails where a call allocates, waits or synchronises.
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  plan.Run(c.problem, c.outputs, c.gradients, workspace.data(), plan.workspace_size(), stream);
  CheckCuda(cudaStreamEndCapture(stream, &graph));
  CheckCuda(cudaGraphInstantiate(&executable, graph, 0));
  for (const uint64_t seed : {10, 20}) {
    const std::vector<uint8_t> dout = Numbers(DType::kBF16, kHeads * 150 * kDim, seed);
    CheckCuda(cudaMemcpy(c.dout.data(), dout.data(), dout.size(), cudaMemcpyHostToDevice));
    AttentionBackward(c.problem, c.outputs, c.gradients);
    const std::vector<float> expected = c.Fetch();
    CheckCuda(cudaMemset(c.dq.data(), 0xff, static_cast<size_t>(kHeads * 150 * kDim) * 4));
    CheckCuda(cudaGraphLaunch(executable, stream));
    CheckCuda(cudaStreamSynchronize(stream));
    EXPECT_TRUE(SameBits(c.Fetch(), expected));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// PyTorch's issue 187227: offsets of the bias and of its gradient beyond 2^32 elements.
TEST_F(BackwardMemory, Issue187227OffsetsBeyond2To32) {
  constexpr int64_t kRows = 70, kRowStride = (int64_t{1} << 32) / 64, kCount = kRows * kRowStride;
  size_t available, total;
  CheckCuda(cudaMemGetInfo(&available, &total));
  if (available < (2 * kCount + (1 << 28)) * sizeof(float)) {
    GTEST_SKIP() << "the GPU has " << available << " bytes free";
  }
  OnDevice c(DType::kF32, kRows, Causal(Alignment::kTopLeft));
  AttentionBackward(c.problem, c.outputs, c.gradients);
  const std::vector<float> compact = c.Fetch();
  const DeviceArray<float> bias(kCount), dbias(kCount);
  constexpr size_t kBytes = kRows * sizeof(float), kPitch = kRowStride * sizeof(float);
  CheckCuda(cudaMemcpy2D(bias.data(), kPitch, c.bias.data(), kBytes, kBytes, kRows,
                         cudaMemcpyDeviceToDevice));
  const auto view = [&](const DeviceArray<float>& array) {
    return tandem::Tensor(array.data(), DType::kF32, {kRows, kRows}, {kRowStride, 1},
                          Device::kCuda);
  };
  c.problem.bias = view(bias);
  c.gradients.dbias = view(dbias);
  Attention(c.problem, c.outputs);
  AttentionBackward(c.problem, c.outputs, c.gradients);
  CheckCuda(cudaMemcpy2D(c.dbias.data(), kBytes, dbias.data(), kPitch, kBytes, kRows,
                         cudaMemcpyDeviceToDevice));
  EXPECT_TRUE(SameBits(c.Fetch(), compact));
}

// Sequences that overlap, run backwards or beyond the tensors: nothing beside the gradients is
// written, all of their rows are, and the status word tells.
TEST_F(BackwardMemory, SmallHostileMetadataIsClampedAndReported) {
  constexpr int64_t kRows = 100;
  for (const std::vector<int32_t>& cu :
       {std::vector<int32_t>{0, 60, 40, 100}, {-50, 20, 1000, 3}, {0, 2000000000, 5, 100}}) {
    const DeviceArray<int32_t> device_cu(cu);
    DeviceArray<int32_t> status(std::vector<int32_t>{0});
    const int64_t count = kRows * kHeads * kDim;
    const DeviceArray<float> q(Normals(count, 5)), k(Normals(count, 6)), v(Normals(count, 7)),
        dout(Normals(count, 8));
    DeviceArray<float> out(count), lse(kRows * kHeads), dq(count), dk(count), dv(count);
    const auto view = [&](const DeviceArray<float>& array) {
      return array.View(DType::kF32, {kRows, kHeads, kDim});
    };
    tandem::Problem problem(Layout::kTHD, view(q), view(k), view(v));
    const tandem::Tensor cu_view(device_cu.data(), DType::kI32, {static_cast<int64_t>(cu.size())},
                                 {}, Device::kCuda);
    problem.mask = Packed(cu_view, cu_view, 60, 60) & Causal(Alignment::kTopLeft);
    problem.device_status = status.data();
    const tandem::Outputs outputs(view(out), lse.View(DType::kF32, {kHeads, kRows}));
    Attention(problem, outputs);
    status.Fetch();
    CheckCuda(cudaMemset(status.data(), 0, sizeof(int32_t)));
    tandem::Gradients gradients(view(dout));
    gradients.dq = view(dq);
    gradients.dk = view(dk);
    gradients.dv = view(dv);
    AttentionBackward(problem, outputs, gradients);
    EXPECT_NE(status.Fetch()[0], 0);
    float prefill;
    std::memset(&prefill, 0xc5, sizeof(prefill));
    for (const DeviceArray<float>* array : {&dq, &dk, &dv}) {
      for (const float value : array->Fetch()) ASSERT_NE(value, prefill) << "not written";
    }
  }
}

}  // namespace
}  // namespace tandem::test
