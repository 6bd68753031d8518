// Pairs for which a product and an exponential are not all: every term of a score, elements that
// tensor cores cannot serve, dropout, and sums of dS. A call with the pairs of a lane in local
// memory, so that the kernels that make it keep their registers for the usual case.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_
#define TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_

#include "backend_cuda/backward_params.h"
#include "backend_cuda/warp_attention.cuh"
#include "core/gradient.h"

namespace tandem::cuda {

// min that keeps NaN.
__device__ __forceinline__ float MinKeepNan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// P of a pair whose score is a product by an ordinary scale.
template <DType kDType>
__device__ __forceinline__ float PlainProbability(float product, float unit, float lse) {
  const float x = MinKeepNan(fmaf(product, unit, -lse), 0.0f);
  return kDType == DType::kF32 ? expf(x) : Exp2Approximate(x);
}

// A tile of pairs as a warp holds it (warp_attention.cuh): 16 * row_tiles rows of the side that is
// kept, 8 * step_tiles of the other.
struct PairTile {
  const BackwardParams* params;
  const Sequence* sequence;
  int64_t head;
  int64_t first_query;  // local, of the tile
  int64_t first_key;
  const uint64_t* words;  // of the tile's queries: visible keys; null: all
  int words_per_query;
  int warp_row;  // the warp's first row in the tile, on the side that is kept
  int row_tiles;
  int step_tiles;
  bool keeps_keys;
  bool wants_bias;  // dS with respect to the bias
};

__device__ __forceinline__ bool HasFlag(const uint64_t* words, int64_t index, int64_t row) {
  return ((words[index] >> (row % core::kTile)) & 1u) != 0;
}

// The product of two rows, from the tensors, in plain f32.
static __device__ __noinline__ float ProductOfRows(const Array4* a, int64_t a_offset,
                                                   const Array4* b, int64_t b_offset, int64_t dim) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    sum = fmaf(LoadElement(a->data, a->dtype, a_offset + d * a->column_stride),
               LoadElement(b->data, b->dtype, b_offset + d * b->column_stride), sum);
  }
  return sum;
}

struct PairSums {
  float gradient;           // of dS
  float distance_weighted;  // of dS times ALiBi's distance
};

// From the products <q, k> and <dO, v> of one pair to the factors of dO in dV and of q and k in dK
// and dQ.
template <DType kDType>
static __device__ __noinline__ float2 EvaluatePair(const PairTile& tile, int64_t row, int64_t key,
                                                   float product, float dp, PairSums* sums) {
  const BackwardParams& params = *tile.params;
  const Problem& p = params.problem;
  const Sequence& s = *tile.sequence;
  const int64_t head = tile.head;
  const int64_t kv_head = head / p.group;
  const int64_t plane_row = QueryPlaneRow(params, s, head) + row;
  const float lse = params.lse[plane_row];
  const RowStatistics statistics = params.statistics[plane_row];
  const float2 nothing = make_float2(0.0f, 0.0f);
  if (core::GradientRowIsEmpty(lse)) return nothing;
  const int64_t i = s.q_offset + row;
  const int64_t j = s.kv_offset + key;
  float bias = 0.0f;
  if (p.bias.data != nullptr) {
    bias = LoadElement(p.bias.data, p.bias.dtype, core::BiasOffset(p.bias, s, head, i, j));
    if (bias == core::NegativeInfinity()) return nothing;
  }
  const int64_t query_word = QueryFlagWord(params, s, head, row);
  const int64_t key_word = KeyFlagWord(params, s, kv_head, key);
  const bool has_flagged_key = HasFlag(params.keys.first_flags, key_word, key);
  if constexpr (kDType == DType::kF32) {
    if (has_flagged_key || HasFlag(params.queries.first_flags, query_word, row)) {
      product = ProductOfRows(&p.q, core::QueryOffset(p.q, s, head, row), &p.k,
                              core::KeyOffset(p.k, s, kv_head, key), p.qk_dim);
    }
  } else if (has_flagged_key) {
    product = core::BitsToFloat(0x7fffffffu);
  }

  float probability = 0.0f;
  float slope = 1.0f;
  float distance = 0.0f;
  if (params.is_plain != 0 && (core::IsFinite(statistics.lse) || !core::IsFinite(lse))) {
    probability = PlainProbability<kDType>(product, params.unit, statistics.lse);
  } else {
    float score = product * p.scale;
    if (p.softcap > 0.0f) {
      score = p.softcap * tanhf(score / p.softcap);
      slope = core::SoftcapSlope(score, p.softcap);
    }
    score += bias;
    if (p.alibi_slopes != nullptr) {
      const int64_t offset = i + core::DiagonalOffset(p.alibi_alignment, s) - j;
      distance = static_cast<float>(offset < 0 ? -offset : offset);
      score -= core::AlibiSlope(p, s, head) * distance;
    }
    probability = core::ProbabilityFromLse(score, lse);
  }

  float weight = probability;
  bool is_kept = true;
  if (p.dropout.enabled != 0) {
    const uint4 drawn = DrawWords(p.dropout, s.batch * p.q_heads + head, i, j);
    const uint32_t low = (j & 1) != 0 ? drawn.y : drawn.x;
    const uint32_t high = (j & 1) != 0 ? drawn.w : drawn.z;
    is_kept = ((j & 2) != 0 ? high : low) >= p.dropout.threshold;
    weight = is_kept ? probability * p.dropout.keep_scale : 0.0f;
  }
  if (!is_kept) {
    dp = 0.0f;
  } else {
    const bool has_flagged_value = HasFlag(params.keys.second_flags, key_word, key);
    if constexpr (kDType == DType::kF32) {
      if (has_flagged_value || HasFlag(params.queries.second_flags, query_word, row)) {
        dp = ProductOfRows(&p.dout, core::QueryOffset(p.dout, s, head, row), &p.v,
                           core::KeyOffset(p.v, s, kv_head, key), p.v_dim);
      }
    } else if (has_flagged_value) {
      dp = core::BitsToFloat(0x7fffffffu);
    }
    if (p.dropout.enabled != 0) dp *= p.dropout.keep_scale;
  }
  const float ds = core::ScoreGradient(probability, dp, statistics.offset);
  sums->gradient += ds;
  sums->distance_weighted += ds * distance;
  return make_float2(weight, tile.wants_bias ? ds : ds * slope);
}

