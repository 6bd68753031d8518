// The portable forward kernel (sm_80 and newer): flash attention on warp-level tensor-core
// products.
//
// A block serves `block_rows` query rows of one head of one sequence, 16 to a warp, and walks over
// the key tiles that these rows may see: it classifies tiles in chunks of one per thread, keeps the
// visible ones in a list, and for each of them computes S = Q K^T, the running softmax and
// O += P V, with K of the next step under way during the softmax and V under way during S. Scores
// and outputs stay in registers (tensor_core.cuh says which lane holds what).
//
// A row's bits depend on its own sequence, head and terms alone: tiles start at multiples of
// block_keys, and every step treats its rows independently of each other.
#ifndef TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_

#include "backend_cuda/params.h"
#include "backend_cuda/policy.h"
#include "backend_cuda/tensor_core.cuh"
#include "backend_cuda/tile_staging.cuh"
#include "core/mask_tiles.h"
#include "core/philox.h"
#include "core/softmax.h"

namespace tandem::cuda {

using core::Array4;
using core::Problem;
using core::Sequence;

// A call, because its callers are unrolled.
static __device__ __noinline__ uint4 DrawWords(const core::Dropout& dropout, int64_t head_index,
                                               int64_t i, int64_t j) {
  const core::Philox4 words = core::DropoutWords(dropout, head_index, i, j);
  return make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// <q, k> of an f32 row and key as plain f32 arithmetic gives it. A call likewise.
static __device__ __noinline__ float PlainProduct(const Problem& problem, const Sequence& s,
                                                  int64_t head, int64_t row, int64_t key) {
  const float* q =
      static_cast<const float*>(problem.q.data) + core::QueryOffset(problem.q, s, head, row);
  const float* k = static_cast<const float*>(problem.k.data) +
                   core::KeyOffset(problem.k, s, head / problem.group, key);
  float sum = 0.0f;
  for (int64_t d = 0; d < problem.qk_dim; ++d) {
    sum = fmaf(q[d * problem.q.column_stride], k[d * problem.k.column_stride], sum);
  }
  return sum;
}

template <DType kDType, int kHeadDim>
class ForwardBlock {
 public:
  static constexpr TilePolicy kPolicy = ForwardPolicy(kDType, kHeadDim);

  __device__ ForwardBlock(const ForwardParams& params, char* shared)
      : problem_(params.problem),
        query_tile_(shared),
        key_tile_(shared + kPolicy.query_bytes),
        value_tile_(shared + kPolicy.query_bytes + kPolicy.key_bytes),
        state_(
            *reinterpret_cast<BlockState*>(shared + kPolicy.query_bytes + 2 * kPolicy.key_bytes)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize) {}

  // One (batch, head, row block) triple. Row blocks come last first: with causal masks the longest
  // start first.
  __device__ void Run(int64_t item, int64_t row_blocks) {
    const int64_t row_block = row_blocks - 1 - item % row_blocks;
    const int64_t batch = item / row_blocks / problem_.q_heads;
    const int64_t head = item / row_blocks % problem_.q_heads;
    if (threadIdx.x == 0) {
      int32_t status = 0;
      const Sequence sequence = core::ResolveSequence(problem_, batch, &status);
      if (status != 0 && head == 0 && row_block == 0 && problem_.device_status != nullptr) {
        atomicOr(problem_.device_status, status);
      }
      const int64_t kv_head = head / problem_.group;
      state_.sequence = sequence;
      state_.head = head;
      state_.first_row = row_block * kPolicy.block_rows;
      state_.keys = MakeRowSource<kDType>(
          problem_.k, core::KeyOffset(problem_.k, sequence, kv_head, 0), problem_.qk_dim);
      state_.values = MakeRowSource<kDType>(
          problem_.v, core::KeyOffset(problem_.v, sequence, kv_head, 0), problem_.v_dim);
      state_.query_flags = 0;
      FindTileRange();
    }
    __syncthreads();
    if (state_.first_row >= state_.rows_end) return;

    StageQuery();
    for (int n = 0; n < kHeadDim / 8; ++n) {
      for (int e = 0; e < 4; ++e) output_[n][e] = 0.0f;
    }
    for (int64_t tile = state_.tile_begin; tile < state_.tile_end;
         tile = state_.list_begin + kPolicy.threads) {
      ListVisibleTiles(tile);
      VisitListedTiles();
    }
    WriteRows();
  }

 private:
  static constexpr int kPlanes = kPolicy.planes;
  static constexpr int kKeyTiles = kPolicy.block_keys / 8;  // of 8 keys, in a step
  static constexpr int kHeadSteps = kHeadDim / 16;
  static constexpr int kQueryPlaneBytes = kPolicy.query_bytes / kPlanes;
  static constexpr int kKeyPlaneBytes = kPolicy.key_bytes / kPlanes;
  static constexpr bool kIsF32 = kDType == DType::kF32;
  // Products over the whole padded head dimension are compiled without tests in between, so that
  // fragment loads run ahead. The six products of f32 hide the loads without that.
  static constexpr bool kHasWholeProducts = !kIsF32;
  static_assert(kKeyTiles * 4 <= 32, "a thread's present bits are one word");
  static_assert(core::kTile % kPolicy.block_keys == 0, "a step lies in one canonical tile");
  static_assert(kPolicy.threads <= 128, "the tile list holds one entry per thread");

  // ---- setup ----

  __device__ __forceinline__ void FindTileRange() {
    const Sequence& s = state_.sequence;
    state_.rows_end = core::Min<int64_t>(state_.first_row + kPolicy.block_rows, s.q_rows);
    const core::Interval hull =
        core::VisibleKeyHull(problem_.mask, s, state_.head, state_.first_row, state_.rows_end);
    state_.tile_begin = hull.begin / kPolicy.block_keys;
    state_.tile_end = core::CeilDiv<int64_t>(hull.end, kPolicy.block_keys);
  }

  __device__ __forceinline__ void StageQuery() {
    const Sequence& s = state_.sequence;
    const RowSource source = MakeRowSource<kDType>(
        problem_.q, core::QueryOffset(problem_.q, s, state_.head, 0), problem_.qk_dim);
    StageTile<kDType, kHeadDim, kPolicy.block_rows, kPolicy.threads, TileUse::kScores>(
        source, state_.first_row, s.q_rows, query_tile_, &state_.query_flags);
    CommitCopies();
    WaitCopies<0>();
    __syncthreads();
    if constexpr (kPolicy.query_in_registers) {
#pragma unroll
      for (int step = 0; step < kHeadSteps; ++step) LoadQuery(step, 0, query_[step]);
    }
  }

  __device__ __forceinline__ void LoadQuery(int step, int plane, uint32_t (&fragment)[4]) {
    const int offset = ChunkOffset<kHeadDim>(16 * warp_ + (lane_ & 15), 2 * step + (lane_ >> 4));
    LoadMatrices(fragment, SharedAddress(query_tile_ + plane * kQueryPlaneBytes + offset));
  }

  // Lists the tiles of [begin, begin + threads) that are not EMPTY.
  __device__ __forceinline__ void ListVisibleTiles(int64_t begin) {
    const int64_t tile = begin + threadIdx.x;
    core::TileClass tile_class = core::TileClass::kEmpty;
    if (tile < state_.tile_end) {
      tile_class = core::ClassifyTile(problem_.mask, state_.sequence, state_.head, state_.first_row,
                                      state_.rows_end, tile * kPolicy.block_keys,
                                      (tile + 1) * kPolicy.block_keys);
    }
    const bool is_listed = tile_class != core::TileClass::kEmpty;
    const uint32_t ballot = __ballot_sync(~0u, is_listed);
    if (lane_ == 0) state_.warp_counts[warp_] = __popc(ballot);
    if (threadIdx.x == 0) {
      state_.key_flags[0] = state_.key_flags[1] = 0;
      state_.value_flags[0] = state_.value_flags[1] = 0;
    }
    __syncthreads();
    int position = __popc(ballot & ((1u << lane_) - 1u));
    int count = 0;
    for (int warp = 0; warp < kPolicy.threads / kWarpSize; ++warp) {
      if (warp < warp_) position += state_.warp_counts[warp];
      count += state_.warp_counts[warp];
    }
    if (is_listed) {
      state_.list[position] =
          static_cast<uint16_t>(4 * threadIdx.x + static_cast<uint32_t>(tile_class));
    }
    if (threadIdx.x == 0) {
      state_.list_count = count;
      state_.list_begin = begin;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int64_t ListedKey(int step) const {
    return (state_.list_begin + (state_.list[step] >> 2)) * kPolicy.block_keys;
  }

  // ---- the loop ----

  // The flags of a tile live in the slot of its step's parity; the other slot is cleared for the
  // next step between the two barriers where no one uses it.
  __device__ __forceinline__ void StageKeys(int64_t first_key, int step) {
    StageTile<kDType, kHeadDim, kPolicy.block_keys, kPolicy.threads, TileUse::kScores>(
        state_.keys, first_key, core::LocalKeys(state_.sequence), key_tile_,
        &state_.key_flags[step & 1]);
  }
  __device__ __forceinline__ void StageValues(int64_t first_key, int step) {
    StageTile<kDType, kHeadDim, kPolicy.block_keys, kPolicy.threads, TileUse::kValues>(
        state_.values, first_key, core::LocalKeys(state_.sequence), value_tile_,
        &state_.value_flags[step & 1]);
  }

  __device__ __forceinline__ void VisitListedTiles() {
    const int count = state_.list_count;
    if (count == 0) return;
    StageKeys(ListedKey(0), 0);
    CommitCopies();
    StageValues(ListedKey(0), 0);
    CommitCopies();
    for (int step = 0; step < count; ++step) {
      const int64_t first_key = ListedKey(step);
      const bool is_partial =
          (state_.list[step] & 3) == static_cast<int>(core::TileClass::kPartial);
      if (is_partial && threadIdx.x < kPolicy.block_rows) {
        const int64_t row = state_.first_row + threadIdx.x;
        state_.visible_words[threadIdx.x] =
            row < state_.rows_end
                ? core::VisibleWord(problem_.mask, state_.sequence, state_.head, row, first_key)
                : 0;
      }
      WaitCopies<1>();
      __syncthreads();  // K and the visible words are there
      if (threadIdx.x == 0) {
        state_.key_flags[(step + 1) & 1] = 0;
        state_.value_flags[(step + 1) & 1] = 0;
      }
      float scores[kKeyTiles][4];
      if (kHasWholeProducts && problem_.qk_dim > kHeadDim - 16) {
        MultiplyQueryKey<true>(scores);
      } else {
        MultiplyQueryKey<false>(scores);
      }
      __syncthreads();  // K may be overwritten
      if (step + 1 < count) StageKeys(ListedKey(step + 1), step + 1);
      CommitCopies();

      const bool hides_pairs =
          is_partial || problem_.dropout.enabled != 0 || problem_.bias.data != nullptr;
      const uint32_t present = FinishScores(scores, first_key, step, is_partial);
      UpdateSoftmax(scores);
      const uint32_t kept =
          problem_.dropout.enabled != 0 ? DropPairs(scores, first_key, present) : present;

      WaitCopies<1>();
      // Where every pair is visible, NaN and infinity in V belong in the product.
      if (!kIsF32 && hides_pairs) {
        TakeOutNonFinite<kDType, kHeadDim, kPolicy.block_keys, kPolicy.threads>(
            value_tile_, &state_.value_flags[step & 1]);
      }
      __syncthreads();  // V is there
      const uint64_t taken_out = state_.value_flags[step & 1];
      if (taken_out != 0) AddTakenOutValues(scores, first_key, kept, taken_out);
      if (kHasWholeProducts && problem_.v_dim > kHeadDim - 16) {
        MultiplyProbabilityValue<true>(scores);
      } else {
        MultiplyProbabilityValue<false>(scores);
      }
      __syncthreads();  // V may be overwritten
      if (step + 1 < count) StageValues(ListedKey(step + 1), step + 1);
      CommitCopies();
    }
  }

  // accumulator += a * b. For f32 the products of the parts, small ones first, are summed apart
  // from the accumulator: the tensor cores truncate where f32 addition rounds, and truncation over
  // many steps would add up.
  __device__ __forceinline__ void MultiplyAdd(float (&accumulator)[4],
                                              const uint32_t (&a)[kPlanes][4],
                                              const uint32_t (&b)[kPlanes][4], int half) {
    const auto multiply = [&](float(&sum)[4], int a_plane, int b_plane) {
      MultiplyAccumulate<kMathType<kDType>>(sum, a[a_plane], b[b_plane][2 * half],
                                            b[b_plane][2 * half + 1]);
    };
    if constexpr (!kIsF32) {
      multiply(accumulator, 0, 0);
    } else {
      float small[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float large[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      multiply(small, 0, 2);
      multiply(small, 2, 0);
      multiply(small, 1, 1);
      multiply(small, 0, 1);
      multiply(small, 1, 0);
      multiply(large, 0, 0);
#pragma unroll
      for (int e = 0; e < 4; ++e) accumulator[e] += large[e] + small[e];
    }
  }

  // S = Q K^T, unscaled. kIsWhole: the head dimension fills the padded one, and no step is left
  // out.
  template <bool kIsWhole>
  __device__ __forceinline__ void MultiplyQueryKey(float (&scores)[kKeyTiles][4]) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = 0.0f;
    }
    const int key = (lane_ & 7) + (lane_ >> 4) * 8;
    const int chunk = (lane_ >> 3) & 1;
#pragma unroll
    for (int step = 0; step < kHeadSteps; ++step) {
      if (!kIsWhole && 16 * step >= problem_.qk_dim) break;
      uint32_t a[kPlanes][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        if constexpr (kPolicy.query_in_registers) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[plane][e] = query_[step][e];
        } else {
          LoadQuery(step, plane, a[plane]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        uint32_t b[kPlanes][4];
        const int offset = ChunkOffset<kHeadDim>(16 * pair + key, 2 * step + chunk);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          LoadMatrices(b[plane], SharedAddress(key_tile_ + plane * kKeyPlaneBytes + offset));
        }
        MultiplyAdd(scores[2 * pair], a, b, 0);
        MultiplyAdd(scores[2 * pair + 1], a, b, 1);
      }
    }
  }

  // O += P V.
  template <bool kIsWhole>
  __device__ __forceinline__ void MultiplyProbabilityValue(const float (&scores)[kKeyTiles][4]) {
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) {
      uint32_t a[kPlanes][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float(&tile)[4] = scores[2 * step + e / 2];
        uint32_t part[kPlanes];
        SplitPair<kMathType<kDType>>(tile[2 * (e % 2)], tile[2 * (e % 2) + 1], part);
#pragma unroll
        for (int i = 0; i < kPlanes; ++i) a[i][e] = part[i];
      }
#pragma unroll
      for (int pair = 0; pair < kHeadSteps; ++pair) {
        if (!kIsWhole && 16 * pair >= problem_.v_dim) break;
        uint32_t b[kPlanes][4];
        const int offset = ChunkOffset<kHeadDim>(16 * step + (lane_ & 15), 2 * pair + (lane_ >> 4));
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          LoadMatricesTransposed(b[plane],
                                 SharedAddress(value_tile_ + plane * kKeyPlaneBytes + offset));
        }
        MultiplyAdd(output_[2 * pair], a, b, 0);
        MultiplyAdd(output_[2 * pair + 1], a, b, 1);
      }
    }
  }

  // ---- scores ----

  // Row r (0 or 1) of this thread, and its first key in tile n of a step.
  __device__ __forceinline__ int64_t ThreadRow(int r) const {
    return state_.first_row + 16 * warp_ + (lane_ >> 2) + 8 * r;
  }
  __device__ __forceinline__ int ThreadKey(int n) const { return 8 * n + 2 * (lane_ & 3); }

  // Calls visit(score, r, key of the step, bit of `present`) for this thread's scores.
  template <typename Visit>
  __device__ __forceinline__ void ForEachScore(float (&scores)[kKeyTiles][4], Visit visit) const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        visit(scores[n][e], e / 2, ThreadKey(n) + e % 2, 1u << (4 * n + e));
      }
    }
  }

  // This thread's visible pairs of a partial tile, bit 4 n + e for scores[n][e].
  __device__ __forceinline__ uint32_t PartialTileBits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint64_t word =
          state_.visible_words[ThreadRow(r) - state_.first_row] >> (2 * (lane_ & 3));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        bits |= (static_cast<uint32_t>(word >> (8 * n)) & 3u) << (4 * n + 2 * r);
      }
    }
    return bits;
  }
  // Likewise of a full tile: all of them, but for the rows that the block has beyond the tensor's.
  __device__ __forceinline__ uint32_t FullTileBits() const {
    const int64_t rows = state_.sequence.q_rows;
    return (ThreadRow(0) < rows ? 0x33333333u : 0u) | (ThreadRow(1) < rows ? 0xccccccccu : 0u);
  }

  // From products to scores: scale, softcap, bias, ALiBi, and -inf where nothing is visible.
  // Returns the visible pairs, bit 4 n + e for scores[n][e].
  __device__ __forceinline__ uint32_t FinishScores(float (&scores)[kKeyTiles][4], int64_t first_key,
                                                   int step, bool is_partial) {
    const Sequence& s = state_.sequence;
    uint32_t present = is_partial ? PartialTileBits() : FullTileBits();
    if constexpr (kIsF32) ReplaceOverflowingScores(scores, first_key, step, present);

    const float scale = problem_.scale;
    ForEachScore(scores, [&](float& score, int, int, uint32_t) { score *= scale; });
    if (problem_.softcap > 0.0f) {
      const float softcap = problem_.softcap;
      const float inverse = 1.0f / softcap;
      ForEachScore(scores, [&](float& score, int, int, uint32_t) {
        score = softcap * tanhf(score * inverse);
      });
    }
    if (problem_.bias.data != nullptr) AddBias(scores, first_key, &present);
    if (problem_.alibi_slopes != nullptr) {
      const float slope = core::AlibiSlope(problem_, s, state_.head);
      const int64_t diagonal =
          core::DiagonalOffset(problem_.alibi_alignment, s) + s.q_offset - s.kv_offset - first_key;
      ForEachScore(scores, [&](float& score, int r, int key, uint32_t) {
        const int64_t distance = ThreadRow(r) + diagonal - key;
        score -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      });
    }
    if (is_partial || problem_.bias.data != nullptr) {
      ForEachScore(scores, [&](float& score, int, int, uint32_t bit) {
        if ((present & bit) == 0) score = core::NegativeInfinity();
      });
    }
    return present;
  }

  // Bias at visible pairs only; -inf hides a pair whatever its score.
  __device__ __forceinline__ void AddBias(float (&scores)[kKeyTiles][4], int64_t first_key,
                                          uint32_t* present) {
    const Sequence& s = state_.sequence;
    const Array4& bias = problem_.bias;
    ForEachScore(scores, [&](float& score, int r, int key, uint32_t bit) {
      if ((*present & bit) == 0) return;
      const int64_t index = core::BiasOffset(bias, s, state_.head, s.q_offset + ThreadRow(r),
                                             s.kv_offset + first_key + key);
      const float value = LoadElement(bias.data, bias.dtype, index);
      score += value;
      if (value == core::NegativeInfinity()) *present &= ~bit;
    });
  }

  // Scores of f32 rows and keys that the split cannot serve, from device memory.
  __device__ __forceinline__ void ReplaceOverflowingScores(float (&scores)[kKeyTiles][4],
                                                           int64_t first_key, int step,
                                                           uint32_t present) {
    const uint64_t query_flags = state_.query_flags;
    const uint64_t key_flags = state_.key_flags[step & 1];
    if ((query_flags | key_flags) == 0) return;
    ForEachScore(scores, [&](float& score, int r, int key, uint32_t bit) {
      const int row = static_cast<int>(ThreadRow(r) - state_.first_row);
      if ((present & bit) == 0 || (((query_flags >> row) | (key_flags >> key)) & 1u) == 0) return;
      score = PlainProduct(problem_, state_.sequence, state_.head, ThreadRow(r), first_key + key);
    });
  }

  // ---- softmax ----

  // Scores become probabilities against the new running maximum; sum and output are rescaled.
  __device__ __forceinline__ void UpdateSoftmax(float (&scores)[kKeyTiles][4]) {
    float reference[2];
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = maximum_[r];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        maximum = MaxKeepNan(maximum, MaxKeepNan(scores[n][2 * r], scores[n][2 * r + 1]));
      }
      maximum = MaxKeepNan(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = MaxKeepNan(maximum, __shfl_xor_sync(~0u, maximum, 2));
      rescale[r] = core::SoftmaxRescale(maximum_[r], maximum);
      reference[r] = core::SoftmaxReference(maximum);
      maximum_[r] = maximum;
    }
    float tile_sum[2] = {0.0f, 0.0f};
    ForEachScore(scores, [&](float& score, int r, int, uint32_t) {
      score = kIsF32 ? expf(score - reference[r])
                     : Exp2Approximate((score - reference[r]) * core::kLog2e);
      tile_sum[r] += score;
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) sum_[r] = sum_[r] * rescale[r] + tile_sum[r];
    // Once the maximum has settled, the factors are exactly 1.
    if (__all_sync(~0u, rescale[0] == 1.0f && rescale[1] == 1.0f)) return;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) output_[n][e] *= rescale[e / 2];
    }
  }

  // Sets dropped probabilities to 0 and returns the pairs that are left. The sum is that of the
  // undropped row.
  __device__ __forceinline__ uint32_t DropPairs(float (&scores)[kKeyTiles][4], int64_t first_key,
                                                uint32_t present) {
    const Sequence& s = state_.sequence;
    const int64_t head_index = s.batch * problem_.q_heads + state_.head;
    uint4 words = {};
    uint32_t kept = present;
    ForEachScore(scores, [&](float& score, int r, int key, uint32_t bit) {
      const int64_t j = s.kv_offset + first_key + key;
      // One draw serves four keys: the even one of a pair draws, the odd one only in a new group.
      if (key % 2 == 0 || j % 4 == 0) {
        words = DrawWords(problem_.dropout, head_index, s.q_offset + ThreadRow(r), j);
      }
      const uint32_t low = (j & 1) != 0 ? words.y : words.x;
      const uint32_t high = (j & 1) != 0 ? words.w : words.z;
      if (((j & 2) != 0 ? high : low) >= problem_.dropout.threshold) return;
      score = 0.0f;
      kept &= ~bit;
    });
    return kept;
  }

  // Adds p * v for the elements that are not in the V tile, at the pairs that are left.
  __device__ __forceinline__ void AddTakenOutValues(float (&scores)[kKeyTiles][4],
                                                    int64_t first_key, uint32_t kept,
                                                    uint64_t taken_out) {
    while (taken_out != 0) {
      const int key = __ffsll(static_cast<long long>(taken_out)) - 1;
      taken_out &= taken_out - 1;
      // This row's probability of the key is held by one of its four lanes.
      float mine[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * n + e % 2 == (key & ~6)) mine[e / 2] = scores[n][e];
        }
      }
      const int owner = (lane_ & ~3) | ((key >> 1) & 3);
      const int bit = 4 * (key >> 3) + (key & 1);
      const uint32_t owner_kept = __shfl_sync(~0u, kept, owner);
      const float probability[2] = {__shfl_sync(~0u, mine[0], owner),
                                    __shfl_sync(~0u, mine[1], owner)};
      const char* row =
          state_.values.base + (first_key + key) * state_.values.row_stride * kElementBytes<kDType>;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * n + 2 * (lane_ & 3) + c;
          if (column >= state_.values.columns) continue;
          const float value = LoadElement(row, kDType, column * state_.values.column_stride);
          if (!IsExceptionalValue<kDType>(value)) continue;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if ((owner_kept >> (bit + 2 * r)) & 1u) output_[n][2 * r + c] += probability[r] * value;
          }
        }
      }
    }
  }

  // ---- results ----

  __device__ __forceinline__ void WriteRows() {
    const Sequence& s = state_.sequence;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int64_t row = ThreadRow(r);
      if (row >= s.q_rows) continue;
      float maximum = maximum_[r];
      float rescale = 1.0f;
      const bool exists = core::RowExists(s, row);
      if (exists && problem_.sink != nullptr) {
        core::SoftmaxAddSink(problem_.sink[state_.head * problem_.sink_stride], &maximum, &sum,
                             &rescale);
      }
      const bool is_empty = !exists || core::SoftmaxRowIsEmpty(maximum, sum);
      const float keep_scale = problem_.dropout.enabled != 0 ? problem_.dropout.keep_scale : 1.0f;
      const float factor = core::SoftmaxInverse(sum) * rescale * keep_scale;
      const Array4& out = problem_.out;
      const int64_t offset = core::QueryOffset(out, s, state_.head, row);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t column = 8 * n + 2 * (lane_ & 3) + c;
          if (column >= problem_.v_dim) continue;
          const float value = is_empty ? 0.0f : output_[n][2 * r + c] * factor;
          StoreElement(out.data, out.dtype, offset + column * out.column_stride, value);
        }
      }
      if (problem_.lse.data != nullptr && (lane_ & 3) == 0) {
        static_cast<float*>(
            problem_.lse.data)[core::QueryOffset(problem_.lse, s, state_.head, row)] =
            is_empty ? core::NegativeInfinity() : core::SoftmaxLse(maximum, sum);
      }
    }
  }

  const Problem& problem_;
  char* const query_tile_;
  char* const key_tile_;
  char* const value_tile_;
  BlockState& state_;
  const int warp_;
  const int lane_;
  uint32_t query_[kPolicy.query_in_registers ? kHeadSteps : 1][4];
  float output_[kHeadDim / 8][4];
  float maximum_[2] = {core::NegativeInfinity(), core::NegativeInfinity()};
  float sum_[2] = {0.0f, 0.0f};  // this thread's part
};

template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(ForwardPolicy(kDType, kHeadDim).threads,
                                  ForwardPolicy(kDType, kHeadDim).blocks_per_multiprocessor)
    ForwardKernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(128) char shared[];
  const int64_t item = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  if (item >= params.items) return;
  ForwardBlock<kDType, kHeadDim> block(params, shared);
  block.Run(item, params.row_blocks);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_
