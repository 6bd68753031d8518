// What one warp does: S = Q K^T of its rows and the keys of a step, the running softmax, O += P V.
// Scores, probabilities and outputs stay in registers (tensor_core.cuh says which lane holds what);
// the forward kernels decide what lies in shared memory and who works on which keys.
//
// A warp has kRowTiles tiles of 16 rows and takes kKeyTiles tiles of 8 keys in a step. Row (m, r)
// of a lane is row 16 m + 8 r + lane / 4 of the warp; bit 16 r + 2 n + e of word m stands for its
// score [m][n][2 r + e], key 8 n + 2 (lane % 4) + e of the step.
#ifndef TANDEM_BACKEND_CUDA_WARP_ATTENTION_CUH_
#define TANDEM_BACKEND_CUDA_WARP_ATTENTION_CUH_

#include "backend_cuda/params.h"
#include "backend_cuda/tensor_core.cuh"
#include "backend_cuda/tile_staging.cuh"
#include "core/philox.h"
#include "core/softmax.h"

namespace tandem::cuda {

using core::Array4;
using core::Problem;
using core::Sequence;

// The query rows of a warp: row n of them is row (first + n) / group of head head + (first + n) %
// group.
struct WarpRows {
  int32_t first;
  int32_t group;  // 1: one head
  int64_t head;

  __device__ __forceinline__ int64_t Row(int n) const {
    return group == 1 ? first + n : (first + n) / group;
  }
  __device__ __forceinline__ int64_t Head(int n) const {
    return group == 1 ? head : head + (first + n) % group;
  }
};

// core::StructuredWord and core::VisibleWord as calls: they are long, and their callers' loops run
// faster when they are short.
static __device__ __noinline__ uint64_t WordOfStructuredTerms(const core::Mask& mask,
                                                              const Sequence& s, int64_t head,
                                                              int64_t row, int64_t first_key) {
  return core::StructuredWord(mask, s, head, row, first_key);
}
static __device__ __noinline__ uint64_t WordOfAllTerms(const core::Mask& mask, const Sequence& s,
                                                       int64_t head, int64_t row,
                                                       int64_t first_key) {
  return core::VisibleWord(mask, s, head, row, first_key);
}

// A call, because its callers are unrolled.
static __device__ __noinline__ uint4 DrawWords(const core::Dropout& dropout, int64_t head_index,
                                               int64_t i, int64_t j) {
  const core::Philox4 words = core::DropoutWords(dropout, head_index, i, j);
  return make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// <q, k> of f32 rows as plain f32 arithmetic gives it. A call likewise, with arguments by value: a
// reference would put its target into local memory.
static __device__ __noinline__ float PlainProduct(const float* q, int64_t q_stride, const float* k,
                                                  int64_t k_stride, int64_t dim) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) sum = fmaf(q[d * q_stride], k[d * k_stride], sum);
  return sum;
}
__device__ __forceinline__ float PlainProduct(const Problem& problem, const Sequence& s,
                                              int64_t head, int64_t row, int64_t key) {
  return PlainProduct(
      static_cast<const float*>(problem.q.data) + core::QueryOffset(problem.q, s, head, row),
      problem.q.column_stride,
      static_cast<const float*>(problem.k.data) +
          core::KeyRowOffset(problem, problem.k, s, head / problem.group, key),
      problem.k.column_stride, problem.qk_dim);
}

// kPartRows: not 0 where tiles of K and V lie in parts of 64 columns (ChunkOffset).
template <DType kDType, int kHeadDim, int kRowTiles, int kKeyTiles, int kPartRows = 0>
class WarpAttention {
  static_assert(kPartRows == 0 || (kKeyTiles == 2 && kRowTiles == 1));