// All pairs of a lane, in the order of WarpAttention's scores. Products become factors in place.
// sums: of the lane's rows, two of a row tile.
template <DType kDType>
static __device__ __noinline__ void EvaluatePairs(const PairTile& tile, float* products, float* dp,
                                                  PairSums* sums) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t rows = tile.sequence->q_rows;
  for (int index = 0; index < tile.row_tiles * tile.step_tiles * 4; ++index) {
    const int e = index & 3;
    const int m = (index >> 2) / tile.step_tiles;
    const int n = (index >> 2) - m * tile.step_tiles;
    const int kept = tile.warp_row + 16 * m + 8 * (e >> 1) + (lane >> 2);
    const int other = 8 * n + 2 * (lane & 3) + (e & 1);
    const int query = tile.keeps_keys ? other : kept;
    const int key = tile.keeps_keys ? kept : other;
    bool is_visible = tile.first_query + query < rows;
    if (tile.words != nullptr) {
      const uint64_t word = tile.words[query * tile.words_per_query + key / core::kTile];
      is_visible = is_visible && ((word >> (key % core::kTile)) & 1u) != 0;
    }
    float2 factors = make_float2(0.0f, 0.0f);
    if (is_visible) {
      factors = EvaluatePair<kDType>(tile, tile.first_query + query, tile.first_key + key,
                                     products[index], dp[index], &sums[2 * m + (e >> 1)]);
    }
    products[index] = factors.x;
    dp[index] = factors.y;
  }
}

// The same for scores in registers.
template <DType kDType, int kRowTiles, int kStepTiles>
__device__ __forceinline__ void EvaluateInMemory(const PairTile& tile,
                                                 float (&products)[kRowTiles][kStepTiles][4],
                                                 float (&dp)[kRowTiles][kStepTiles][4],
                                                 PairSums* sums) {
  constexpr int kCount = kRowTiles * kStepTiles * 4;
  float memory[2][kCount];
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    memory[0][index] = products[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4];
    memory[1][index] = dp[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4];
  }
  EvaluatePairs<kDType>(tile, memory[0], memory[1], sums);
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    products[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4] = memory[0][index];
    dp[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4] = memory[1][index];
  }
}

// The word of visible keys of a row from local key `first_key` on; 0 for rows that are not there.
__device__ __forceinline__ uint64_t VisibleKeys(const Problem& p, const Sequence& s, int64_t head,
                                                int64_t row, int64_t first_key) {
  if (row >= s.q_rows || first_key >= core::LocalKeys(s)) return 0;
  return WordOfAllTerms(p.mask, s, head, row, first_key);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_
