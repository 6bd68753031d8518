#include "tests/support/case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace tandem::test {
namespace {

bool Has(const CaseSpec& spec, tandem_mask_kind kind) {
  return std::any_of(spec.terms.begin(), spec.terms.end(),
                     [&](const TermSpec& term) { return term.kind == kind; });
}

double Lowest(tandem_dtype dtype) {
  if (dtype == TANDEM_DTYPE_F16) return -65504.0;
  return dtype == TANDEM_DTYPE_BF16 ? -0x1.fep127
                                    : static_cast<double>(std::numeric_limits<float>::lowest());
}

}  // namespace

Case::Case(const CaseSpec& spec) : spec_(spec), packed_(spec.layout == TANDEM_LAYOUT_THD) {
  if (packed_) spec_.batch = static_cast<int64_t>(spec_.q_lens.size());
  extents_.placement = spec_.placement;
  MakeSequences();
  MakeTensors();
  MakeTerms();
  MakeBias();
  Random random(Seed(7));
  problem_.layout = spec_.layout;
  problem_.has_scale = spec_.scale.has_value();
  problem_.scale = spec_.scale.value_or(0.0f);
  problem_.softcap = spec_.softcap;
  problem_.dropout_rate = spec_.dropout_rate;
  problem_.dropout_seed = 0x1234567890abcdefull + spec_.seed;
  problem_.dropout_offset = 17;
  problem_.q_offset = spec_.q_offset;
  problem_.kv_offset = spec_.kv_offset;
  problem_.global_q_len = spec_.global_q_len;
  problem_.global_kv_len = spec_.global_kv_len;
  if (spec_.alibi_rank != 0) {
    alibi_.emplace(TANDEM_DTYPE_F32, spec_.alibi_rank == 1 ? Shape{spec_.q_heads}
                                                           : Shape{spec_.batch, spec_.q_heads});
    alibi_->ForEach([&](std::span<const int64_t> index) {
      alibi_->Set(index, random.Chance(0.1) ? 0.0 : std::exp2(-8.0 * random.Uniform()));
    });
    problem_.alibi_slopes = alibi_->get();
    problem_.alibi_alignment = spec_.alibi_alignment;
  }
  if (spec_.sink) {
    sink_.emplace(TANDEM_DTYPE_F32, Shape{spec_.q_heads});
    sink_->FillNormal(random, 2.0);
    problem_.sink = sink_->get();
  }
}

uint64_t Case::Seed(uint64_t part) const { return spec_.seed * 64 + part; }

void Case::MakeSequences() {
  Random random(Seed(0));
  const bool lengths = Has(spec_, TANDEM_MASK_LENGTHS);
  extents_.packed = packed_;
  extents_.batch = spec_.batch;
  extents_.q_heads = spec_.q_heads;
  sequences_.resize(spec_.batch);
  int64_t q_end = spec_.packed_lead, kv_end = spec_.packed_lead;
  extents_.cu_q = {q_end};
  extents_.cu_k = {kv_end};
  for (int64_t b = 0; b < spec_.batch; ++b) {
    SequenceRows& s = sequences_[b];
    if (packed_) {
      s.q_start = q_end;
      s.kv_start = kv_end;
      s.q_rows = spec_.q_lens[b];
      s.kv_rows = spec_.kv_lens[b];
      extents_.cu_q.push_back(q_end += s.q_rows);
      extents_.cu_k.push_back(kv_end += s.kv_rows);
      s.q_len = s.q_rows;
      s.kv_len = s.kv_rows;
    } else {
      s.q_rows = spec_.q_rows;
      s.kv_rows = spec_.kv_rows;
      s.q_len = spec_.global_q_len != 0 ? spec_.global_q_len : s.q_rows;
      s.kv_len = spec_.global_kv_len != 0 ? spec_.global_kv_len : s.kv_rows;
    }
    extents_.q_len = std::max(extents_.q_len, s.q_len);
    extents_.kv_len = std::max(extents_.kv_len, s.kv_len);
    if (lengths) {
      const bool given = !packed_ && !spec_.kv_lens.empty();
      for (const TermSpec& term : spec_.terms) {
        if (term.kind != TANDEM_MASK_LENGTHS) continue;
        if (term.q_lengths) {
          s.q_len = !packed_ && !spec_.q_lens.empty() ? spec_.q_lens[b] : random.Below(s.q_len + 1);
        }
        if (term.kv_lengths) {
          s.kv_len = given ? spec_.kv_lens[b] : (b == 1 ? 0 : random.Below(s.kv_len + 1));
        }
      }
    }
    extents_.q_lens.push_back(s.q_len);
    extents_.kv_lens.push_back(s.kv_len);
  }
  if (packed_) {
    spec_.q_rows = q_end + spec_.packed_tail;  // of the tensors
    spec_.kv_rows = kv_end + spec_.packed_tail;
    extents_.q_total = spec_.q_rows;
    extents_.kv_total = spec_.kv_rows;
  }
}

