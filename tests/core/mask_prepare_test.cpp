// Preparation: what the CPU backend's own loop makes equals the plain loop bit for bit, and a mask
// per sequence at offsets is read as defined.
#include "core/mask_prepare.h"

#include <gtest/gtest.h>

#include <cstring>

#include "backend_cpu/cpu_backend.h"
#include "tests/core/prepared_problem.h"

namespace tandem::test {
namespace {

std::vector<CaseSpec> Cases() {
  std::vector<CaseSpec> cases;
  uint64_t seed = 1;
  for (const tandem_dtype dtype : {TANDEM_DTYPE_BOOL, TANDEM_DTYPE_BIT}) {
    for (const int rank : {2, 3, 4}) {
      for (const int64_t keys : {1, 63, 64, 65, 300}) {
        CaseSpec spec;
        spec.batch = 2;
        spec.q_heads = 3;
        spec.q_rows = 130;
        spec.kv_rows = keys;
        spec.qk_dim = spec.v_dim = 1;
        TermSpec dense = Dense(rank, dtype);
        dense.per_row = keys != 65;
        dense.per_batch = keys != 63;
        if (dtype == TANDEM_DTYPE_BOOL && keys == 300) {
          dense.strides.order =
              rank == 4 ? std::vector<int>{3, 1, 2, 0}
                        : (rank == 3 ? std::vector<int>{2, 0, 1} : std::vector<int>{1, 0});
          dense.strides.negative = 1u << (rank - 1);
        }
        spec.terms = {dense, BlockSparse(17, 33)};
        spec.seed = seed++;
        cases.push_back(spec);
      }
    }
  }
  return cases;
}

TEST(MaskPrepareSmall, LayoutIsAlignedAndDisjoint) {
  for (const CaseSpec& spec : Cases()) {
    const Case source(spec);
    const PreparedProblem prepared(source);
    ASSERT_EQ(prepared.status(), TANDEM_STATUS_OK) << prepared.error();
    const core::PreparationLayout& layout = prepared.layout();
    EXPECT_EQ(layout.size % core::kBufferAlignment, 0);
    EXPECT_EQ(layout.dense_words_offset % core::kBufferAlignment, 0);
    EXPECT_LE(layout.dense_words_offset + 8 * layout.dense_word_count, layout.dense_classes_offset);
    EXPECT_LE(layout.dense_classes_offset + layout.dense_class_count, layout.block_bits_offset[0]);
    EXPECT_LE(layout.block_bits_offset[0] + 4 * layout.block_word_count[0], layout.size);
  }
}

TEST(MaskPrepareSmall, CpuBackendMakesTheSameBits) {
  for (const CaseSpec& spec : Cases()) {
    const Case source(spec);
    const PreparedProblem prepared(source);
    ASSERT_EQ(prepared.status(), TANDEM_STATUS_OK) << prepared.error();
    core::Problem problem = prepared.problem();
    const core::PreparationLayout& layout = prepared.layout();
    const Memory memory(layout.size + core::kBufferAlignment, 1, Placement::kGuardBefore);
    std::memset(memory.data(), 0xdb, layout.size);
    core::BindPreparation(layout, memory.data(), &problem);
    core::Text error = {};
    core::Context context = {};
    context.error = &error;
    ASSERT_EQ(cpu::CpuBackend()->prepare_mask(problem, layout, memory.data(), context),
              TANDEM_STATUS_OK)
        << error.data;
    const auto same = [&](int64_t offset, int64_t size) {
      return std::memcmp(memory.data() + offset, prepared.buffer() + offset, size) == 0;
    };
    EXPECT_TRUE(same(layout.dense_words_offset, 8 * layout.dense_word_count));
    EXPECT_TRUE(same(layout.dense_classes_offset, layout.dense_class_count));
    EXPECT_TRUE(same(layout.block_bits_offset[0], 4 * layout.block_word_count[0]));
  }
}

TEST(MaskPrepareSmall, CudaLayoutHoldsTheSameBits) {
  for (const CaseSpec& spec : Cases()) {
    const Case source(spec);
    const PreparedProblem cpu(source);
    const PreparedProblem cuda(source, TANDEM_DEVICE_CUDA);
    ASSERT_EQ(cuda.status(), TANDEM_STATUS_OK) << cuda.error();
    for (int64_t b = 0; b < cpu.problem().batch; ++b) {
      int32_t status = 0;
      const core::Sequence s = core::ResolveSequence(cpu.problem(), b, &status);
      for (int64_t i = 0; i < s.q_rows; ++i) {
        for (int64_t j = 0; j < s.kv_rows; j += 37) {
          ASSERT_EQ(core::VisibleWord(cpu.problem().mask, s, 0, i, j),
                    core::VisibleWord(cuda.problem().mask, s, 0, i, j))
              << b << " " << i << " " << j;
        }
      }
    }
  }
}

// What lane c of a quad holds of an accumulator's row: columns 8 n + 2 c + e, 16 bits together.
TEST(MaskPrepareSmall, QuadOrderPutsALanesKeysTogether) {
  for (int key = 0; key < 64; ++key) {
    const int n = key / 8, c = key % 8 / 2, e = key % 2;
    const uint64_t word = core::ToQuadOrder(uint64_t{1} << key);
    EXPECT_EQ(word, uint64_t{1} << (16 * c + 2 * n + e)) << key;
    EXPECT_EQ(core::FromQuadOrder(word), uint64_t{1} << key) << key;
  }
}

TEST(MaskPrepareSmall, MaskPerSequenceAtOffsets) {
  for (const tandem_dtype dtype : {TANDEM_DTYPE_BOOL, TANDEM_DTYPE_BIT}) {
    CaseSpec spec;
    spec.layout = TANDEM_LAYOUT_THD;
    spec.q_heads = 2;
    spec.qk_dim = spec.v_dim = 1;
    spec.q_lens = {5, 0, 70, 64};
    spec.kv_lens = {130, 4, 1, 67};
    TermSpec dense = Dense(2, dtype);
    dense.offsets = true;
    spec.terms = {dense};
    const Case source(spec);
    const PreparedProblem prepared(source);
    ASSERT_EQ(prepared.status(), TANDEM_STATUS_OK) << prepared.error();
    ASSERT_EQ(prepared.device_status(), 0);
    for (int64_t b = 0; b < 4; ++b) {
      int32_t status = 0;
      const core::Sequence s = core::ResolveSequence(prepared.problem(), b, &status);
      for (int64_t i = 0; i < s.q_rows; ++i) {
        for (int64_t j = 0; j < s.kv_rows; ++j) {
          const uint64_t word = core::VisibleWord(prepared.problem().mask, s, 1, i, j);
          ASSERT_EQ(word & 1u, source.TermsAllow(b, 1, i, j)) << b << " " << i << " " << j;
        }
      }
    }
  }
}

// What a device must do with metadata that it cannot trust: clamp, and say so.
TEST(MaskPrepareSmall, UntrustedMetadataIsClamped) {
  CaseSpec spec;
  spec.layout = TANDEM_LAYOUT_THD;
  spec.qk_dim = spec.v_dim = 1;
  spec.q_lens = {10, 20};
  spec.kv_lens = {30, 40};
  const Case source(spec);
  const PreparedProblem prepared(source);
  ASSERT_EQ(prepared.status(), TANDEM_STATUS_OK) << prepared.error();
  core::Problem problem = prepared.problem();
  const int32_t hostile[][3] = {
      {0, 10, 2000000000}, {-5, 10, 30}, {20, 10, 30}, {0, INT32_MIN, INT32_MAX}, {31, 32, 33}};
  for (const auto& cu : hostile) {
    problem.cu_seqlens_q.data = cu;
    problem.cu_seqlens_q.stride = 1;
    int32_t status = 0;
    for (int64_t b = 0; b < 2; ++b) {
      const core::Sequence s = core::ResolveSequence(problem, b, &status);
      EXPECT_GE(s.q_start, 0);
      EXPECT_GE(s.q_rows, 0);
      EXPECT_LE(s.q_rows, problem.q_rows);
      EXPECT_LE(s.q_start + s.q_rows, problem.q_total);
    }
    EXPECT_EQ(status, TANDEM_DEVICE_STATUS_CU_SEQLENS);
  }
  const int32_t lengths[] = {-1, 21};
  core::Problem with_lengths = prepared.problem();
  with_lengths.q_lengths = {lengths, core::DType::kI32, 0, 1};
  int32_t status = 0;
  EXPECT_EQ(core::ResolveSequence(with_lengths, 0, &status).q_len, 0);
  EXPECT_EQ(core::ResolveSequence(with_lengths, 1, &status).q_len, 20);
  EXPECT_EQ(status, TANDEM_DEVICE_STATUS_LENGTHS);
}

}  // namespace
}  // namespace tandem::test
