// VisibleWord, ClassifyTile, VisibleKeyHull and VisibleKeys against the plain definition, pair by
// pair, for every term alone and for random conjunctions, in rectangular, packed and sharded
// problems.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/mask_tiles.h"
#include "oracle/visibility.h"
#include "tests/core/prepared_problem.h"
#include "tests/support/case.h"

namespace tandem::test {
namespace {

using core::TileClass;

TEST(IntervalWordSmall, IsTheIntervalForAllEnds) {
  for (int64_t begin = -70; begin <= 140; ++begin) {
    for (int64_t end = -70; end <= 140; ++end) {
      uint64_t expected = 0;
      for (int64_t t = 0; t < 64; ++t) {
        if (begin <= t && t < end) expected |= uint64_t{1} << t;
      }
      ASSERT_EQ(core::IntervalWord(begin, end), expected) << begin << " " << end;
    }
  }
  EXPECT_EQ(core::IntervalWord(-core::kUnbounded, core::kUnbounded), ~uint64_t{0});
}

// The truth of one head, by the definition.
class Truth {
 public:
  Truth(const Case& source, int64_t b, int64_t head)
      : rows_(source.sequence(b).q_rows), keys_(source.sequence(b).kv_rows), bits_(rows_ * keys_) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < keys_; ++j) bits_[i * keys_ + j] = source.TermsAllow(b, head, i, j);
    }
  }
  int64_t rows() const { return rows_; }
  int64_t keys() const { return keys_; }
  bool At(int64_t i, int64_t j) const { return i < rows_ && j < keys_ && bits_[i * keys_ + j]; }
  // Of a rectangle; what lies beyond the rows and keys is invisible.
  TileClass Class(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    bool any = false, all = true;
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j1; ++j) {
        any = any || At(i, j);
        all = all && At(i, j);
      }
    }
    return !any ? TileClass::kEmpty : (all ? TileClass::kFull : TileClass::kPartial);
  }

 private:
  int64_t rows_, keys_;
  std::vector<bool> bits_;
};

std::string WhereIs(int64_t b, int64_t h, int64_t i, int64_t j) {
  return "b " + std::to_string(b) + " h " + std::to_string(h) + " i " + std::to_string(i) + " j " +
         std::to_string(j);
}

void CheckWords(const Case& source, const core::Problem& p, const core::Sequence& s, int64_t b,
                int64_t h, const Truth& truth) {
  for (int64_t i = 0; i < truth.rows(); ++i) {
    // Also at places that are no multiple of 64.
    for (int64_t j0 = 0; j0 < truth.keys(); j0 += 37) {
      const uint64_t word = core::VisibleWord(p.mask, s, h, i, j0);
      for (int64_t t = 0; t < 64; ++t) {
        ASSERT_EQ((word >> t) & 1u, truth.At(i, j0 + t)) << WhereIs(b, h, i, j0 + t);
      }
    }
  }
  Random random(static_cast<uint64_t>(b * 100 + h));
  for (int n = 0; n < 60 && truth.rows() * truth.keys() > 0; ++n) {
    const int64_t i = random.Below(truth.rows()), j = random.Below(truth.keys());
    ASSERT_EQ(oracle::Visible(source.problem(), b, h, i, j), truth.At(i, j))
        << "the oracle and the test's own definition differ at " << WhereIs(b, h, i, j);
  }
}

void CheckTile(const core::Problem& p, const core::Sequence& s, int64_t h, const Truth& truth,
               int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool exact) {
  const TileClass got = core::ClassifyTile(p.mask, s, h, i0, i1, j0, j1);
  const TileClass expected = truth.Class(i0, i1, j0, j1);
  // A rectangle without rows or keys inside is EMPTY.
  if (got != TileClass::kPartial || exact) {
    ASSERT_EQ(static_cast<int>(got), static_cast<int>(expected))
        << "rows [" << i0 << ", " << i1 << ") keys [" << j0 << ", " << j1 << ") head " << h;
  }
}

