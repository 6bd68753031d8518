#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tests/cuda/core_on_device.h"

namespace tandem::test {
namespace {

void Check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// An array on the device, copied in and out.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    Check(cudaMalloc(&data_, count * sizeof(T) + 1));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    Check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> Fetch() const {
    std::vector<T> values(count_);
    Check(cudaDeviceSynchronize());
    Check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t count_;
  void* data_ = nullptr;
};

constexpr int kThreads = 128;

__device__ int64_t ThreadIndex() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
unsigned Blocks(int64_t count) {
  return static_cast<unsigned>(core::CeilDiv<int64_t>(core::Max<int64_t>(count, 1), kThreads));
}

__global__ void MaskKernel(const __grid_constant__ core::Problem problem, MaskQuery query,
                           int64_t word_count, int64_t class_count, int64_t hull_count,
                           uint64_t* words, int32_t* classes, int64_t* hulls) {
  const int64_t n = ThreadIndex();
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(problem, query.batch, &status);
  if (n < word_count) words[n] = WordFact(problem, s, query, n);
  if (n < class_count) classes[n] = ClassFact(problem, s, query, n);
  if (n < hull_count) hulls[n] = HullFact(problem, s, query, n);
}

__global__ void ConvertKernel(const float* values, int64_t count, uint16_t* f16, uint16_t* bf16,
                              uint32_t* patterns) {
  const int64_t n = ThreadIndex();
  if (n < count) {
    f16[n] = core::FloatToF16(values[n]);
    bf16[n] = core::FloatToBf16(values[n]);
  }
  if (n < 65536) {
    patterns[n] = core::FloatToBits(core::F16ToFloat(static_cast<uint16_t>(n)));
    patterns[65536 + n] = core::FloatToBits(core::Bf16ToFloat(static_cast<uint16_t>(n)));
  }
}

__global__ void PhiloxKernel(const PhiloxInput* inputs, int64_t count, uint32_t* words) {
  const int64_t n = ThreadIndex();
  if (n >= count) return;
  const core::Dropout dropout = {inputs[n].seed, inputs[n].offset, 0, 1.0f, 1};
  const core::Philox4 drawn =
      core::DropoutWords(dropout, inputs[n].head_index, inputs[n].i, inputs[n].j);
  for (int w = 0; w < 4; ++w) words[4 * n + w] = drawn.word[w];
}

__global__ void SoftmaxKernel(const SoftmaxInput* inputs, int64_t count, float* facts) {
  const int64_t n = ThreadIndex();
  if (n < count) SoftmaxFacts(inputs[n], facts + kSoftmaxFacts * n);
}

}  // namespace

MaskFacts MaskFactsOnDevice(const core::Problem& problem, const MaskQuery& query) {
  const int64_t words = query.rows * query.words_per_row;
  const int64_t classes = query.tile_rows * query.words_per_row;
  const int64_t hulls = 2 * query.tile_rows;
  DeviceArray<uint64_t> device_words(words);
  DeviceArray<int32_t> device_classes(classes);
  DeviceArray<int64_t> device_hulls(hulls);
  MaskKernel<<<Blocks(words + hulls), kThreads>>>(problem, query, words, classes, hulls,
                                                  device_words.data(), device_classes.data(),
                                                  device_hulls.data());
  Check(cudaGetLastError());
  return {device_words.Fetch(), device_classes.Fetch(), device_hulls.Fetch()};
}

void ConvertOnDevice(const std::vector<float>& values, std::vector<uint16_t>* f16,
                     std::vector<uint16_t>* bf16, std::vector<uint32_t>* patterns) {
  const DeviceArray<float> device_values(values);
  DeviceArray<uint16_t> device_f16(values.size()), device_bf16(values.size());
  DeviceArray<uint32_t> device_patterns(2 * 65536);
  const int64_t count = static_cast<int64_t>(values.size());
  ConvertKernel<<<Blocks(core::Max<int64_t>(count, 65536)), kThreads>>>(
      device_values.data(), count, device_f16.data(), device_bf16.data(), device_patterns.data());
  Check(cudaGetLastError());
  *f16 = device_f16.Fetch();
  *bf16 = device_bf16.Fetch();
  *patterns = device_patterns.Fetch();
}

std::vector<uint32_t> PhiloxOnDevice(const std::vector<PhiloxInput>& inputs) {
  const DeviceArray<PhiloxInput> device_inputs(inputs);
  DeviceArray<uint32_t> words(4 * inputs.size());
  const int64_t count = static_cast<int64_t>(inputs.size());
  PhiloxKernel<<<Blocks(count), kThreads>>>(device_inputs.data(), count, words.data());
  Check(cudaGetLastError());
  return words.Fetch();
}

std::vector<float> SoftmaxFactsOnDevice(const std::vector<SoftmaxInput>& inputs) {
  const DeviceArray<SoftmaxInput> device_inputs(inputs);
  DeviceArray<float> facts(kSoftmaxFacts * inputs.size());
  const int64_t count = static_cast<int64_t>(inputs.size());
  SoftmaxKernel<<<Blocks(count), kThreads>>>(device_inputs.data(), count, facts.data());
  Check(cudaGetLastError());
  return facts.Fetch();
}

}  // namespace tandem::test
