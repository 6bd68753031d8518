// Gradients that other libraries got wrong: the numbers themselves, memory and shapes.
#include "tests/kernels/peer_gradients.h"

#include <sys/mman.h>

#include "oracle/gradient.h"

namespace tandem::test {
namespace {

// cuDNN: dQ NaN with a mask where the rows are 64 modulo 128 and a row's LSE is below -88.7.
TEST_P(PeerGradients, Issue196678LseFarBelowZero) {
  CaseSpec spec = PeerCase(192, 192, 64);
  spec.terms = {Dense(4)};
  spec.bias.dtype = TANDEM_DTYPE_F32;
  ForEachType(
      spec,
      [](BackwardCase& c) {
        Tensor& bias = *c.forward().bias();
        bias.ForEach([&](std::span<const int64_t> index) {
          bias.Set(index, bias.Get(index) - 100.0 * static_cast<double>(index[2] % 5));
        });
      },
      ExpectAllFinite);
}

// efficient_cuda: NaN with a finite float mask. 110213: rows of the lowest number.
TEST_P(PeerGradients, Issue178251FiniteMaskOfTheLowestNumber) {
  for (const tandem_dtype bias : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    CaseSpec spec = PeerCase(70, 130, 32);
    spec.bias.dtype = bias;
    spec.bias.lowest_rows = 0.4;
    ForEachType(spec, {}, ExpectAllFinite);
  }
}

// An illegal access where only the mask needs a gradient.
TEST_P(PeerGradients, Issue148476OnlyTheBiasNeedsAGradient) {
  CaseSpec spec = PeerCase(65, 70, 16);
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.per_batch = spec.bias.per_head = false;
  spec.batch = 2;
  ForEachType(
      spec,
      [](BackwardCase& c) { c.gradients().dq = c.gradients().dk = c.gradients().dv = nullptr; },
      [](BackwardCase& c) { ExpectFinite(*c.dbias()); });
}

// efficient_cuda: 32-bit offsets into the mask, more than 2^31 pairs.
TEST_P(PeerGradients, Issue187225MoreThan2To31Pairs) {
  if (GetParam().name.find("reference") != std::string::npos) return;  // hours
  CaseSpec spec = PeerCase(46400, 46400, 8);
  spec.q_heads = spec.kv_heads = 1;
  spec.terms = {Band(TANDEM_ALIGN_TOP_LEFT, 5, 2)};
  spec.dtype = TANDEM_DTYPE_F32;
  if (!MustAcceptBackward(GetParam(), spec)) return;
  BackwardCase c(spec);
  Tensor keys(TANDEM_DTYPE_BOOL, {46400, 46400}, {{}, {}, 0, 1});  // every row the same memory
  for (int64_t j = 0; j < 46400; ++j) keys.Set({0, j}, j % 7 != 3);
  tandem_dense_term dense = TANDEM_DENSE_TERM_INIT;
  dense.mask = keys.get();
  tandem_problem& problem = c.forward().problem();
  const tandem_mask_term* terms[] = {problem.mask_terms[0], &dense.head};
  problem.mask_terms = terms;
  problem.mask_term_count = 2;
  tandem_options options = TANDEM_OPTIONS_INIT;
  ASSERT_EQ(tandem_attention(&problem, &c.forward().outputs(), &options), TANDEM_STATUS_OK)
      << tandem_last_error();
  ASSERT_TRUE(RunBackwardOrDecline(GetParam(), c));
  oracle::GradientCompareOptions compare;
  compare.max_pairs = 1 << 20;
  const oracle::GradientResults results =
      oracle::CompareGradients(problem, c.forward().outputs(), c.gradients(), compare);
  EXPECT_TRUE(results.InContract()) << results.Worst();
}

// efficient_cuda: offsets of the bias and of its gradient beyond 2^32 elements.
TEST_P(PeerGradients, Issue187227OffsetsBeyond2To32) {
  if (GetParam().device != TANDEM_DEVICE_CPU) return;  // a device would be sent all of it
  constexpr int64_t kRows = 70, kKeys = 90, kRowStride = (int64_t{1} << 32) / 64;
  constexpr size_t kBytes = static_cast<size_t>(kRows * kRowStride * 4);
  struct Reserved {
    void* data = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ~Reserved() {
      if (data != MAP_FAILED) munmap(data, kBytes);
    }
  } bias_memory, gradient_memory;
  if (bias_memory.data == MAP_FAILED || gradient_memory.data == MAP_FAILED) {
    GTEST_SKIP() << "the address space is limited";
  }
  CaseSpec spec = PeerCase(kRows, kKeys, 16);
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.rank = 2;
  if (!MustAcceptBackward(GetParam(), spec)) return;
  BackwardCase c(spec);
  tandem_tensor bias = *c.forward().bias()->get(), dbias = *c.dbias()->get();
  bias.strides[0] = dbias.strides[0] = kRowStride;
  bias.data = bias_memory.data;
  dbias.data = gradient_memory.data;
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kKeys; ++j) {
      static_cast<float*>(bias.data)[i * kRowStride + j] =
          static_cast<float>(c.forward().bias()->Get({i, j}));
    }
  }
  c.forward().problem().bias = &bias;
  c.gradients().dbias = &dbias;
  ASSERT_EQ(c.RunForward(), TANDEM_STATUS_OK) << tandem_last_error();
  ASSERT_TRUE(RunBackwardOrDecline(GetParam(), c));
  ExpectGradients(GetParam(), c);
}