void CheckTiles(const core::Problem& p, const core::Sequence& s, int64_t h, const Truth& truth,
                bool exact) {
  for (int64_t i0 = 0; i0 < truth.rows(); i0 += 64) {
    for (int64_t j0 = 0; j0 < truth.keys(); j0 += 64) {
      const int64_t i1 = std::min<int64_t>(i0 + 64, truth.rows());
      const int64_t j1 = std::min<int64_t>(j0 + 64, truth.keys());
      CheckTile(p, s, h, truth, i0, i1, j0, j1, exact);
      if (testing::Test::HasFatalFailure()) return;
      // Beyond the keys nothing is visible.
      CheckTile(p, s, h, truth, i0, i1, j0, j0 + 64, false);
    }
  }
  Random random(7);
  for (int n = 0; n < 20 && truth.rows() * truth.keys() > 0; ++n) {
    const int64_t i0 = random.Below(truth.rows()), j0 = random.Below(truth.keys());
    const int64_t i1 = std::min<int64_t>(i0 + 1 + random.Below(200), truth.rows());
    CheckTile(p, s, h, truth, i0, i1, j0, j0 + 1 + random.Below(200), false);
    if (testing::Test::HasFatalFailure()) return;
  }
}

void CheckHulls(const core::Problem& p, const core::Sequence& s, int64_t h, const Truth& truth) {
  for (int64_t i0 = 0; i0 < truth.rows(); i0 += 29) {
    const int64_t i1 = std::min<int64_t>(i0 + 29, truth.rows());
    const core::Interval hull = core::VisibleKeyHull(p.mask, s, h, i0, i1);
    ASSERT_LE(hull.begin, hull.end);
    ASSERT_GE(hull.begin, 0);
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = 0; j < truth.keys(); ++j) {
        if (truth.At(i, j)) {
          ASSERT_TRUE(hull.begin <= j && j < hull.end)
              << "row " << i << " key " << j << " hull " << hull.begin << " " << hull.end;
        }
      }
    }
  }
}

// Where rows see intervals, those are what the terms but for the dense ones allow, and no end
// falls.
void CheckIntervals(const core::Problem& p, const core::Sequence& s, int64_t h,
                    const Truth& truth) {
  if (!core::SeesIntervals(p.mask)) return;
  core::Interval before = {0, 0};
  for (int64_t i = 0; i < truth.rows() && core::RowExists(s, i); ++i) {
    const core::Interval keys = core::VisibleKeys(p.mask, s, h, i);
    ASSERT_LE(keys.begin, keys.end);
    ASSERT_TRUE(keys.begin >= before.begin && keys.end >= before.end) << "row " << i;
    before = keys;
    for (int64_t j0 = 0; j0 < truth.keys(); j0 += 64) {
      ASSERT_EQ(core::StructuredWord(p.mask, s, h, i, j0),
                core::IntervalWord(keys.begin - j0, keys.end - j0))
          << WhereIs(s.batch, h, i, j0);
    }
  }
}

