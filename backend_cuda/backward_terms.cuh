// Pairs for which a product by a scale and an exponential are not all: bias, ALiBi, softcap and
// dropout, in registers; and, as a call with a lane's pairs in local memory, elements that tensor
// cores cannot serve.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_
#define TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_

#include "backend_cuda/backward_params.h"
#include "backend_cuda/warp_attention.cuh"
#include "core/gradient.h"

namespace tandem::cuda {

// The word of visible keys of a row from local key `first_key` on; 0 for rows that are not there.
__device__ __forceinline__ uint64_t VisibleKeys(const Problem& p, const Sequence& s, int64_t head,
                                                int64_t row, int64_t first_key) {
  if (row >= s.q_rows || first_key >= core::LocalKeys(s)) return 0;
  return WordOfAllTerms(p.mask, s, head, row, first_key);
}

// The keys that dropout keeps, of the 32 from global key j on, for global row i.
static __device__ __noinline__ uint32_t KeptKeys(const core::Dropout& dropout, int64_t head_index,
                                                 int64_t i, int64_t j) {
  uint32_t kept = 0;
  const int first = -static_cast<int>(j & 3);
#pragma unroll 1
  for (int t = first; t < 32; t += 4) {
    const core::Philox4 drawn = core::DropoutWords(dropout, head_index, i, j + t);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (t + e < 0 || t + e >= 32) continue;
      kept |= static_cast<uint32_t>(drawn.word[e] >= dropout.threshold) << (t + e);
    }
  }
  return kept;
}

// ---- elements that the products cannot serve ----

// A tile of pairs as a warp holds it (warp_attention.cuh): 16 * row_tiles rows of the side that is
// kept, 8 * step_tiles of the other.
struct PairTile {
  const BackwardParams* params;
  const Sequence* sequence;
  int64_t head;
  int64_t first_query;  // local
  int64_t first_key;
  int row_tiles;
  int step_tiles;
  bool keeps_keys;
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

// The products <q, k> and <dO, v> of one pair of which a row or a key is flagged. In 16 bits rows
// of Q and dO show what they are by their statistics, and keys and values by NaN here.
template <DType kDType>
static __device__ __noinline__ void PatchPair(const PairTile& tile, int64_t row, int64_t key,
                                              float* product, float* dp) {
  const BackwardParams& params = *tile.params;
  const Problem& p = params.problem;
  const Sequence& s = *tile.sequence;
  const int64_t kv_head = tile.head / p.group;
  const int64_t query_word = QueryFlagWord(params, s, tile.head, row);
  const int64_t key_word = KeyFlagWord(params, s, kv_head, key);
  const bool has_query = HasFlag(params.queries.first_flags, query_word, row);
  const bool has_dout = HasFlag(params.queries.second_flags, query_word, row);
  const bool has_key = HasFlag(params.keys.first_flags, key_word, key);
  const bool has_value = HasFlag(params.keys.second_flags, key_word, key);
  if constexpr (kDType == DType::kF32) {
    if (has_query || has_key) {
      *product = ProductOfRows(&p.q, core::QueryOffset(p.q, s, tile.head, row), &p.k,
                               core::KeyOffset(p.k, s, kv_head, key), p.qk_dim);
    }
    if (has_dout || has_value) {
      *dp = ProductOfRows(&p.dout, core::QueryOffset(p.dout, s, tile.head, row), &p.v,
                          core::KeyOffset(p.v, s, kv_head, key), p.v_dim);
    }
  } else {
    if (has_key) *product = core::BitsToFloat(0x7fffffffu);
    if (has_value) *dp = core::BitsToFloat(0x7fffffffu);
    // An LSE too large for base 2 stands as 0: next to it only scores as large count, and P is 1.
    const float lse = params.lse[QueryPlaneRow(params, s, tile.head) + row];
    if (has_query && params.is_plain != 0 && core::IsFinite(lse) && !core::IsNan(*product)) {
      const bool is_below = *product * p.scale < lse;
      *product = core::BitsToFloat(is_below != (p.scale < 0.0f) ? 0xff800000u : 0x7f800000u);
    }
  }
}

// All pairs of a lane, in the order of WarpAttention's scores.
template <DType kDType>
static __device__ __noinline__ void PatchPairs(const PairTile& tile, float* products, float* dp) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t rows = tile.sequence->q_rows;
  const int64_t keys = core::LocalKeys(*tile.sequence);
  for (int index = 0; index < tile.row_tiles * tile.step_tiles * 4; ++index) {
    const int e = index & 3;
    const int m = (index >> 2) / tile.step_tiles;
    const int n = (index >> 2) - m * tile.step_tiles;
    const int kept = 16 * m + 8 * (e >> 1) + (lane >> 2);
    const int other = 8 * n + 2 * (lane & 3) + (e & 1);
    const int64_t row = tile.first_query + (tile.keeps_keys ? other : kept);
    const int64_t key = tile.first_key + (tile.keeps_keys ? kept : other);
    if (row < rows && key < keys) PatchPair<kDType>(tile, row, key, &products[index], &dp[index]);
  }
}