// efficient_cuda: wrong with a boolean mask, keys of stride 0 and 1 modulo 32 of them (padding on
// the left).
TEST_P(PeerGradients, Issue191937BroadcastKeysWithLeftPadding) {
  for (const int64_t keys : {33, 65, 129}) {
    CaseSpec spec = PeerCase(40, keys, 32);
    spec.q_heads = 4;
    spec.batch = 2;
    spec.k_strides.broadcast = spec.v_strides.broadcast = 0b0010;
    TermSpec ranges = RowRanges(1);
    spec.terms = {Dense(3), ranges};
    ForEachType(spec, {});
  }
}

// 41508: one row without keys made the gradients of the whole batch NaN. 131060: they are exact
// zeros.
TEST_P(PeerGradients, Issue41508OneEmptyRowPoisonsNothing) {
  CaseSpec spec = PeerCase(32, 32, 16);
  spec.q_heads = spec.kv_heads = 1;
  CaseSpec with_bias = spec;
  with_bias.bias.dtype = TANDEM_DTYPE_F32;
  // (row % 4 != 0) and (i % 5 == j % 5), as a float mask of 0 and -inf.
  ForEachType(
      with_bias,
      [](BackwardCase& c) {
        Tensor& bias = *c.forward().bias();
        bias.ForEach([&](std::span<const int64_t> index) {
          const bool visible = index[2] % 4 != 0 && index[2] % 5 == index[3] % 5;
          bias.Set(index, visible ? 0.0 : -INFINITY);
        });
      },
      [](BackwardCase& c) {
        ExpectAllFinite(c);
        for (int64_t i = 0; i < 32; i += 4) {
          for (int64_t d = 0; d < 16; ++d) {
            const double dq = c.dq().Get({0, 0, i, d});
            EXPECT_EQ(dq, 0.0);
            EXPECT_FALSE(std::signbit(dq));
          }
        }
      });
}

// 127055: NaN where all of the leading keys are masked.
TEST_P(PeerGradients, Issue127055LeadingTilesMasked) {
  CaseSpec spec = PeerCase(20, 700, 16);
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.per_row = spec.bias.per_head = false;
  ForEachType(
      spec,
      [](BackwardCase& c) {
        Tensor& bias = *c.forward().bias();
        for (int64_t j = 0; j < 520; ++j) bias.Set({0, 0, 0, j}, -INFINITY);
      },
      [](BackwardCase& c) {
        ExpectAllFinite(c);
        for (int64_t j = 0; j < 520; ++j) EXPECT_EQ(c.dk().Get({0, 1, j, 3}), 0.0);
      });
}

