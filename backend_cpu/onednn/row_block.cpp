#include "backend_cpu/onednn/row_block.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/element.h"
#include "core/mask_tiles.h"
#include "core/philox.h"
#include "core/softmax.h"

namespace tandem::cpu::onednn {
namespace {

using core::Min;
using core::Problem;
using core::RoundUp;
using core::Sequence;

constexpr int64_t kWordsPerChunk = kMaxKeys / kKeyStep;

int FirstBit(uint64_t word) { return __builtin_ctzll(word); }

// Scales kKeyStep scores; the maximum of them and m, in interleaved parts that need not wait for
// each other.
float ScaleAll(float* scores, float scale, float m) {
  float parts[8];
  for (float& part : parts) part = m;
  for (int t = 0; t < kKeyStep; ++t) {
    scores[t] *= scale;
    parts[t % 8] = core::MaxKeepNan(parts[t % 8], scores[t]);
  }
  for (const float part : parts) m = core::MaxKeepNan(m, part);
  return m;
}

// Replaces kKeyStep scores by exp(s - reference); their sum.
double ExponentiateAll(float* scores, float reference) {
  for (int t = 0; t < kKeyStep; ++t) scores[t] = std::exp(scores[t] - reference);
  double sums[4] = {};
  for (int t = 0; t < kKeyStep; ++t) sums[t % 4] += double{scores[t]};
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

BlockSizes SizesOfBlock(const Problem& problem, int64_t keys) {
  const int64_t padded_keys = RoundUp(keys, kKeyStep);
  BlockSizes sizes;
  sizes.scores = RoundUp(RowsPerBlock(keys) * padded_keys, int64_t{16});
  sizes.q = RoundUp(kMaxRows * problem.qk_dim, int64_t{16});
  sizes.out = RoundUp(kMaxRows * problem.v_dim, int64_t{16});
  sizes.words = RoundUp(RowsPerBlock(keys) * (padded_keys / kKeyStep), int64_t{8});
  return sizes;
}

RowBlock::RowBlock(const Problem& problem, const Sequence& sequence, int64_t head,
                   const DenseKeys& keys, const Products& products, void* scratch)
    : p_(problem),
      s_(sequence),
      head_(head),
      keys_(keys),
      products_(products),
      key_count_(core::LocalKeys(sequence)),
      word_count_(core::CeilDiv(key_count_, kKeyStep)) {
  const BlockSizes sizes = SizesOfBlock(problem, key_count_);
  scores_ = static_cast<float*>(scratch);
  q_ = scores_ + sizes.scores;
  out_ = q_ + sizes.q;
  words_ = reinterpret_cast<uint64_t*>(out_ + sizes.out);
  product_scratch_ = words_ + sizes.words;
}

int64_t RowBlock::ChunkKeys(int64_t chunk) const {
  return Min(kMaxKeys, word_count_ * kKeyStep - chunk * kMaxKeys);
}

float* RowBlock::ChunkScores(int64_t chunk, int64_t row) const {
  return scores_ + chunk * kMaxKeys * padded_rows_ + row * ChunkKeys(chunk);
}

void RowBlock::LoadQueries() {
  for (int64_t row = 0; row < count_; ++row) {
    const int64_t offset = core::QueryOffset(p_.q, s_, head_, begin_ + row);
    for (int64_t c = 0; c < p_.qk_dim; ++c) {
      q_[row * p_.qk_dim + c] =
          core::LoadFloat(p_.q.data, p_.dtype, offset + c * p_.q.column_stride);
    }
  }
  std::memset(q_ + count_ * p_.qk_dim, 0,
              static_cast<size_t>((padded_rows_ - count_) * p_.qk_dim) * sizeof(float));
}

// Makes scores of dot products and finds the row's maximum. A bias of -inf hides its pair.
void RowBlock::FinishScores(int64_t row, float* m) {
  const int64_t i = s_.q_offset + begin_ + row;
  const float slope = p_.alibi_slopes != nullptr ? core::AlibiSlope(p_, s_, head_) : 0.0f;
  const bool is_plain = p_.softcap <= 0.0f && p_.bias.data == nullptr && p_.alibi_slopes == nullptr;
  const int64_t d =
      p_.alibi_slopes != nullptr ? i + core::DiagonalOffset(p_.alibi_alignment, s_) : 0;
  for (int64_t w = chunk_begin_ * kWordsPerChunk; w < Min(chunk_end_ * kWordsPerChunk, word_count_);
       ++w) {
    uint64_t* word = Words(row) + w;
    float* scores = ChunkScores(w / kWordsPerChunk, row) + w % kWordsPerChunk * kKeyStep;
    if (is_plain && *word == ~uint64_t{0}) {
      *m = ScaleAll(scores, p_.scale, *m);
      continue;
    }
    for (uint64_t rest = *word; rest != 0; rest &= rest - 1) {
      const int t = FirstBit(rest);
      const int64_t j = s_.kv_offset + w * kKeyStep + t;
      float score = p_.scale * scores[t];
      if (p_.softcap > 0.0f) score = p_.softcap * std::tanh(score / p_.softcap);
      if (p_.bias.data != nullptr) {
        const float bias = core::LoadFloat(p_.bias.data, p_.bias.dtype,
                                           core::BiasOffset(p_.bias, s_, head_, i, j));
        if (bias == core::NegativeInfinity()) {
          *word &= ~(uint64_t{1} << t);
          continue;
        }
        score += bias;
      }
      if (p_.alibi_slopes != nullptr) score -= slope * static_cast<float>(std::llabs(d - j));
      scores[t] = score;
      *m = core::MaxKeepNan(*m, score);
    }
  }
}

// Replaces the row's scores by weights: exp(s - m) where visible, times the dropout's factor; 0 for
// every other key of its chunks. Returns the sum of the undropped ones.
double RowBlock::Weigh(int64_t row, float m) {
  const int64_t i = s_.q_offset + begin_ + row;
  const int64_t head_index = s_.batch * p_.q_heads + head_;
  const float reference = core::SoftmaxReference(m);
  double sum = 0.0;
  for (int64_t w = chunk_begin_ * kWordsPerChunk; w < Min(chunk_end_ * kWordsPerChunk, word_count_);
       ++w) {
    uint64_t* word = Words(row) + w;
    float* scores = ChunkScores(w / kWordsPerChunk, row) + w % kWordsPerChunk * kKeyStep;
    // exp(-inf - m) is exactly 0, unless the row is NaN altogether.
    for (uint64_t hidden = ~*word; hidden != 0; hidden &= hidden - 1) {
      scores[FirstBit(hidden)] = core::NegativeInfinity();
    }
    sum += ExponentiateAll(scores, reference);
    if (!p_.dropout.enabled) continue;
    for (uint64_t rest = *word; rest != 0; rest &= rest - 1) {
      const int t = FirstBit(rest);
      if (core::DropoutKeeps(p_.dropout, head_index, i, s_.kv_offset + w * kKeyStep + t)) {
        scores[t] *= p_.dropout.keep_scale;
      } else {
        scores[t] = 0.0f;
        *word &= ~(uint64_t{1} << t);
      }
    }
  }
  return sum;
}

// The values that the product saw as 0, for the pairs that have a weight.
void RowBlock::AddNonFiniteValues(int64_t row) {
  float* out = out_ + row * p_.v_dim;
  for (int64_t w = chunk_begin_ * kWordsPerChunk; w < Min(chunk_end_ * kWordsPerChunk, word_count_);
       ++w) {
    if (!keys_.non_finite[w]) continue;
    const float* weights = ChunkScores(w / kWordsPerChunk, row) + w % kWordsPerChunk * kKeyStep;
    for (uint64_t rest = Words(row)[w]; rest != 0; rest &= rest - 1) {
      const int t = FirstBit(rest);
      const int64_t offset = core::KeyRowOffset(p_, p_.v, s_, head_ / p_.group, w * kKeyStep + t);
      for (int64_t c = 0; c < p_.v_dim; ++c) {
        const float v = core::LoadFloat(p_.v.data, p_.dtype, offset + c * p_.v.column_stride);
        if (!core::IsFinite(v)) out[c] += weights[t] * v;
      }
    }
  }
}

void RowBlock::StoreRow(int64_t row, float m, float l) {
  float sink_rescale = 1.0f;
  if (p_.sink != nullptr) {
    core::SoftmaxAddSink(p_.sink[head_ * p_.sink_stride], &m, &l, &sink_rescale);
  }
  const float inverse = core::SoftmaxInverse(l);
  const float* out = out_ + row * p_.v_dim;
  const int64_t offset = core::QueryOffset(p_.out, s_, head_, begin_ + row);
  for (int64_t c = 0; c < p_.v_dim; ++c) {
    const float value = l == 0.0f ? 0.0f : out[c] * sink_rescale * inverse;
    core::StoreFloat(p_.out.data, p_.out.dtype, offset + c * p_.out.column_stride, value);
  }
  if (p_.lse.data != nullptr) {
    core::StoreFloat(p_.lse.data, core::DType::kF32,
                     core::QueryOffset(p_.lse, s_, head_, begin_ + row), core::SoftmaxLse(m, l));
  }
}

void RowBlock::Compute(dnnl::stream* stream, int64_t begin, int64_t count) {
  begin_ = begin;
  count_ = count;
  padded_rows_ = RoundUp(count, kRowStep);
  const core::Interval hull = core::VisibleKeyHull(p_.mask, s_, head_, begin, begin + count);
  chunk_begin_ = hull.begin / kMaxKeys;
  chunk_end_ = core::CeilDiv(hull.end, kMaxKeys);
  LoadQueries();
  std::memset(out_, 0, static_cast<size_t>(padded_rows_ * p_.v_dim) * sizeof(float));

  for (int64_t chunk = chunk_begin_; chunk < chunk_end_; ++chunk) {
    const int64_t first_key = chunk * kMaxKeys;
    const int64_t end_key = Min(first_key + kMaxKeys, key_count_);
    const core::TileClass tile =
        core::ClassifyTile(p_.mask, s_, head_, begin, begin + count, first_key, end_key);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t j = first_key; j < end_key; j += kKeyStep) {
        uint64_t word = 0;
        if (tile == core::TileClass::kFull) word = core::IntervalWord(0, end_key - j);
        if (tile == core::TileClass::kPartial) {
          word = core::VisibleWord(p_.mask, s_, head_, begin + row, j);
        }
        Words(row)[j / kKeyStep] = word;
      }
    }
    if (tile == core::TileClass::kEmpty) continue;
    products_.scores(padded_rows_, ChunkKeys(chunk))
        .Run(products_.engine(), stream, q_, keys_.k + first_key * p_.qk_dim, ChunkScores(chunk, 0),
             product_scratch_);
  }