// Calls `call(products, dp)` on copies in memory of scores in registers, and takes them back.
template <int kRowTiles, int kStepTiles, typename Call>
__device__ __forceinline__ void InMemory(float (&products)[kRowTiles][kStepTiles][4],
                                         float (&dp)[kRowTiles][kStepTiles][4], Call call) {
  constexpr int kCount = kRowTiles * kStepTiles * 4;
  float memory[2][kCount];
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    memory[0][index] = products[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4];
    memory[1][index] = dp[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4];
  }
  call(memory[0], memory[1]);
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    products[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4] = memory[0][index];
    dp[index / 4 / kStepTiles][index / 4 % kStepTiles][index % 4] = memory[1][index];
  }
}

// ---- terms ----

// Softcap of scaled products; dP - D times its slope where that is wanted. A call, which spares its
// callers the code of many hyperbolic tangents.
static __device__ __noinline__ void CapScores(float scale, float softcap, bool has_slope, int count,
                                              float* products, float* dp) {
#pragma unroll 4
  for (int index = 0; index < count; ++index) {
    const float capped = softcap * tanhf(products[index] * scale / softcap);
    products[index] = capped;
    if (has_slope) dp[index] *= core::SoftcapSlope(capped, softcap);
  }
}

// Of a row that is kept.
struct PairSums {
  float gradient;           // of dS
  float distance_weighted;  // of dS times ALiBi's distance
};

// Bits of a lane's pairs, as WarpAttention's: bit 16 r + 2 n + e of word m.
template <int kRowTiles>
using PairBits = uint32_t[kRowTiles];

// A lane's pairs: rows kept_row + 16 m + 8 r of the side that is kept, other_row + 8 n + e of the
// other, both local.
template <DType kDType, bool kKeepsKeys, int kRowTiles, int kStepTiles>
class TermPairs {
 public:
  using Scores = float[kRowTiles][kStepTiles][4];
  using Bits = PairBits<kRowTiles>;

  __device__ TermPairs(const BackwardParams& params, const Sequence& s, int64_t head,
                       int64_t kept_row, int64_t other_row)
      : params_(params),
        problem_(params.problem),
        s_(s),
        head_(head),
        query_(s.q_offset + (kKeepsKeys ? other_row : kept_row)),
        key_(s.kv_offset + (kKeepsKeys ? kept_row : other_row)) {}

