// Gradients of tensors that are on the GPU already: offsets beyond 2^32, and metadata on the device
// that cannot be trusted.
#include <cstring>

#include "tests/cuda/device_array.h"
#include "tests/cuda/on_gpu.h"

namespace tandem::test {
namespace {

constexpr int64_t kHeads = 4, kKeyHeads = 2, kDim = 40;

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

class BackwardMemory : public OnGpu {};

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