void Case::MakeTensors() {
  const auto shape = [&](int64_t heads, int64_t rows, int64_t dim) -> Shape {
    if (packed_) return {rows, heads, dim};
    if (spec_.layout == TANDEM_LAYOUT_BSHD) return {spec_.batch, rows, heads, dim};
    return {spec_.batch, heads, rows, dim};
  };
  const Placement place = spec_.placement;
  q_.emplace(spec_.dtype, shape(spec_.q_heads, spec_.q_rows, spec_.qk_dim), spec_.q_strides, place);
  k_.emplace(spec_.dtype, shape(spec_.kv_heads, spec_.kv_rows, spec_.qk_dim), spec_.k_strides,
             place);
  v_.emplace(spec_.dtype, shape(spec_.kv_heads, spec_.kv_rows, spec_.v_dim), spec_.v_strides,
             place);
  out_.emplace(spec_.out_f32 ? TANDEM_DTYPE_F32 : spec_.dtype,
               shape(spec_.q_heads, spec_.q_rows, spec_.v_dim), spec_.out_strides, place);
  uint64_t part = 1;
  for (Tensor* tensor : {&*q_, &*k_, &*v_}) {
    Random random(Seed(part++));
    tensor->FillNormal(random, spec_.magnitude);
  }
  problem_.q = q_->get();
  problem_.k = k_->get();
  problem_.v = v_->get();
  outputs_.out = out_->get();
  if (spec_.lse) {
    lse_.emplace(TANDEM_DTYPE_F32,
                 packed_ ? Shape{spec_.q_heads, spec_.q_rows}
                         : Shape{spec_.batch, spec_.q_heads, spec_.q_rows},
                 spec_.lse_strides, place);
    outputs_.lse = lse_->get();
  }
  PrefillOutputs();
}

void Case::MakeTerms() {
  if (packed_) terms_.push_back(MakePackedTerm(extents_, spec_.cu_dtype));
  for (const TermSpec& term : spec_.terms) {
    Random random(Seed(16 + terms_.size()));
    terms_.push_back(term.kind == TANDEM_MASK_LENGTHS
                         ? MakeLengthsTerm(extents_, term.q_lengths, term.kv_lengths)
                         : MakeTerm(term, extents_, random));
  }
  for (const auto& term : terms_) term_pointers_.push_back(term->get());
  problem_.mask_term_count = static_cast<int32_t>(term_pointers_.size());
  problem_.mask_terms = term_pointers_.data();
}