  // Products to P (with dropout's factor) and dS, or dS with respect to the products where
  // `has_slope`. statistics_of(m, n, e): of the pair's row.
  template <typename StatisticsOf>
  __device__ __forceinline__ void Evaluate(Bits& visible, const Bits& kept, bool has_slope,
                                           Scores& products, Scores& dp,
                                           PairSums (&sums)[2 * kRowTiles],
                                           StatisticsOf statistics_of) const {
    const bool has_dropout = problem_.dropout.enabled != 0;
    const float keep_scale = has_dropout ? problem_.dropout.keep_scale : 1.0f;
    ForEach([&](int m, int n, int e, uint32_t bit) {
      const bool is_kept = !has_dropout || (kept[m] & bit) != 0;
      dp[m][n][e] = (is_kept ? dp[m][n][e] * keep_scale : 0.0f) - statistics_of(m, n, e).offset;
    });
    float factor = problem_.scale;
    if (problem_.softcap > 0.0f) {
      InMemory(products, dp, [&](float* scores, float* gradients) {
        CapScores(factor, problem_.softcap, has_slope, kRowTiles * kStepTiles * 4, scores,
                  gradients);
      });
      factor = 1.0f;
    }
    if (problem_.bias.data == nullptr) {
      ForEach([&](int m, int n, int e, uint32_t) { products[m][n][e] *= factor; });
    } else if (problem_.bias.dtype == DType::kF32) {
      AddBias<float>(factor, visible, products, [](float value) { return value; });
    } else {
      const bool is_f16 = problem_.bias.dtype == DType::kF16;
      AddBias<uint16_t>(factor, visible, products, [&](uint16_t bits) {
        return is_f16 ? __half2float(__ushort_as_half(bits)) : core::Bf16ToFloat(bits);
      });
    }
    const bool has_slopes = problem_.alibi_slopes != nullptr;
    const float slope = has_slopes ? core::AlibiSlope(problem_, s_, head_) : 0.0f;
    if (has_slopes) {
      ForEach(
          [&](int m, int n, int e, uint32_t) { products[m][n][e] -= slope * Distance(m, n, e); });
    }
    ForEach([&](int m, int n, int e, uint32_t bit) {
      const float lse = statistics_of(m, n, e).lse;
      const float x = MinKeepNan(products[m][n][e] - lse, 0.0f);
      const float p = kDType == DType::kF32 ? expf(x) : Exp2Approximate(x * core::kLog2e);
      // Empty rows have an LSE of +inf here, and may hold anything.
      const bool is_visible = (visible[m] & bit) != 0 && lse != core::BitsToFloat(0x7f800000u);
      const bool is_kept = is_visible && (!has_dropout || (kept[m] & bit) != 0);
      products[m][n][e] = is_kept ? p * keep_scale : 0.0f;
      dp[m][n][e] = is_visible ? p * dp[m][n][e] : 0.0f;
    });
    if ((kKeepsKeys ? params_.key_sums : params_.row_sums) == nullptr) return;
    ForEach([&](int m, int n, int e, uint32_t) {
      PairSums& sum = sums[2 * m + e / 2];
      sum.gradient += dp[m][n][e];
      if (has_slopes) sum.distance_weighted += dp[m][n][e] * Distance(m, n, e);
    });
  }

 private:
  template <typename Visit>
  __device__ __forceinline__ void ForEach(Visit visit) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(m, n, e, 1u << (16 * (e / 2) + 2 * n + e % 2));
      }
    }
  }

  // |d - j|.
  __device__ __forceinline__ float Distance(int m, int n, int e) const {
    const int kept = 16 * m + 8 * (e / 2);
    const int other = 8 * n + e % 2;
    const int64_t distance = query_ + core::DiagonalOffset(problem_.alibi_alignment, s_) - key_ +
                             (kKeepsKeys ? other - kept : kept - other);
    return static_cast<float>(distance < 0 ? -distance : distance);
  }

  // A bias of -inf hides its pair. Where a pair is not visible nothing is read.
  template <typename Element, typename Convert>
  __device__ __forceinline__ void AddBias(float factor, Bits& visible, Scores& products,
                                          Convert convert) const {
    const Array4& bias = problem_.bias;
    const Element* from =
        static_cast<const Element*>(bias.data) + core::BiasOffset(bias, s_, head_, query_, key_);
    const int64_t kept_stride = kKeepsKeys ? bias.column_stride : bias.row_stride;
    const int64_t other_stride = kKeepsKeys ? bias.row_stride : bias.column_stride;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint32_t read = visible[m];
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
        Element values[4] = {};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if ((read >> (16 * (e / 2) + 2 * n + e % 2) & 1u) != 0) {
            values[e] = from[(16 * m + 8 * (e / 2)) * kept_stride + (8 * n + e % 2) * other_stride];
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float value = convert(values[e]);
          products[m][n][e] = fmaf(products[m][n][e], factor, value);
          if (value == core::NegativeInfinity()) {
            visible[m] &= ~(1u << (16 * (e / 2) + 2 * n + e % 2));
          }
        }
      }
    }
  }

  const BackwardParams& params_;
  const Problem& problem_;
  const Sequence& s_;
  const int64_t head_;
  const int64_t query_;  // global, of the lane's first pair
  const int64_t key_;
};

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_TERMS_CUH_