  float m[kMaxRows];
  float l[kMaxRows];
  for (int64_t row = 0; row < count; ++row) {
    m[row] = core::NegativeInfinity();
    FinishScores(row, &m[row]);
    l[row] = static_cast<float>(Weigh(row, m[row]));
  }

  for (int64_t chunk = chunk_begin_; chunk < chunk_end_; ++chunk) {
    bool any = false;
    for (int64_t row = 0; row < count && !any; ++row) {
      for (int64_t w = 0; w < ChunkKeys(chunk) / kKeyStep; ++w) {
        any = any || Words(row)[chunk * kWordsPerChunk + w] != 0;
      }
    }
    if (!any) continue;
    for (int64_t row = count; row < padded_rows_; ++row) {
      std::memset(ChunkScores(chunk, row), 0,
                  static_cast<size_t>(ChunkKeys(chunk)) * sizeof(float));
    }
    products_.output(padded_rows_, ChunkKeys(chunk))
        .Run(products_.engine(), stream, ChunkScores(chunk, 0),
             keys_.v + chunk * kMaxKeys * p_.v_dim, out_, product_scratch_);
  }
  for (int64_t row = 0; row < count; ++row) {
    AddNonFiniteValues(row);
    StoreRow(row, m[row], l[row]);
  }
}

}  // namespace tandem::cpu::onednn