// exact: canonical tiles must get their true class, not only a safe one.
void CheckMask(const CaseSpec& spec, bool exact) {
  const Case source(spec);
  const PreparedProblem prepared(source);
  ASSERT_EQ(prepared.status(), TANDEM_STATUS_OK) << prepared.error();
  ASSERT_EQ(prepared.device_status(), 0);
  const core::Problem& p = prepared.problem();
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t status = 0;
    const core::Sequence s = core::ResolveSequence(p, b, &status);
    ASSERT_EQ(status, 0);
    ASSERT_EQ(s.q_rows, source.sequence(b).q_rows);
    ASSERT_EQ(s.q_len, source.sequence(b).q_len);
    ASSERT_EQ(s.kv_len, source.sequence(b).kv_len);
    for (int64_t h = 0; h < p.q_heads; ++h) {
      const Truth truth(source, b, h);
      for (int64_t i = 0; i < truth.rows(); ++i) {
        ASSERT_EQ(core::RowExists(s, i), source.RowExists(b, i));
      }
      CheckWords(source, p, s, b, h, truth);
      if (testing::Test::HasFatalFailure()) return;
      CheckTiles(p, s, h, truth, exact);
      if (testing::Test::HasFatalFailure()) return;
      CheckHulls(p, s, h, truth);
      if (testing::Test::HasFatalFailure()) return;
      CheckIntervals(p, s, h, truth);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

CaseSpec Base(int64_t q_rows, int64_t kv_rows) {
  CaseSpec spec;
  spec.batch = 2;
  spec.q_heads = 2;
  spec.q_rows = q_rows;
  spec.kv_rows = kv_rows;
  spec.qk_dim = spec.v_dim = 1;
  return spec;
}

// The same mask in rectangular problems, both ways round, and in the middle of a larger one.
std::vector<CaseSpec> Settings() {
  std::vector<CaseSpec> settings = {Base(150, 200), Base(200, 130), Base(64, 64), Base(1, 129)};
  CaseSpec shard = Base(100, 90);
  shard.q_offset = 37;
  shard.kv_offset = 101;
  shard.global_q_len = 180;
  shard.global_kv_len = 230;
  settings.push_back(shard);
  return settings;
}

struct SingleTerm {
  const char* name;
  TermSpec term;
  bool exact;
};
std::ostream& operator<<(std::ostream& stream, const SingleTerm& term) {
  return stream << term.name;
}

std::vector<SingleTerm> SingleTerms() {
  std::vector<SingleTerm> terms;
  for (const tandem_alignment alignment : {TANDEM_ALIGN_TOP_LEFT, TANDEM_ALIGN_BOTTOM_RIGHT}) {
    const bool top = alignment == TANDEM_ALIGN_TOP_LEFT;
    terms.push_back({top ? "causal_tl" : "causal_br", Causal(alignment), true});
    terms.push_back({top ? "window_tl" : "window_br", Band(alignment, 40, 10), true});
    terms.push_back({top ? "diagonal_tl" : "diagonal_br", Band(alignment, 0, 0), true});
    terms.push_back({top ? "wide_tl" : "wide_br", Band(alignment, 100, 90), true});
    terms.push_back({top ? "left_only_tl" : "left_only_br", Band(alignment, 70, -1), true});
    TermSpec prefix = Band(alignment, 20, 0);
    prefix.prefix = true;
    terms.push_back({top ? "prefix_tl" : "prefix_br", prefix, true});
    TermSpec heads = Band(alignment, 0, 0);
    heads.widths_per_head = true;
    terms.push_back({top ? "per_head_tl" : "per_head_br", heads, true});
    heads.per_head = false;
    heads.prefix = true;
    terms.push_back({top ? "per_batch_tl" : "per_batch_br", heads, true});
  }
  terms.push_back({"unbounded", Band(TANDEM_ALIGN_TOP_LEFT, -1, -1), true});
  terms.push_back({"lengths", Lengths(true, true), true});
  terms.push_back({"one_range", RowRanges(1), true});
  terms.push_back({"two_ranges", RowRanges(2), false});
  TermSpec broadcast = RowRanges(3);
  broadcast.per_row = broadcast.per_batch = broadcast.per_head = false;
  terms.push_back({"broadcast_ranges", broadcast, false});
  terms.push_back({"one_segment", Segments(1, true), false});
  terms.push_back({"sorted_segments", Segments(3, true), false});
  terms.push_back({"mixed_segments", Segments(3, false), false});
  for (const tandem_dtype dtype : {TANDEM_DTYPE_BOOL, TANDEM_DTYPE_BIT}) {
    const bool bits = dtype == TANDEM_DTYPE_BIT;
    terms.push_back({bits ? "bits2" : "bools2", Dense(2, dtype), false});
    terms.push_back({bits ? "bits3" : "bools3", Dense(3, dtype), false});
    terms.push_back({bits ? "bits4" : "bools4", Dense(4, dtype), false});
    TermSpec keys = Dense(4, dtype);
    keys.per_row = keys.per_head = false;
    terms.push_back({bits ? "key_padding_bits" : "key_padding_bools", keys, false});
  }
  terms.push_back({"blocks64", BlockSparse(64, 64), false});
  terms.push_back({"blocks_small", BlockSparse(7, 16), false});
  terms.push_back({"blocks_large", BlockSparse(128, 100), false});
  TermSpec full = BlockSparse(32, 32);
  full.full_lists = true;
  full.per_head = false;
  terms.push_back({"blocks_full_lists", full, false});
  return terms;
}

class MaskTermSmall : public ::testing::TestWithParam<SingleTerm> {};

TEST_P(MaskTermSmall, IsItsDefinition) {
  uint64_t seed = 1;
  for (CaseSpec spec : Settings()) {
    spec.terms = {GetParam().term};
    spec.seed = seed++;
    CheckMask(spec, GetParam().exact);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(MaskTermSmall, IsItsDefinitionInPackedSequences) {
  CaseSpec spec = Base(0, 0);
  spec.layout = TANDEM_LAYOUT_THD;
  spec.q_lens = {70, 0, 130, 5, 64};
  spec.kv_lens = {90, 3, 0, 200, 64};
  spec.packed_lead = 2;
  spec.packed_tail = 3;
  spec.terms = {GetParam().term};
  CheckMask(spec, false);
}

INSTANTIATE_TEST_SUITE_P(Terms, MaskTermSmall, ::testing::ValuesIn(SingleTerms()),
                         [](const auto& info) { return info.param.name; });

// Unaligned dense masks of one class are classified as such tile by tile.
TEST(MaskTermSmallDense, CanonicalTilesAreExactWithoutShard) {
  for (const double density : {0.0, 0.5, 1.0}) {
    CaseSpec spec = Base(150, 200);
    TermSpec dense = Dense(4);
    dense.density = density;
    spec.terms = {dense};
    CheckMask(spec, true);
  }
}

CaseSpec RandomMask(Random& random) {
  CaseSpec spec = Base(random.Range(1, 200), random.Range(1, 200));
  spec.seed = random.Next();
  if (random.Chance(0.3)) {
    spec.global_q_len = spec.q_rows + random.Below(100);
    spec.global_kv_len = spec.kv_rows + random.Below(100);
    spec.q_offset = random.Below(spec.global_q_len - spec.q_rows + 1);
    spec.kv_offset = random.Below(spec.global_kv_len - spec.kv_rows + 1);
  } else if (random.Chance(0.4)) {
    spec.layout = TANDEM_LAYOUT_THD;
    spec.cu_dtype = random.Pick({TANDEM_DTYPE_I32, TANDEM_DTYPE_I64});
    spec.packed_lead = random.Below(3);
    for (int n = 0; n < 3; ++n) {
      spec.q_lens.push_back(random.Chance(0.2) ? 0 : random.Below(150));
      spec.kv_lens.push_back(random.Chance(0.2) ? 0 : random.Below(150));
    }
  }
  // At most as many of a kind as a problem may have.
  int counts[8] = {};
  for (int64_t n = random.Range(1, 4); n > 0; --n) {
    const TermSpec term = RandomTerm(random);
    if (++counts[term.kind] <= 2) spec.terms.push_back(term);
  }
  if (random.Chance(0.4)) spec.terms.push_back(Lengths(random.Chance(0.5), true));
  return spec;
}

RC_GTEST_PROP(MaskProperty, ConjunctionIsEveryTerm, (uint64_t seed)) {
  Random random(seed);
  CheckMask(RandomMask(random), false);
  RC_ASSERT(!testing::Test::HasFatalFailure());
}

}  // namespace
}  // namespace tandem::test