 public:
  static constexpr int kPlanes = Planes(kDType);
  static constexpr int kHeadSteps = kHeadDim / 16;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr bool kIsF32 = kDType == DType::kF32;
  using Scores = float[kRowTiles][kKeyTiles][4];
  using Bits = uint32_t[kRowTiles];
  using Probabilities = uint32_t[kRowTiles][kKeyTiles / 2][kPlanes][4];
  using QueryFragments = uint32_t[kRowTiles][kHeadSteps][kPlanes][4];

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) output[m][n][e] = 0.0f;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        maximum[m][r] = core::NegativeInfinity();
        sum[m][r] = 0.0f;
      }
    }
    has_extreme_ = false;
  }

  // Where a lane reads fragments in a tile: of Q and of V (transposed), and of K. The tile begins
  // at a multiple of 1024 bytes; ^ 32 per step of 16 columns, + kRowBytes per row.
  static __device__ __forceinline__ uint32_t RowMajorOffset(int lane) {
    return ChunkOffset<kHeadDim>(lane & 15, lane >> 4);
  }
  static __device__ __forceinline__ uint32_t KeyOffset(int lane) {
    return ChunkOffset<kHeadDim, kPartRows>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  }
  static __device__ __forceinline__ uint32_t ValueOffset(int lane) {
    return ChunkOffset<kHeadDim, kPartRows>(lane & 15, lane >> 4);
  }
  // In a tile of K or V, from the first 16 columns to others.
  static __device__ __forceinline__ uint32_t Columns(uint32_t address, int step) {
    if constexpr (kPartRows == 0 || kHeadDim <= 64) return address ^ (32 * step);
    return (address ^ (32 * (step % 4))) + step / 4 * (kPartRows * 128);
  }

  static __device__ __forceinline__ void LoadQuery(uint32_t tile, int step, int m, int plane,
                                                   int plane_bytes, uint32_t (&fragment)[4]) {
    LoadMatrices(fragment, (tile ^ (32 * step)) + 16 * kRowBytes * m + plane * plane_bytes);
  }

  // S = Q K^T, unscaled, of tiles whose addresses hold the lane's offset.
  template <bool kQueryInRegisters>
  static __device__ __forceinline__ void MultiplyQueryKey(uint32_t query, int query_plane_bytes,
                                                          const QueryFragments& fragments,
                                                          uint32_t keys, int key_plane_bytes,
                                                          Scores& scores) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[kRowTiles][kPlanes][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          if constexpr (kQueryInRegisters) {
#pragma unroll
            for (int e = 0; e < 4; ++e) a[m][plane][e] = fragments[m][step][plane][e];
          } else {
            LoadQuery(query, step, m, plane, query_plane_bytes, a[m][plane]);
          }
        }
      }
      constexpr int kPairs = kPairsAtOnce < kKeyTiles / 2 ? kPairsAtOnce : kKeyTiles / 2;
#pragma unroll
      for (int first = 0; first < kKeyTiles / 2; first += kPairs) {
        uint32_t b[kPairs][kPlanes][4];
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            LoadMatrices(b[pair][plane], Columns(keys, step) + 16 * kRowBytes * (first + pair) +
                                             plane * key_plane_bytes);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          MultiplyAdd<kPairs>(&scores[m][2 * first], a[m], b);
        }
      }
    }
  }

  // Probabilities as fragments of the product with V.
  static __device__ __forceinline__ void PackProbabilities(const Scores& scores,
                                                           Probabilities& packed) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < kKeyTiles / 2; ++step) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float(&tile)[4] = scores[m][2 * step + e / 2];
          uint32_t part[kPlanes];
          SplitPair<kMathType<kDType>>(tile[2 * (e % 2)], tile[2 * (e % 2) + 1], part);
