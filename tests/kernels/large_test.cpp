// Elements beyond 2^31 and 2^32: tensors spread by their strides over memory that is reserved but
// hardly touched, and masks of more than 2^32 pairs.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>

#include "oracle/compare.h"
#include "tests/kernels/agreement.h"

namespace tandem::test {
namespace {

// Zero-filled address space of which only touched pages exist.
class Reserved {
 public:
  explicit Reserved(int64_t size) : size_(size) {
    memory_ = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reserved() {
    if (good()) munmap(memory_, size_);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  bool good() const { return memory_ != MAP_FAILED; }
  void* data() const { return memory_; }

 private:
  void* memory_;
  int64_t size_;
};

// A descriptor over reserved memory, filled element by element.
class Spread {
 public:
  Spread(tandem_dtype dtype, Shape shape, const std::vector<int64_t>& strides)
      : memory_(Size(dtype, shape, strides)) {
    tensor_.dtype = dtype;
    tensor_.device_type = TANDEM_DEVICE_CPU;
    tensor_.rank = static_cast<int32_t>(shape.size());
    tensor_.data = memory_.data();
    for (size_t d = 0; d < shape.size(); ++d) {
      tensor_.shape[d] = shape[d];
      tensor_.strides[d] = strides[d];
    }
  }
  bool good() const { return memory_.good(); }
  const tandem_tensor* get() const { return &tensor_; }

  // Takes the elements of a tensor of the same shape and type.
  void Take(const Tensor& from) {
    const int64_t size = SizeOf(tensor_.dtype);
    const std::vector<uint8_t> bytes = from.ElementBytes();
    int64_t n = 0;
    from.ForEach([&](std::span<const int64_t> index) {
      int64_t offset = 0;
      for (size_t d = 0; d < index.size(); ++d) offset += index[d] * tensor_.strides[d];
      std::copy_n(bytes.data() + size * n++, size,
                  static_cast<uint8_t*>(tensor_.data) + size * offset);
    });
  }

 private:
  static int64_t Size(tandem_dtype dtype, const Shape& shape, const std::vector<int64_t>& strides) {
    int64_t last = 0;
    for (size_t d = 0; d < shape.size(); ++d) last += (shape[d] - 1) * strides[d];
    return (last + 1) * SizeOf(dtype);
  }
  Reserved memory_;
  tandem_tensor tensor_ = TANDEM_TENSOR_INIT;
};

class Large : public ::testing::TestWithParam<Kernel> {
 protected:
  void SetUp() override {
    if (GetParam().device == TANDEM_DEVICE_CUDA) GTEST_SKIP() << "staging makes tensors compact";
  }
  tandem_status Run(const tandem_problem& problem, const tandem_outputs& outputs) {
    tandem_options options = TANDEM_OPTIONS_INIT;
    options.kernel = GetParam().name.c_str();
    return tandem_attention(&problem, &outputs, &options);
  }
  void ExpectAgreement(const tandem_problem& problem, const tandem_outputs& outputs,
                       tandem_dtype dtype) {
    oracle::CompareOptions options;
    options.arithmetic = oracle::ArithmeticFor(dtype, false);
    const oracle::CompareResult result = oracle::Compare(problem, outputs, options);
    EXPECT_TRUE(result.InContract()) << GetParam() << " " << result.worst;
    EXPECT_GT(result.rows_compared, 0);
  }
};

// Head 1 of every tensor begins beyond 2^32 elements, and rows are far apart.
TEST_P(Large, OffsetsBeyond32Bits) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_F32, TANDEM_DTYPE_BF16}) {
    CaseSpec spec;
    spec.dtype = dtype;
    spec.q_heads = spec.kv_heads = 2;
    spec.q_rows = 20;
    spec.kv_rows = 70;
    spec.qk_dim = spec.v_dim = 16;
    spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
    Case compact(spec);
    const int64_t head = (int64_t{1} << 32) + 5, row = (int64_t{1} << 25) + 3;
    const std::vector<int64_t> strides = {0, head, row, 1};
    Spread q(dtype, {1, 2, 20, 16}, strides), k(dtype, {1, 2, 70, 16}, strides);
    Spread v(dtype, {1, 2, 70, 16}, strides), out(dtype, {1, 2, 20, 16}, strides);
    Spread lse(TANDEM_DTYPE_F32, {1, 2, 20}, {0, head, row});
    if (!q.good() || !k.good() || !v.good() || !out.good() || !lse.good()) {
      GTEST_SKIP() << "the machine does not reserve this much address space";
    }
    q.Take(compact.q());
    k.Take(compact.k());
    v.Take(compact.v());
    tandem_problem problem = compact.problem();
    problem.q = q.get();
    problem.k = k.get();
    problem.v = v.get();
    tandem_outputs outputs = TANDEM_OUTPUTS_INIT;
    outputs.out = out.get();
    outputs.lse = lse.get();
    const tandem_status status = Run(problem, outputs);
    if (status == TANDEM_STATUS_UNSUPPORTED) {
      EXPECT_FALSE(MustAccept(GetParam(), spec)) << tandem_last_error();
      continue;
    }
    ASSERT_EQ(status, TANDEM_STATUS_OK) << tandem_last_error();
    ExpectAgreement(problem, outputs, dtype);
  }
}

// Rows of a dense mask and of a bias beyond 2^32 elements.
TEST_P(Large, MaskAndBiasRowsBeyond32Bits) {
  CaseSpec spec;
  spec.dtype = GetParam().name.ends_with("bf16")  ? TANDEM_DTYPE_BF16
               : GetParam().name.ends_with("f16") ? TANDEM_DTYPE_F16
                                                  : TANDEM_DTYPE_F32;
  spec.q_rows = 20;
  spec.kv_rows = 70;
  spec.qk_dim = spec.v_dim = 16;
  Case c(spec);
  const int64_t row = (int64_t{1} << 28) + 7;
  Spread mask(TANDEM_DTYPE_BOOL, {20, 70}, {row, 1});
  Spread bias(TANDEM_DTYPE_F16, {20, 70}, {row, 1});
  if (!mask.good() || !bias.good()) GTEST_SKIP() << "address space";
  Random random(5);
  Tensor values(TANDEM_DTYPE_F16, {20, 70}), bits(TANDEM_DTYPE_BOOL, {20, 70});
  values.FillNormal(random);
  bits.ForEach([&](std::span<const int64_t> index) { bits.Set(index, random.Chance(0.6)); });
  mask.Take(bits);
  bias.Take(values);
  tandem_dense_term term = TANDEM_DENSE_TERM_INIT;
  term.mask = mask.get();
  const tandem_mask_term* terms[] = {&term.head};
  c.problem().mask_terms = terms;
  c.problem().mask_term_count = 1;
  c.problem().bias = bias.get();
  ASSERT_EQ(Run(c.problem(), c.outputs()), TANDEM_STATUS_OK) << tandem_last_error();
  ExpectAgreement(c.problem(), c.outputs(), spec.dtype);
}

// 70000 x 70000 pairs, more than 2^32: a key padding mask of stride 0 under a narrow window.
TEST_P(Large, MoreThan32BitsOfPairs) {
  CaseSpec spec;
  spec.dtype = GetParam().name.ends_with("bf16")  ? TANDEM_DTYPE_BF16
               : GetParam().name.ends_with("f16") ? TANDEM_DTYPE_F16
                                                  : TANDEM_DTYPE_F32;
  spec.q_rows = spec.kv_rows = 70000;
  spec.qk_dim = spec.v_dim = 8;
  Case c(spec);
  Tensor keys(TANDEM_DTYPE_BOOL, {70000, 70000}, {{}, {}, 0, 1});  // every row the same memory
  Random random(6);
  for (int64_t j = 0; j < 70000; ++j) keys.Set({0, j}, random.Chance(0.9));
  tandem_dense_term dense = TANDEM_DENSE_TERM_INIT;
  dense.mask = keys.get();
  tandem_band_term band = TANDEM_BAND_TERM_INIT;
  band.alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
  band.left = 5;
  band.right = 0;
  const tandem_mask_term* terms[] = {&dense.head, &band.head};
  c.problem().mask_terms = terms;
  c.problem().mask_term_count = 2;
  ASSERT_EQ(Run(c.problem(), c.outputs()), TANDEM_STATUS_OK) << tandem_last_error();
  ExpectAgreement(c.problem(), c.outputs(), spec.dtype);
}

INSTANTIATE_TEST_SUITE_P(Kernels, Large, ::testing::ValuesIn(ForwardKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