// 141128: NaN in q must stay NaN, and not be taken for a masked row.
TEST_P(PeerGradients, Issue141128NanStaysNan) {
  CaseSpec spec = PeerCase(16, 16, 16);
  ForEachType(
      spec, [](BackwardCase& c) { c.forward().q().Fill(NAN); },
      [](BackwardCase& c) { EXPECT_TRUE(HasNan(c.dq()) && HasNan(c.dk()) && HasNan(c.dv())); });
  ForEachType(
      spec,
      [](BackwardCase& c) {
        c.forward().q().Set({0, 0, 3, 4}, INFINITY);
      },
      [](BackwardCase& c) { EXPECT_TRUE(HasNan(c.dq())); });
}

// 105202, cudnn-frontend 804: scales that are not positive.
TEST_P(PeerGradients, Issue105202ScalesThatAreNotPositive) {
  for (const float scale : {0.0f, -0.125f, -1e4f}) {
    CaseSpec spec = PeerCase(64, 64, 64);
    spec.scale = scale;
    spec.terms = {Causal(TANDEM_ALIGN_TOP_LEFT)};
    ForEachType(spec, {}, [](BackwardCase& c) {  // f16 has no numbers for the largest scale's
      EXPECT_FALSE(HasNan(c.dq()) || HasNan(c.dk()) || HasNan(c.dv()));
      ExpectFinite(c.dv());
    });
  }
}

// 187506, 112577, 133671: strided inputs, outputs and gradients.
TEST_P(PeerGradients, Issue187506AnyStrides) {
  CaseSpec spec = PeerCase(70, 90, 24);
  spec.batch = 2;
  spec.q_strides = {{2, 0, 3, 1}, {1, 0, 2, 3}, 0b0100, 0};
  spec.k_strides = {{3, 1, 0, 2}, {}, 0, 0};
  spec.v_strides = {{1, 2, 0, 3}, {0, 3, 1, 2}, 0b1001, 0};
  spec.out_strides = {{0, 2, 1, 3}, {}, 0, 0};
  spec.bias.dtype = TANDEM_DTYPE_F32;
  spec.bias.strides.order = {0, 1, 3, 2};
  ForEachType(spec, {});
}

// 163400, 116472: dBias in the bias's own broadcast shape.
TEST_P(PeerGradients, Issue163400EveryBroadcastShapeOfTheBias) {
  for (int shape = 0; shape < 16; ++shape) {
    CaseSpec spec = PeerCase(66, 70, 8);
    spec.batch = 2;
    spec.q_heads = 4;
    spec.bias.dtype = TANDEM_DTYPE_F32;
    spec.bias.per_batch = (shape & 1) != 0;
    spec.bias.per_head = (shape & 2) != 0;
    spec.bias.per_row = (shape & 4) != 0;
    spec.bias.per_key = (shape & 8) != 0;
    ForEachType(spec, {});
  }
}

// PyTorch's own test of uniform attention: q = k = 0 and v = 1 with a mask of all true.
TEST_P(PeerGradients, UniformAttention) {
  CaseSpec spec = PeerCase(300, 257, 16);
  spec.terms = {};
  ForEachType(
      spec,
      [](BackwardCase& c) {
        c.forward().q().Fill(0);
        c.forward().k().Fill(0);
        c.forward().v().Fill(1);
        c.dout().Fill(1);
        c.dlse().Fill(0);
      },
      [](BackwardCase& c) {
        const double rounding = c.spec().dtype == TANDEM_DTYPE_F32 ? 1e-5 : 1e-2;
        for (int64_t d = 0; d < 16; ++d) {
          EXPECT_EQ(std::fabs(c.dq().Get({0, 1, 200, d})), 0.0);
          EXPECT_EQ(std::fabs(c.dk().Get({0, 1, 200, d})), 0.0);
          EXPECT_NEAR(c.dv().Get({0, 1, 200, d}), 300.0 / 257.0, rounding);
        }
      });
}

INSTANTIATE_TEST_SUITE_P(Kernels, PeerGradients, ::testing::ValuesIn(BackwardKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
