// Gradients that other libraries got wrong: masks, and what is to be combined with them.
#include "tests/kernels/peer_gradients.h"

namespace tandem::test {
namespace {

class PeerMasks : public PeerGradients {};

// 103749, 103963, 55056: a boolean mask and the float mask of 0 and -inf that says the same, with
// rows that see nothing.
TEST_P(PeerMasks, Issue103749BooleanAndFloatMasksAgree) {
  CaseSpec spec = PeerCase(70, 100, 32);
  TermSpec dense = Dense(4);
  dense.density = 0.03;
  spec.terms = {dense};
  std::vector<double> by_mask, by_bias;
  const auto collect = [](BackwardCase& c, std::vector<double>& values) {
    for (const Tensor* tensor : {&c.dq(), &c.dk(), &c.dv()}) {
      ExpectFinite(*tensor);
      tensor->ForEach(
          [&](std::span<const int64_t> index) { values.push_back(tensor->Get(index)); });
    }
  };
  ForEachType(spec, {}, [&](BackwardCase& c) { collect(c, by_mask); });
  CaseSpec with_bias = spec;
  with_bias.terms = {};
  with_bias.bias.dtype = TANDEM_DTYPE_F32;
  ForEachType(
      with_bias,
      [&](BackwardCase& c) {
        Case masked(spec);
        Tensor& bias = *c.forward().bias();
        bias.ForEach([&](std::span<const int64_t> index) {
          bias.Set(index,
                   masked.TermsAllow(index[0], index[1], index[2], index[3]) ? 0.0 : -INFINITY);
        });
      },
      [&](BackwardCase& c) { collect(c, by_bias); });
  if (by_bias.empty()) GTEST_SKIP() << "it declines a bias";
  ASSERT_EQ(by_mask.size(), by_bias.size());
  for (size_t n = 0; n < by_mask.size(); ++n) {
    ASSERT_EQ(by_mask[n] == 0.0, by_bias[n] == 0.0) << "element " << n;
  }
}

// 101967: what is masked must not matter, whatever it is.
TEST_P(PeerMasks, Issue101967MaskedNanReachesNoGradient) {
  CaseSpec spec = PeerCase(70, 130, 32);
  spec.terms = {Dense(2)};
  ForEachType(
      spec,
      [](BackwardCase& c) {
        const tandem_tensor& mask =
            *reinterpret_cast<const tandem_dense_term*>(c.forward().problem().mask_terms[0])->mask;
        for (int64_t j = 0; j < 130; j += 3) {
          for (int64_t i = 0; i < 70; ++i) {
            static_cast<uint8_t*>(mask.data)[i * mask.strides[0] + j * mask.strides[1]] = 0;
          }
          for (int64_t h = 0; h < 2; ++h) {
            c.forward().k().Set({0, h, j, j % 32}, NAN);
            c.forward().v().Set({0, h, j, 31}, j % 2 == 0 ? NAN : -INFINITY);
          }
        }
      },
      [](BackwardCase& c) {
        ExpectAllFinite(c);
        for (int64_t j = 0; j < 130; j += 3) EXPECT_EQ(c.dv().Get({0, 1, j, 31}), 0.0);
      });
}

// cuDNN: a mask in f32 read as f16, and efficient_cuda takes none of another type than q.
TEST_P(PeerMasks, Issue191612BiasOfAnotherTypeThanQueries) {
  for (const tandem_dtype bias : {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16}) {
    CaseSpec spec = PeerCase(66, 129, 64);
    spec.bias.dtype = bias;
    spec.bias.hidden = 0.2;
    ForEachType(spec, {}, ExpectAllFinite);
  }
}

// 192138, 191984: the one key head of many, the end of causal rows, the offset of dropout.
TEST_P(PeerMasks, Issue192138SharedHeadCausalBoundAndDropoutOffset) {
  for (const tandem_alignment alignment : {TANDEM_ALIGN_TOP_LEFT, TANDEM_ALIGN_BOTTOM_RIGHT}) {
    CaseSpec spec = PeerCase(65, 127, 16);
    spec.batch = 2;
    spec.q_heads = 5;
    spec.kv_heads = 1;
    spec.terms = {Causal(alignment)};
    spec.dropout_rate = 0.22f;
    ForEachType(
        spec, [](BackwardCase& c) { c.forward().problem().dropout_offset = 0xfffffffdu; },
        ExpectAllFinite);
  }
}

// 101531, 187801 and 108108: causal beside another mask, on either alignment, with more keys than
// queries and fewer.
TEST_P(PeerMasks, Issue101531CausalWithAnotherMask) {
  for (const tandem_alignment alignment : {TANDEM_ALIGN_TOP_LEFT, TANDEM_ALIGN_BOTTOM_RIGHT}) {
    for (const int64_t keys : {40, 150}) {
      CaseSpec spec = PeerCase(90, keys, 16);
      spec.terms = {Causal(alignment), Dense(4)};
      ForEachType(spec, {}, ExpectAllFinite);
    }
  }
}

// 154363, 181528: a mask and heads in groups. FlexAttention's 133321, 164931: a group and dims that
// are no powers of 2.
TEST_P(PeerMasks, Issue154363GroupsWithAMask) {
  for (const int64_t group : {3, 8}) {
    CaseSpec spec = PeerCase(70, 140, 56);
    spec.v_dim = 24;
    spec.batch = 2;
    spec.q_heads = 2 * group;
    TermSpec dense = Dense(4);
    dense.per_head = false;
    spec.terms = {dense};
    ForEachType(spec, {}, ExpectAllFinite);
  }
}

// 183484: data that is aligned to its element alone.
TEST_P(PeerMasks, Issue183484DataAlignedToItsElements) {
  CaseSpec spec = PeerCase(70, 130, 64);
  spec.placement = Placement::kMisaligned;
  spec.terms = {Dense(4)};
  spec.bias.dtype = TANDEM_DTYPE_F16;
  ForEachType(spec, {}, ExpectAllFinite);
}

// 170839, flash-attention 352: packed sequences with a mask of their own each.
TEST_P(PeerMasks, Issue170839PackedWithAMask) {
  for (const bool offsets : {false, true}) {
    CaseSpec spec = PeerCase(0, 0, 32);
    spec.layout = TANDEM_LAYOUT_THD;
    spec.batch = 4;
    spec.q_lens = {70, 0, 33, 5};
    spec.kv_lens = {90, 12, 65, 0};
    spec.packed_tail = 3;
    TermSpec dense = Dense(offsets ? 1 : 4, TANDEM_DTYPE_BIT);
    dense.offsets = offsets;
    spec.terms = {dense, Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
    ForEachType(spec, {}, ExpectAllFinite);
  }
}

// 125674: the gradient goes through the tanh.
TEST_P(PeerMasks, Issue125674Softcap) {
  CaseSpec spec = PeerCase(70, 130, 64);
  spec.softcap = 3.0f;
  spec.magnitude = 3.0;
  spec.terms = {Causal(TANDEM_ALIGN_BOTTOM_RIGHT)};
  ForEachType(spec, {}, ExpectAllFinite);
}

// 156487, transformers 38690: causal with padding on the left, so that the first rows see nothing.
TEST_P(PeerMasks, Issue156487CausalWithLeftPadding) {
  CaseSpec spec = PeerCase(100, 100, 32);
  spec.batch = 2;
  TermSpec dense = Dense(4);
  dense.per_head = dense.per_row = false;
  spec.terms = {dense, Causal(TANDEM_ALIGN_TOP_LEFT)};
  ForEachType(
      spec,
      [](BackwardCase& c) {
        const tandem_tensor& mask =
            *reinterpret_cast<const tandem_dense_term*>(c.forward().problem().mask_terms[0])->mask;
        for (int64_t b = 0; b < 2; ++b) {
          for (int64_t j = 0; j < 100; ++j) {
            static_cast<uint8_t*>(mask.data)[b * mask.strides[0] + j * mask.strides[3]] =
                j >= 67 * b + 3;
          }
        }
      },
      [](BackwardCase& c) {
        ExpectAllFinite(c);
        for (int64_t i = 0; i < 70; ++i) {
          const double dq = c.dq().Get({1, 1, i, 5}), dk = c.dk().Get({1, 0, i, 5});
          EXPECT_TRUE(dq == 0.0 && !std::signbit(dq) && dk == 0.0 && !std::signbit(dk)) << i;
        }
      });
}

INSTANTIATE_TEST_SUITE_P(Kernels, PeerMasks, ::testing::ValuesIn(BackwardKernels()),
                         [](const auto& info) { return TestName(info.param.name); });

}  // namespace
}  // namespace tandem::test