void Case::MakeBias() {
  Random random(Seed(4));
  const BiasSpec& spec = spec_.bias;
  if (spec.dtype == TANDEM_DTYPE_UNSET) return;
  const Shape full = {spec.per_batch ? spec_.batch : 1, spec.per_head ? spec_.q_heads : 1,
                      spec.per_row ? extents_.q_len : 1, spec.per_key ? extents_.kv_len : 1};
  const Shape shape = spec.rank == 4   ? full
                      : spec.rank == 3 ? Shape{full[0], full[2], full[3]}
                                       : Shape{full[2], full[3]};
  bias_.emplace(spec.dtype, shape, spec.strides, spec_.placement);
  const int64_t keys = shape.back();
  double row_value = 0.0;
  bool whole_row = false;
  bias_->ForEach([&](std::span<const int64_t> index) {
    if (index.back() % keys == 0) {
      whole_row = true;
      if (random.Chance(spec.hidden_rows)) {
        row_value = -INFINITY;
      } else if (random.Chance(spec.lowest_rows)) {
        row_value = Lowest(spec.dtype);
      } else {
        whole_row = false;
      }
    }
    bias_->Set(index, whole_row                    ? row_value
                      : random.Chance(spec.hidden) ? -INFINITY
                                                   : random.Normal());
  });
  problem_.bias = bias_->get();
}

bool Case::RowExists(int64_t b, int64_t i) const {
  return spec_.q_offset + i < sequences_[b].q_len;
}

Pair Case::PairOf(int64_t b, int64_t head, int64_t i, int64_t j) const {
  const SequenceRows& s = sequences_[b];
  return {b,       head,     spec_.q_offset + i, spec_.kv_offset + j,
          s.q_len, s.kv_len, s.q_start,          s.kv_start};
}

bool Case::TermsAllow(int64_t b, int64_t head, int64_t i, int64_t j) const {
  const Pair pair = PairOf(b, head, i, j);
  if (pair.i >= pair.q_len || pair.j >= pair.kv_len) return false;
  return std::all_of(terms_.begin(), terms_.end(),
                     [&](const std::unique_ptr<Term>& term) { return term->Allows(pair); });
}

bool Case::Visible(int64_t b, int64_t head, int64_t i, int64_t j) const {
  return TermsAllow(b, head, i, j) && (!bias_ || BiasAt(b, head, i, j) != -INFINITY);
}

Index Case::BiasIndex(int64_t b, int64_t head, int64_t i, int64_t j) const {
  const Shape& shape = bias_->shape();
  const auto at = [&](size_t d, int64_t n) { return shape[d] == 1 ? 0 : n; };
  const int64_t row = spec_.q_offset + i, key = spec_.kv_offset + j;
  if (shape.size() == 2) return {at(0, row), at(1, key)};
  if (shape.size() == 3) return {at(0, b), at(1, row), at(2, key)};
  return {at(0, b), at(1, head), at(2, row), at(3, key)};
}

float Case::BiasAt(int64_t b, int64_t head, int64_t i, int64_t j) const {
  return static_cast<float>(bias_->Get(BiasIndex(b, head, i, j)));
}

Index Case::RowIndex(int64_t b, int64_t head, int64_t start, int64_t row, int64_t column) const {
  if (packed_) return {start + row, head, column};
  if (spec_.layout == TANDEM_LAYOUT_BSHD) return {b, row, head, column};
  return {b, head, row, column};
}

Index Case::QueryIndex(int64_t b, int64_t head, int64_t row, int64_t column) const {
  return RowIndex(b, head, sequences_[b].q_start, row, column);
}

Index Case::KeyIndex(int64_t b, int64_t head, int64_t row, int64_t column) const {
  return RowIndex(b, head, sequences_[b].kv_start, row, column);
}

Index Case::LseIndex(int64_t b, int64_t head, int64_t row) const {
  if (packed_) return {head, sequences_[b].q_start + row};
  return {b, head, row};
}

void Case::PrefillOutputs(uint8_t byte) {
  out_->FillBytes(byte);
  if (lse_) lse_->FillBytes(byte);
}

std::vector<uint8_t> Case::OutputBytes() const {
  std::vector<uint8_t> bytes = out_->ElementBytes();
  if (lse_) {
    const std::vector<uint8_t> lse = lse_->ElementBytes();
    bytes.insert(bytes.end(), lse.begin(), lse.end());
  }
  return bytes;
}

}  // namespace tandem::test
