// Tensors that are on the GPU already: what staging cannot show. Streams, graphs, mask plans in
// device memory, and metadata on the device that cannot be trusted.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <tandem/tandem.hpp>

#include "tests/cuda/device_array.h"
#include "tests/cuda/on_gpu.h"

namespace tandem::test {
namespace {

constexpr int64_t kHeads = 2, kDim = 40;

class DeviceMemory : public OnGpu {};

// A [1, 2, rows, 40] problem on the device and on the host, with `keys` keys, if not as many as
// rows.
struct BothSides {
  explicit BothSides(int64_t rows) : BothSides(rows, rows) {}
  BothSides(int64_t rows, int64_t keys)
      : rows(rows),
        keys(keys),
        host{Normals(kHeads * rows * kDim, 1), Normals(kHeads * keys * kDim, 2),
             Normals(kHeads * keys * kDim, 3)},
        q(host[0]),
        k(host[1]),
        v(host[2]),
        out(kHeads * rows * kDim),
        lse(kHeads * rows),
        problem(Layout::kBHSD, View(q, rows), View(k, keys), View(v, keys)),
        outputs(View(out, rows), lse.View(DType::kF32, {1, kHeads, rows})) {}

  static tandem::Tensor View(const DeviceArray<float>& array, int64_t rows) {
    return array.View(DType::kF32, {1, kHeads, rows, kDim});
  }
  tandem::Problem HostProblem() const {
    const auto view = [](const std::vector<float>& values, int64_t rows) {
      return tandem::Tensor(values.data(), {1, kHeads, rows, kDim});
    };
    return tandem::Problem(Layout::kBHSD, view(host[0], rows), view(host[1], keys),
                           view(host[2], keys));
  }
  // The same, staged.
  std::vector<float> Staged(const Mask& mask) const {
    tandem::Problem staged = HostProblem();
    staged.mask = mask;
    std::vector<float> result(host[0].size());
    tandem::Options options;
    options.device = Device::kCuda;
    tandem::Attention(staged, tandem::Tensor(result.data(), {1, kHeads, rows, kDim}), options);
    return result;
  }