#pragma unroll
          for (int i = 0; i < kPlanes; ++i) packed[m][step][i][e] = part[i];
        }
      }
    }
  }

  // O += P V.
  __device__ __forceinline__ void MultiplyProbabilityValue(const Probabilities& packed,
                                                           uint32_t values, int value_plane_bytes) {
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) {
#pragma unroll
      for (int first = 0; first < kHeadSteps; first += kPairsAtOnce) {
        uint32_t b[kPairsAtOnce][kPlanes][4];
#pragma unroll
        for (int pair = 0; pair < kPairsAtOnce; ++pair) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            LoadMatricesTransposed(
                b[pair][plane],
                Columns(values, first + pair) + 16 * kRowBytes * step + plane * value_plane_bytes);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          MultiplyAdd<kPairsAtOnce>(&output[m][2 * first], packed[m][step], b);
        }
      }
    }
  }

  // Calls visit(score, m, r, key of the step, bit) for this lane's scores.
  template <typename Visit>
  static __device__ __forceinline__ void ForEachScore(Scores& scores, Visit visit) {
    const int column = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          visit(scores[m][n][e], m, e / 2, 8 * n + column + e % 2,
                1u << (16 * (e / 2) + 2 * n + e % 2));
        }
      }
    }
  }

  static __device__ __forceinline__ void HideScores(Scores& scores, const Bits& bits) {
    ForEachScore(scores, [&](float& score, int m, int, int, uint32_t bit) {
      if ((bits[m] & bit) == 0) score = core::NegativeInfinity();
    });
  }

  // From products to scores: scale, softcap, bias, ALiBi. `add_bias(scores, factor)` makes score *
  // factor + bias of each score.
  template <typename AddBias>
  static __device__ __forceinline__ void FinishScores(const Problem& problem, const Sequence& s,
                                                      const WarpRows& rows, int64_t first_key,
                                                      float scale, Scores& scores,
                                                      AddBias add_bias) {
    float factor = scale;
    if (problem.softcap > 0.0f) {
      const float softcap = problem.softcap;
      const float inner = scale / softcap;
      ForEachScore(scores, [&](float& score, int, int, int, uint32_t) {
        score = softcap * tanhf(score * inner);
      });
      factor = 1.0f;
    }
    if (problem.bias.data != nullptr) {
      add_bias(scores, factor);
    } else if (factor != 1.0f) {
      ForEachScore(scores, [&](float& score, int, int, int, uint32_t) { score *= factor; });
    }
    if (problem.alibi_slopes == nullptr) return;
    const int64_t diagonal =
        core::DiagonalOffset(problem.alibi_alignment, s) + s.q_offset - s.kv_offset - first_key;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = LaneRow(m, r);
        const float slope = core::AlibiSlope(problem, s, rows.Head(n));
        const int64_t distance_from_first = rows.Row(n) + diagonal;
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t distance =
                distance_from_first - (8 * t + 2 * static_cast<int>(threadIdx.x & 3) + e);
            scores[m][t][2 * r + e] -=
                slope * static_cast<float>(distance < 0 ? -distance : distance);
          }
        }
      }
    }
  }

  // Row (m, r) of this lane, among the warp's.
  static __device__ __forceinline__ int LaneRow(int m, int r) {
    return 16 * m + 8 * r + static_cast<int>(threadIdx.x % kWarpSize >> 2);
  }

  // Of a row, the bits of keys less than `end`, relative to the lane's first.
  static __device__ __forceinline__ uint32_t BitsBelow(int end) {
    const int bounded = core::Clamp(end, 0, 8 * kKeyTiles);
    return (1u << (2 * (bounded >> 3) + core::Min(bounded & 7, 2))) - 1u;
  }

  // Scores become probabilities against a reference close to the running maximum, in units of the
  // scores; sums and outputs are rescaled where it changes. It is the maximum of the step in which
  // a row first sees something, and is raised, by each row for itself, only where the maximum has
  // left it behind by a factor of 2^kLazyBits: rarely, and it cancels in the result.
  __device__ __forceinline__ void UpdateSoftmax(Scores& scores, const ScoreScale& scale) {
    float value[kRowTiles][2];
    // In a long loop body a branch costs more than what it saves: the usual way passes by Raise and
    // by the formula of extreme rows, which serves all rows, in one.
    constexpr bool kIsLong = kRowTiles * kKeyTiles > 2;
    bool is_special = kIsLong && has_extreme_;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& row = value[m][r];
        row = MaxKeepNan(scores[m][0][2 * r], scores[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) {
          row = MaxKeepNan(row, MaxKeepNan(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
        }
        row = MaxKeepNan(row, __shfl_xor_sync(~0u, row, 1));
        row = MaxKeepNan(row, __shfl_xor_sync(~0u, row, 2));
        is_special = is_special || LeavesBehind(row, maximum[m][r], scale.margin);
      }
    }
    is_special = __any_sync(~0u, is_special);
    const auto take_exponentials = [&] {
      float reference[kRowTiles][2];
      References(scale, reference);
      ForEachScore(scores, [&](float& score, int m, int r, int, uint32_t) {
        score = Exponential(fmaf(score, Unit(scale), -reference[m][r]));
      });
    };
    if constexpr (kIsLong) {
      if (is_special) {
        Raise(value, scale);
        ExtremeExponentials(scores, scale);
      } else {
        take_exponentials();
      }
    } else {
      if (is_special) Raise(value, scale);
      if (has_extreme_) {
        ExtremeExponentials(scores, scale);
      } else {
        take_exponentials();
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float tile_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          tile_sum += scores[m][n][2 * r] + scores[m][n][2 * r + 1];
        }
        sum[m][r] += tile_sum;
      }
    }
  }

  // Sets dropped probabilities to 0 and takes them out of `bits`. The sum is that of the undropped
  // row.
  static __device__ __forceinline__ void DropPairs(const Problem& problem, const Sequence& s,
                                                   const WarpRows& rows, int64_t first_key,
                                                   Scores& scores, Bits& bits) {
    uint4 words = {};
    ForEachScore(scores, [&](float& score, int m, int r, int key, uint32_t bit) {
      const int64_t j = s.kv_offset + first_key + key;
      // One draw serves four keys: the even one of a pair draws, the odd one only in a new group.
      if (key % 2 == 0 || j % 4 == 0) {
        const int n = LaneRow(m, r);
        words = DrawWords(problem.dropout, s.batch * problem.q_heads + rows.Head(n),
                          s.q_offset + rows.Row(n), j);
      }
      const uint32_t low = (j & 1) != 0 ? words.y : words.x;
      const uint32_t high = (j & 1) != 0 ? words.w : words.z;
      if (((j & 2) != 0 ? high : low) >= problem.dropout.threshold) return;
      score = 0.0f;
      bits[m] &= ~bit;
    });
  }

  // f16 and bf16: makes NaN of the output where a row sees a non-finite value. `values` is a tile
  // of ones in the place of such values and zeros elsewhere, so a product with the visible pairs
  // counts them.
  __device__ __forceinline__ void MarkNonFinite(const Bits& bits, uint32_t values) {
    constexpr uint32_t kOne = kOneOf<kDType>;
#pragma unroll
    for (int pair = 0; pair < kHeadSteps; ++pair) {
      float count[kRowTiles][2][4] = {};
#pragma unroll
      for (int step = 0; step < kKeyTiles / 2; ++step) {
        uint32_t b[4];
        LoadMatricesTransposed(b, (values ^ (32 * pair)) + 16 * kRowBytes * step);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t two = bits[m] >> (16 * (e % 2) + 2 * (2 * step + e / 2));
            a[e] = (two & 1u) * kOne | (two >> 1 & 1u) * (kOne << 16);
          }
          MultiplyAccumulate<kMathType<kDType>>(count[m][0], a, b[0], b[1]);
          MultiplyAccumulate<kMathType<kDType>>(count[m][1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (count[m][e / 4][e % 4] != 0.0f) {
            output[m][2 * pair + e / 4][e % 4] = core::BitsToFloat(0x7fffffffu);
          }
        }
      }
    }
  }

  // f32: adds p * v for the elements that were taken out of the V tile, at the pairs in `bits`.
  // `row_of(key)` points at a key's values in device memory.
  template <typename RowOf>
  __device__ __forceinline__ void AddTakenOutValues(const Probabilities& packed, const Bits& bits,
                                                    uint64_t taken_out, const RowSource& values,
                                                    RowOf row_of) {
    const int lane = threadIdx.x % kWarpSize;
    while (taken_out != 0) {
      const int key = __ffsll(static_cast<long long>(taken_out)) - 1;
      taken_out &= taken_out - 1;
      const char* row = row_of(key);
      // This row's probability of the key is held by one of its four lanes.
      const int owner = (lane & ~3) | ((key >> 1) & 3);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float probability[2];
        bool is_present[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float mine = 0.0f;
#pragma unroll
          for (int plane = kPlanes - 1; plane >= 0; --plane) {
            uint32_t pair = 0;
#pragma unroll
            for (int tile = 0; tile < kKeyTiles; ++tile) {
              if (tile == key >> 3) pair = packed[m][tile / 2][plane][2 * (tile % 2) + r];
              // Opaque, so that this does not become an array in local memory.
              asm volatile("" : "+r"(pair));
            }
            mine += (key & 1) != 0 ? UnpackHigh<kMathType<kDType>>(pair)
                                   : UnpackLow<kMathType<kDType>>(pair);
          }
          probability[r] = __shfl_sync(~0u, mine, owner);
          const uint32_t present = __shfl_sync(~0u, bits[m], owner);
          is_present[r] = ((present >> (16 * r + 2 * (key >> 3) + (key & 1))) & 1u) != 0;
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = 8 * n + 2 * (lane & 3) + c;
            if (column >= values.columns) continue;
            const float value = LoadElement(row, kDType, column * values.column_stride);
            if (!IsExceptionalValue<kDType>(value)) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              if (is_present[r]) output[m][n][2 * r + c] += probability[r] * value;
            }
          }
        }
      }
    }
  }

  // Adds up the four lanes' parts of each row's sum.
  __device__ __forceinline__ void FinishSums() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[m][r] += __shfl_xor_sync(~0u, sum[m][r], 1);
        sum[m][r] += __shfl_xor_sync(~0u, sum[m][r], 2);
      }
    }
  }

  __device__ __forceinline__ bool HasNanOutput() const {
    bool has_nan = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) has_nan = has_nan || output[m][n][e] != output[m][n][e];
      }
    }
    return has_nan;
  }

  float output[kRowTiles][kHeadDim / 8][4];
  float maximum[kRowTiles][2];  // the reference of UpdateSoftmax; -inf: nothing visible yet
  float sum[kRowTiles][2];      // of this lane's columns

 private:
  // Pairs of tiles of 8 columns that are multiplied together. The products of f32's parts depend on
  // each other, so several tiles keep the tensor cores busy.
  static constexpr int kPairsAtOnce = kIsF32 ? 2 : 1;

  // accumulators += a * b. For f32 the products of the parts, small ones first, are summed apart
  // from the accumulator: the tensor cores truncate where f32 addition rounds, and truncation over
  // many steps would add up.
  template <int kPairs>
  static __device__ __forceinline__ void MultiplyAdd(float (*accumulators)[4],
                                                     const uint32_t (&a)[kPlanes][4],
                                                     const uint32_t (&b)[kPairs][kPlanes][4]) {
    const auto multiply = [&](float(*targets)[4], int a_plane, int b_plane) {
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        MultiplyAccumulate<kMathType<kDType>>(targets[n], a[a_plane],
                                              b[n / 2][b_plane][2 * (n % 2)],
                                              b[n / 2][b_plane][2 * (n % 2) + 1]);
      }
    };
    if constexpr (!kIsF32) {
      multiply(accumulators, 0, 0);
    } else {
      float products[2 * kPairs][4] = {};
      multiply(products, 0, 2);
      multiply(products, 2, 0);
      multiply(products, 1, 1);
      multiply(products, 0, 1);
      multiply(products, 1, 0);
      multiply(products, 0, 0);
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) accumulators[n][e] += products[n][e];
      }
    }
  }

  // True also where one of them is NaN.
  static __device__ __forceinline__ bool LeavesBehind(float value, float reference, float margin) {
    return !(value <= reference + margin);
  }

  __device__ __forceinline__ void Raise(const float (&value)[kRowTiles][2],
                                        const ScoreScale& scale) {
    bool is_extreme = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& reference = maximum[m][r];
        if (LeavesBehind(value[m][r], reference, scale.margin)) {
          const float raised = MaxKeepNan(reference, value[m][r]);
          const float factor = core::SoftmaxRescale(reference * scale.scale, raised * scale.scale);
          reference = raised;
          sum[m][r] *= factor;
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
            output[m][n][2 * r] *= factor;
            output[m][n][2 * r + 1] *= factor;
          }
        }
        is_extreme = is_extreme || IsExtreme(reference, reference * scale.log2_scale);
      }
    }
    has_extreme_ = __any_sync(~0u, is_extreme);
  }

  static __device__ __forceinline__ float Exponential(float x) {
    return kIsF32 ? expf(x) : Exp2Approximate(x);
  }

  // What exponents are made of: natural for f32, else of base 2.
  static __device__ __forceinline__ float Unit(const ScoreScale& scale) {
    return kIsF32 ? scale.scale : scale.log2_scale;
  }
  __device__ __forceinline__ void References(const ScoreScale& scale,
                                             float (&reference)[kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reference[m][r] = core::SoftmaxReference(maximum[m][r]) * Unit(scale);
      }
    }
  }

  // Only the rows that need it leave the usual formula: a row's bits do not depend on the others.
  __device__ __forceinline__ void ExtremeExponentials(Scores& scores, const ScoreScale& scale) {
    constexpr float kNatural = kIsF32 ? 1.0f : core::kLog2e;
    float reference[kRowTiles][2];
    References(scale, reference);
    ForEachScore(scores, [&](float& score, int m, int r, int, uint32_t) {
      const float natural = core::SoftmaxReference(maximum[m][r] * scale.scale);
      const float usual = fmaf(score, Unit(scale), -reference[m][r]);
      const float careful = CarefulExponent(score, scale.scale, natural) * kNatural;
      score = Exponential(IsExtreme(maximum[m][r], reference[m][r]) ? careful : usual);
    });
  }

  bool has_extreme_;  // of the warp's rows, by IsExtreme
};

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_WARP_ATTENTION_CUH_