  int64_t rows, keys;
  std::vector<float> host[3];
  DeviceArray<float> q, k, v, out, lse;
  tandem::Problem problem;
  tandem::Outputs outputs;
};

std::vector<uint8_t> RandomMask(int64_t rows) {
  Random random(4);
  std::vector<uint8_t> mask(static_cast<size_t>(rows * rows));
  for (uint8_t& pair : mask) pair = random.Chance(0.6);
  return mask;
}

TEST_F(DeviceMemory, SmallOneCallEqualsStaging) {
  BothSides both(129);
  both.problem.mask = Causal(Alignment::kTopLeft);
  tandem::Attention(both.problem, both.outputs);
  EXPECT_EQ(both.out.Fetch(), both.Staged(Causal(Alignment::kTopLeft)));
  both.lse.Fetch();
}

TEST_F(DeviceMemory, SmallMaskPlanOutlivesItsTermsOnAStream) {
  BothSides both(200);
  const std::vector<uint8_t> mask = RandomMask(200);
  const std::vector<float> expected =
      both.Staged(Dense(tandem::Tensor(mask.data(), DType::kBool, {200, 200})));
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  auto device_mask = std::make_unique<DeviceArray<uint8_t>>(mask);
  both.problem.mask = Dense(device_mask->View(DType::kBool, {200, 200}));
  const size_t size = MaskPlanSize(both.problem);
  DeviceArray<uint8_t> memory(static_cast<int64_t>(size));
  const MaskPlan mask_plan(both.problem, memory.data(), size, stream);
  CheckCuda(cudaStreamSynchronize(stream));
  device_mask.reset();
  both.problem.mask = Mask();
  both.problem.mask_plan = &mask_plan;
  const Plan plan(both.problem, both.outputs);
  DeviceArray<uint8_t> workspace(static_cast<int64_t>(plan.workspace_size()));
  for (int run = 0; run < 3; ++run) {
    plan.Run(both.problem, both.outputs, workspace.data(), plan.workspace_size(), stream);
    CheckCuda(cudaStreamSynchronize(stream));
    EXPECT_EQ(both.out.Fetch(), expected);
  }
  CheckCuda(cudaStreamDestroy(stream));
}

// One packed call with metadata on the device; returns the status word.
int32_t RunPacked(const std::vector<int32_t>& cu, const std::vector<int32_t>& lengths,
                  int64_t longest, std::vector<float>* result) {
  const int64_t total = 100;
  const DeviceArray<float> q(Normals(total * kHeads * kDim, 5)),
      k(Normals(total * kHeads * kDim, 6)), v(Normals(total * kHeads * kDim, 7));
  DeviceArray<float> out(total * kHeads * kDim), lse(total * kHeads);
  const DeviceArray<int32_t> device_cu(cu), device_lengths(lengths);
  DeviceArray<int32_t> status(std::vector<int32_t>{0});
  const auto view = [&](const DeviceArray<float>& array) {
    return array.View(DType::kF32, {total, kHeads, kDim});
  };
  tandem::Problem problem(Layout::kTHD, view(q), view(k), view(v));
  const int64_t count = static_cast<int64_t>(cu.size());
  const tandem::Tensor cu_view(device_cu.data(), DType::kI32, {count}, {}, Device::kCuda);
  problem.mask = Packed(cu_view, cu_view, longest, longest) & Causal(Alignment::kTopLeft);
  if (!lengths.empty()) {
    problem.mask = problem.mask & KvLengths(tandem::Tensor(device_lengths.data(), DType::kI32,
                                                           {count - 1}, {}, Device::kCuda));
  }
  problem.device_status = status.data();
  tandem::Attention(problem, {view(out), lse.View(DType::kF32, {kHeads, total})});
  *result = out.Fetch();
  lse.Fetch();
  return status.Fetch()[0];
}

TEST_F(DeviceMemory, SmallPackedMetadataThatIsSoundReportsNothing) {
  std::vector<float> result;
  EXPECT_EQ(RunPacked({3, 40, 40, 97}, {}, 57, &result), 0);
  for (int64_t row : {0, 1, 2, 97, 98, 99}) {
    for (int64_t n = 0; n < kHeads * kDim; ++n) ASSERT_EQ(result[row * kHeads * kDim + n], 0.0f);
  }
  EXPECT_NE(result[3 * kHeads * kDim], 0.0f);
}

TEST_F(DeviceMemory, SmallHostileMetadataIsClampedAndReported) {
  const struct {
    const char* what;
    std::vector<int32_t> cu, lengths;
    int64_t longest;
    int32_t status;
  } cases[] = {
      {"beyond the end", {0, 50, 1000000}, {}, 60, TANDEM_DEVICE_STATUS_CU_SEQLENS},
      {"negative", {-2000000000, 30, 100}, {}, 100, TANDEM_DEVICE_STATUS_CU_SEQLENS},
      {"decreasing", {0, 80, 20}, {}, 100, TANDEM_DEVICE_STATUS_CU_SEQLENS},
      {"largest", {INT32_MAX, INT32_MAX, INT32_MAX}, {}, 100, TANDEM_DEVICE_STATUS_CU_SEQLENS},
      {"longer than said", {0, 90, 100}, {}, 16, TANDEM_DEVICE_STATUS_CU_SEQLENS},
      {"length too large", {0, 50, 100}, {51, 50}, 50, TANDEM_DEVICE_STATUS_LENGTHS},
      {"length negative", {0, 50, 100}, {INT32_MIN, 50}, 50, TANDEM_DEVICE_STATUS_LENGTHS},
  };
  for (const auto& hostile : cases) {
    std::vector<float> result;
    EXPECT_EQ(RunPacked(hostile.cu, hostile.lengths, hostile.longest, &result), hostile.status)
        << hostile.what;
    float untouched;
    std::memset(&untouched, 0xc5, 4);
    for (float value : result) {
      ASSERT_TRUE(std::isfinite(value)) << hostile.what;
      ASSERT_NE(value, untouched) << hostile.what << ": an output was not written";
    }
  }
}

TEST_F(DeviceMemory, SmallHostileBlockListsAreClampedAndReported) {
  BothSides both(128);
  const DeviceArray<int32_t> counts({2, 2000000000});
  const DeviceArray<int32_t> indices({0, -5, 1, INT32_MAX});
  DeviceArray<int32_t> status(std::vector<int32_t>{0});
  both.problem.mask = BlockSparse(64, 64, counts.View(DType::kI32, {1, 1, 2}),
                                  indices.View(DType::kI32, {1, 1, 2, 2}));
  both.problem.device_status = status.data();
  tandem::Attention(both.problem, both.outputs);
  EXPECT_EQ(status.Fetch()[0], TANDEM_DEVICE_STATUS_BLOCK_INDEX);
  for (float value : both.out.Fetch()) ASSERT_TRUE(std::isfinite(value));
}

// Keys and values in pages whose table and lengths point anywhere: in bf16 whole chunks, which are
// copied asynchronously, and in f32 elements. With a band, other kernels serve them.
TEST_F(DeviceMemory, SmallHostilePagesAreClampedAndReported) {
  constexpr int64_t kPages = 7, kPageSize = 48, kEntries = 20, kBatch = 2, kWidth = 64;
  const DeviceArray<int32_t> sound({48 * 3, 48 * 20});
  const DeviceArray<int32_t> lengths({INT32_MIN, INT32_MAX});
  std::vector<int32_t> entries(kBatch * kEntries, 3);
  const DeviceArray<int32_t> good(entries);
  entries[kEntries + 1] = -1;
  entries[kEntries + 11] = INT32_MAX;
  entries[kEntries + 19] = kPages;
  entries[3] = INT32_MIN;  // behind the keys of its sequence
  const DeviceArray<int32_t> bad(entries);
  const struct {
    const DeviceArray<int32_t>& table;
    const DeviceArray<int32_t>& lengths;
    int32_t status;
  } cases[] = {{good, sound, 0},
               {bad, sound, TANDEM_DEVICE_STATUS_BLOCK_TABLE},
               {good, lengths, TANDEM_DEVICE_STATUS_LENGTHS},
               {bad, lengths, TANDEM_DEVICE_STATUS_BLOCK_TABLE | TANDEM_DEVICE_STATUS_LENGTHS}};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const int64_t width = dtype == DType::kF32 ? kWidth : kWidth / 2;  // of f32 elements
    const DeviceArray<float> q(std::vector<float>(kBatch * kHeads * width, 1.0f));
    const DeviceArray<float> keys(std::vector<float>(kPages * kPageSize * kHeads * width, 1.0f));
    const DeviceArray<float> values(std::vector<float>(kPages * kPageSize * kHeads * width, 1.0f));
    for (const bool has_band : {false, true}) {
      for (const auto& one : cases) {
        const DeviceArray<float> out(kBatch * kHeads * width);
        DeviceArray<int32_t> status(std::vector<int32_t>{0});
        const auto row = [&](const DeviceArray<float>& array) {
          return array.View(dtype, {kBatch, kHeads, 1, kWidth});
        };
        const auto pages = [&](const DeviceArray<float>& array) {
          return array.View(dtype, {kPages, kPageSize, kHeads, kWidth});
        };
        tandem::Problem problem(Layout::kBHSD, row(q), pages(keys), pages(values));
        problem.block_table = one.table.View(DType::kI32, {kBatch, kEntries});
        problem.page_size = kPageSize;
        problem.mask = KvLengths(one.lengths.View(DType::kI32, {kBatch}));
        if (has_band) problem.mask = problem.mask & Causal(Alignment::kBottomRight);
        problem.device_status = status.data();
        tandem::Attention(problem, row(out));
        EXPECT_EQ(status.Fetch()[0], one.status) << has_band;
        for (float value : out.Fetch()) ASSERT_TRUE(value == 0.0f || std::abs(value - 1) < 0.01f);
      }
    }
  }
}

TEST_F(DeviceMemory, SmallRefusedAllocationIsAStatusAndTheNextCallWorks) {
  BothSides both(64);
  // As many pages as the device has, so that the workspace of a huge mask cannot be had.
  size_t available = 0, total = 0;
  CheckCuda(cudaMemGetInfo(&available, &total));
  const int64_t rows = static_cast<int64_t>(std::sqrt(static_cast<double>(available))) * 4;
  const DeviceArray<uint8_t> one(std::vector<uint8_t>{1});
  const DeviceArray<float> row(Normals(kDim, 8));
  DeviceArray<float> out(rows);
  const auto repeated = [&](int64_t dim) {
    return tandem::Tensor(row.data(), DType::kF32, {1, 1, rows, dim}, {0, 0, 0, 1}, Device::kCuda);
  };
  tandem::Problem huge(Layout::kBHSD, repeated(kDim), repeated(kDim), repeated(1));
  // Strides of 1 in a row that repeats: a dense mask of rows * rows pairs from a short array.
  const DeviceArray<uint8_t> mask(2 * rows);
  huge.mask = Dense(tandem::Tensor(mask.data(), DType::kBool, {rows, rows}, {1, 1}, Device::kCuda));
  try {
    tandem::Attention(huge,
                      tandem::Tensor(out.data(), DType::kF32, {1, 1, rows, 1}, {}, Device::kCuda));
    FAIL() << "a workspace of " << rows << " squared bits was there";
  } catch (const tandem::Error& error) {
    EXPECT_EQ(error.status(), Status::kOutOfMemory) << error.what();
  }
  tandem::Attention(both.problem, both.outputs);
  EXPECT_EQ(both.out.Fetch(), both.Staged(Mask()));
}

}  // namespace
}  // namespace tandem::test
