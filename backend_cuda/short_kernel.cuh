// The portable forward kernel for short queries with any terms; stream_kernel.cuh serves those with
// lengths alone.
//
// The keys of a sequence are split at multiples of SplitKeys. A block serves 16 rows of the query
// rows and heads that share a key head (row n is row n / group, head n % group of the group) and
// one split; each of its warps works alone on 16 keys of a step, with loads of its own, and the
// warps are merged at the end. Where a sequence has several splits, blocks leave partial results,
// and MergeSplitsKernel adds them up in the order of the splits. Both merges are those of the
// running softmax (core/softmax.h).
#ifndef TANDEM_BACKEND_CUDA_SHORT_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_SHORT_KERNEL_CUH_

#include "backend_cuda/row_output.cuh"
#include "backend_cuda/warp_attention.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda {

template <DType kDType, int kHeadDim>
class ShortBlock {
 public:
  static constexpr ShortPolicy kPolicy = ForwardShortPolicy(kDType, kHeadDim);
  using Warp = WarpAttention<kDType, kHeadDim, 1, 2>;
  using Column = ChunkColumn<kHeadDim, 16, kWarpSize>;
  static constexpr int kStepKeys = 16 * kPolicy.warps;

  // Beside the tiles. What is the same for all threads but not needed in the inner loop is here
  // too, to spare registers.
  struct State {
    Sequence sequence;
    RowSource keys;
    RowSource values;
    uint64_t query_flags;  // rows that the split products cannot serve (f32)
    uint64_t key_flags[kPolicy.warps];
    uint64_t value_flags[kPolicy.warps];
    float maximum[kPolicy.warps][kShortBlockRows];
    float weight[kPolicy.warps][kShortBlockRows];
    float sum[kPolicy.warps][kShortBlockRows];
    float row_maximum[kShortBlockRows];
    float row_sum[kShortBlockRows];
  };
  static constexpr int kSharedBytes = kPolicy.shared_bytes + static_cast<int>(sizeof(State));

  __device__ ShortBlock(const ForwardParams& params, char* shared)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        state_(*reinterpret_cast<State*>(shared + kPolicy.shared_bytes)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        s_(state_.sequence),
        keys_(state_.keys),
        values_(state_.values) {}

  __device__ void Run(int64_t batch, int64_t kv_head, int64_t split, int64_t row_tile) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(problem_, batch, &status);
    if (threadIdx.x == 0 && status != 0 && kv_head == 0 && split == 0 && row_tile == 0 &&
        problem_.device_status != nullptr) {
      atomicOr(problem_.device_status, status);
    }
    if (!IsShort(problem_, s)) return;
    split_ = split;
    splits_ = SplitCount(s);
    first_key_ = split * SplitKeys(s);
    end_key_ = core::Min<int64_t>(first_key_ + SplitKeys(s), core::LocalKeys(s));
    rows_ = {static_cast<int32_t>(row_tile * kShortBlockRows), static_cast<int32_t>(problem_.group),
             kv_head * problem_.group};
    const int64_t rows_here =
        core::Min<int64_t>(s.q_rows, MaxShortRows(problem_.group)) * problem_.group;
    row_count_ =
        static_cast<int>(core::Clamp<int64_t>(rows_here - rows_.first, 0, kShortBlockRows));
    if (row_count_ == 0 || split >= core::Max<int64_t>(splits_, 1)) return;
    if (threadIdx.x == 0) {
      state_.sequence = s;
      state_.keys = MakeRowSource<kDType>(problem_.k, core::KeyOffset(problem_.k, s, kv_head, 0),
                                          problem_.qk_dim);
      state_.values = MakeRowSource<kDType>(problem_.v, core::KeyOffset(problem_.v, s, kv_head, 0),
                                            problem_.v_dim);
      state_.query_flags = 0;
    }
    __syncthreads();
    OpenSplit();
    attention_.Reset();
    VisitSplit();
    MergeWarps();
    WriteRows();
  }

 private:
  static constexpr int kPlanes = Planes(kDType);
  static constexpr bool kIsF32 = kDType == DType::kF32;
  static constexpr int kTilePlaneBytes = kPolicy.tile_bytes / kPlanes;
  static constexpr int kQueryPlaneBytes = kPolicy.query_bytes / kPlanes;
  static_assert(kPolicy.warps * kShortBlockRows * kHeadDim * 4 <=
                    kPolicy.shared_bytes - kPolicy.query_bytes,
                "the warps' outputs take the place of the tiles");

  // ---- setup ----

  __device__ __forceinline__ const char* QueryRow(int n) const {
    return static_cast<const char*>(problem_.q.data) +
           core::QueryOffset(problem_.q, s_, rows_.Head(n), rows_.Row(n)) * kElementBytes<kDType>;
  }

  // Rows of different heads are not equally far apart, so each chunk finds its own row.
  __device__ __forceinline__ void StageQuery() {
    constexpr int kChunks = kHeadDim / 8;
    for (int c = threadIdx.x; c < kShortBlockRows * kChunks; c += kPolicy.threads) {
      const int n = c / kChunks;
      const int column = c % kChunks * 8;
      const int count = n < row_count_
                            ? static_cast<int>(core::Clamp<int64_t>(problem_.qk_dim - column, 0, 8))
                            : 0;
      const char* row = count > 0 ? QueryRow(n) : nullptr;
      char* target = shared_ + ChunkOffset<kHeadDim>(n, c % kChunks);
      if constexpr (kIsF32) {
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[e] =
              e < count ? LoadElement(row, kDType, (column + e) * problem_.q.column_stride) : 0.0f;
        }
        SplitChunk<TileUse::kScores>(x, target, kQueryPlaneBytes, &state_.query_flags, n);
      } else {
        const uint32_t sign = problem_.scale < 0.0f ? 0x8000u : 0u;
        const char* chunk = row + column * 2;
        if (count == 8 && problem_.q.column_stride == 1 &&
            reinterpret_cast<uintptr_t>(chunk) % 16 == 0) {
          const uint4 x = *reinterpret_cast<const uint4*>(chunk);
          const uint32_t signs = sign * 0x10001u;
          StoreChunk(target, x.x ^ signs, x.y ^ signs, x.z ^ signs, x.w ^ signs);
          continue;
        }
        uint32_t x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[e] = e < count ? reinterpret_cast<const uint16_t*>(
                                 row)[(column + e) * problem_.q.column_stride] ^
                                 sign
                           : 0u;
        }
        StoreChunk(target, x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16,
                   x[6] | x[7] << 16);
      }
    }
    __syncthreads();
  }

  // ---- a split ----

  __device__ __forceinline__ int64_t StepKey(int step) const {
    return first_key_ + step * kStepKeys + 16 * warp_;
  }

  // The class of 16 keys for all rows and heads of the block.
  __device__ __forceinline__ core::TileClass Classify(int64_t first_key) const {
    const int64_t keys_end = core::Min<int64_t>(first_key + 16, end_key_);
    if (keys_end <= first_key) return core::TileClass::kEmpty;
    const int64_t i_begin = rows_.Row(0);
    const int64_t i_end = rows_.Row(row_count_ - 1) + 1;
    if (!params_.has_mask_terms && i_end <= ExistingRows(s_)) {
      return keys_end < first_key + 16 ? core::TileClass::kPartial : core::TileClass::kFull;
    }
    const int64_t heads = core::MaskVariesByHead(problem_.mask) ? problem_.group : 1;
    core::TileClass result = core::TileClass::kPartial;
    for (int64_t h = 0; h < heads; ++h) {
      const core::TileClass one = core::ClassifyTile(problem_.mask, s_, rows_.head + h, i_begin,
                                                     i_end, first_key, keys_end);
      result = h == 0 ? one : core::CombineParts(result, one);
    }
    return result == core::TileClass::kFull && keys_end < first_key + 16 ? core::TileClass::kPartial
                                                                         : result;
  }

  __device__ __forceinline__ char* Tile(int stage, bool is_value) const {
    return shared_ + kPolicy.query_bytes +
           ((warp_ * kPolicy.stages + stage) * 2 + (is_value ? 1 : 0)) * kPolicy.tile_bytes;
  }

  __device__ __forceinline__ void StartLoads(int step, int stage) {
    const int64_t keys = core::LocalKeys(s_);
    if constexpr (!kIsF32) {
      if (params_.has_chunks && !problem_.has_block_table) {
        const uint32_t target = Column::Target(SharedAddress(Tile(stage, false)), lane_);
        CopyRows(target, key_chunk_, params_.key_steps, step);
        CopyRows(target + kPolicy.tile_bytes, value_chunk_, params_.value_steps, step);
        return;
      }
    } else {
      if (lane_ == 0) state_.key_flags[warp_] = state_.value_flags[warp_] = 0;
      __syncwarp();
    }
    if (problem_.has_block_table) {
      StagePagedElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kScores>(
          problem_, s_, KvHead(), StepKey(step), Tile(stage, false), &state_.key_flags[warp_],
          lane_);
      StagePagedElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kValues>(
          problem_, s_, KvHead(), StepKey(step), Tile(stage, true), &state_.value_flags[warp_],
          lane_);
      return;
    }
    StageElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kScores>(
        keys_, StepKey(step), keys, Tile(stage, false), &state_.key_flags[warp_], lane_);
    StageElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kValues>(
        values_, StepKey(step), keys, Tile(stage, true), &state_.value_flags[warp_], lane_);
  }
  __device__ __forceinline__ int64_t KvHead() const { return rows_.head / problem_.group; }

  __device__ __forceinline__ void CopyRows(uint32_t target, const char* from,
                                           const CopySteps& steps, int step) const {
    if (from == nullptr) return;
    from += static_cast<int64_t>(static_cast<uint32_t>(step)) * steps.step;
    if (step < whole_steps_) {
      Column::CopyWhole(target, from, steps.pass);
    } else {
      Column::CopyCut(target, from, steps.pass, core::LocalKeys(s_) - StepKey(step), lane_);
    }
  }

  __device__ __forceinline__ void OpenSplit() {
    if constexpr (!kIsF32) {
      const int64_t first_key = StepKey(0);
      const int64_t key_bytes = problem_.k.row_stride * 2;
      const int64_t value_bytes = problem_.v.row_stride * 2;
      key_chunk_ =
          Column::Source(keys_.base + first_key * key_bytes, key_bytes, problem_.qk_dim, lane_);
      value_chunk_ = Column::Source(values_.base + first_key * value_bytes, value_bytes,
                                    problem_.v_dim, lane_);
      whole_steps_ = static_cast<int>(
          core::Clamp<int64_t>(core::LocalKeys(s_) - first_key + kStepKeys - 16, 0, INT32_MAX) /
          kStepKeys);
      for (int stage = 0; stage < kPolicy.stages; ++stage) {
        Column::ClearBeyond(Tile(stage, false), problem_.qk_dim, lane_);
        Column::ClearBeyond(Tile(stage, true), problem_.v_dim, lane_);
      }
    }
  }

  // Finds the steps to visit among 32, one per lane, and starts the first loads.
  __device__ __forceinline__ void OpenSteps(int first_step) {
    const core::TileClass mine = Classify(StepKey(first_step + lane_));
    listed_ = __ballot_sync(~0u, mine != core::TileClass::kEmpty);
    partial_ = __ballot_sync(~0u, mine == core::TileClass::kPartial);
    waiting_ = listed_;
#pragma unroll
    for (int stage = 0; stage + 1 < kPolicy.stages; ++stage) StartNextLoad(first_step, stage);
  }

  __device__ __forceinline__ void VisitSplit() {
    const int steps = static_cast<int>(core::CeilDiv<int64_t>(end_key_ - first_key_, kStepKeys));
    for (int first_step = 0; first_step < steps; first_step += kWarpSize) {
      OpenSteps(first_step);
      if (first_step == 0) StageQuery();
      VisitSteps(first_step);
    }
  }

  // One group of copies, empty where no step waits to be loaded.
  __device__ __forceinline__ void StartNextLoad(int first_step, int stage) {
    if (waiting_ != 0) {
      StartLoads(first_step + __ffs(waiting_) - 1, stage);
      waiting_ &= waiting_ - 1;
    }
    CommitCopies();
  }

  __device__ __forceinline__ void VisitSteps(int first_step) {
    int stage = 0;
    for (uint32_t listed = listed_; listed != 0; listed &= listed - 1) {
      const int n = __ffs(listed) - 1;
      StartNextLoad(first_step, stage == 0 ? kPolicy.stages - 1 : stage - 1);
      WaitCopies<kPolicy.stages - 1>();
      __syncwarp();
      VisitTile(StepKey(first_step + n), stage, ((partial_ >> n) & 1u) != 0);
      __syncwarp();
      stage = stage + 1 == kPolicy.stages ? 0 : stage + 1;
    }
  }

  // Bits of 16 keys for this lane's two rows.
  __device__ __forceinline__ void LoadBits(int64_t first_key, bool is_partial,
                                           typename Warp::Bits& bits) const {
    uint32_t word = 0xffffu;
    if (is_partial && lane_ < row_count_) {
      word = static_cast<uint32_t>(
          WordOfAllTerms(problem_.mask, s_, rows_.Head(lane_), rows_.Row(lane_), first_key));
    }
    if (lane_ >= row_count_) word = 0;
    bits[0] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = __shfl_sync(~0u, word, Warp::LaneRow(0, r)) >> (2 * (lane_ & 3));
      bits[0] |= ((row & 3u) | (row >> 8 & 3u) << 2) << (16 * r);
    }
  }

  __device__ __forceinline__ void VisitTile(int64_t first_key, int stage, bool is_partial) {
    typename Warp::Scores scores;
    typename Warp::Bits bits;
    const uint32_t query = SharedAddress(shared_) + Warp::RowMajorOffset(lane_);
    const uint32_t keys = SharedAddress(Tile(stage, false)) + Warp::KeyOffset(lane_);
    const typename Warp::QueryFragments none = {};
    Warp::template MultiplyQueryKey<false>(query, kQueryPlaneBytes, none, keys, kTilePlaneBytes,
                                           scores);
    LoadBits(first_key, is_partial, bits);
    if constexpr (kIsF32) ReplaceOverflowingScores(scores, first_key, bits);
    Warp::FinishScores(problem_, s_, rows_, first_key,
                       kIsF32 ? problem_.scale : fabsf(problem_.scale), scores,
                       [&](typename Warp::Scores& products, float factor) {
                         AddBias(products, factor, first_key, bits);
                       });
    Warp::HideScores(scores, bits);
    attention_.UpdateSoftmax(scores, ScaleBy(1.0f));
    if (problem_.dropout.enabled != 0) {
      Warp::DropPairs(problem_, s_, rows_, first_key, scores, bits);
    }
    typename Warp::Probabilities packed;
    Warp::PackProbabilities(scores, packed);
    // Where every pair is visible, NaN and infinity in V belong in the product.
    const bool hides_pairs =
        is_partial || problem_.dropout.enabled != 0 || problem_.bias.data != nullptr;
    char* const tile = Tile(stage, true);
    const uint32_t values = SharedAddress(tile) + Warp::RowMajorOffset(lane_);
    bool has_taken_out = false;
    if constexpr (kIsF32) {
      const uint64_t taken_out = state_.value_flags[warp_];
      attention_.AddTakenOutValues(packed, bits, taken_out, values_, [&](int key) {
        return static_cast<const char*>(problem_.v.data) +
               core::KeyRowOffset(problem_, problem_.v, s_, KvHead(), first_key + key) *
                   kElementBytes<kDType>;
      });
    } else if (hides_pairs) {
      has_taken_out =
          __any_sync(~0u, TakeOutNonFinite<kDType, kHeadDim, 16, kWarpSize>(tile, lane_));
      __syncwarp();  // a vote does not order memory
    }
    attention_.MultiplyProbabilityValue(packed, values, kTilePlaneBytes);
    if constexpr (!kIsF32) {
      if (!has_taken_out) return;
      __syncwarp();
      if (problem_.has_block_table) {
        StagePagedElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kValues>(
            problem_, s_, KvHead(), first_key, tile, nullptr, lane_);
      } else {
        StageElements<kDType, kHeadDim, 16, kWarpSize, TileUse::kValues>(
            values_, first_key, core::LocalKeys(s_), tile, nullptr, lane_);
      }
      CommitCopies();
      WaitCopies<0>();
      __syncwarp();
      KeepNonFiniteAsOnes<kDType, kHeadDim, 16, kWarpSize>(tile, lane_);
      __syncwarp();
      attention_.MarkNonFinite(bits, values);
    }
  }

  // Bias at visible pairs only; -inf hides a pair whatever its score.
  __device__ __forceinline__ void AddBias(typename Warp::Scores& scores, float factor,
                                          int64_t first_key, typename Warp::Bits& bits) const {
    const Array4& bias = problem_.bias;
    Warp::ForEachScore(scores, [&](float& score, int m, int r, int key, uint32_t bit) {
      if ((bits[m] & bit) == 0) return;
      const int n = Warp::LaneRow(m, r);
      const float value =
          LoadElement(bias.data, bias.dtype,
                      core::BiasOffset(bias, s_, rows_.Head(n), s_.q_offset + rows_.Row(n),
                                       s_.kv_offset + first_key + key));
      score = fmaf(score, factor, value);
      if (value == core::NegativeInfinity()) bits[m] &= ~bit;
    });
  }

  // Scores of f32 rows and keys that the split cannot serve, from device memory.
  __device__ __forceinline__ void ReplaceOverflowingScores(typename Warp::Scores& scores,
                                                           int64_t first_key,
                                                           const typename Warp::Bits& bits) {
    const uint64_t key_flags = state_.key_flags[warp_];
    if ((state_.query_flags | key_flags) == 0) return;
    Warp::ForEachScore(scores, [&](float& score, int m, int r, int key, uint32_t bit) {
      const int n = Warp::LaneRow(m, r);
      if ((bits[m] & bit) == 0 || (((state_.query_flags >> n) | (key_flags >> key)) & 1u) == 0) {
        return;
      }
      score = PlainProduct(problem_, s_, rows_.Head(n), rows_.Row(n), first_key + key);
    });
  }

  // ---- results ----

  __device__ __forceinline__ float* WarpOutput(int warp, int n) const {
    return reinterpret_cast<float*>(shared_ + kPolicy.query_bytes) +
           (warp * kShortBlockRows + n) * kHeadDim;
  }

  // The warps' results, in their order, as those of one running softmax.
  __device__ __forceinline__ void MergeWarps() {
    attention_.FinishSums();
    WaitCopies<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r >= row_count_) break;
      const int n = Warp::LaneRow(0, r);
      if ((lane_ & 3) == 0) {
        state_.maximum[warp_][n] = attention_.maximum[0][r];
        state_.sum[warp_][n] = attention_.sum[0][r];
      }
      float* row = WarpOutput(warp_, n);
#pragma unroll
      for (int t = 0; t < kHeadDim / 8; ++t) {
        *reinterpret_cast<float2*>(row + 8 * t + 2 * (lane_ & 3)) =
            make_float2(attention_.output[0][t][2 * r], attention_.output[0][t][2 * r + 1]);
      }
    }
    __syncthreads();
    if (threadIdx.x < row_count_) {
      const int n = threadIdx.x;
      float maximum = core::NegativeInfinity();
      for (int w = 0; w < kPolicy.warps; ++w) {
        maximum = core::MaxKeepNan(maximum, state_.maximum[w][n]);
      }
      float sum = 0.0f;
      for (int w = 0; w < kPolicy.warps; ++w) {
        state_.weight[w][n] = core::SoftmaxRescale(state_.maximum[w][n], maximum);
        sum += state_.sum[w][n] * state_.weight[w][n];
      }
      state_.row_maximum[n] = maximum;
      state_.row_sum[n] = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ float MergedOutput(int n, int column) const {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kPolicy.warps; ++w) {
      value += WarpOutput(w, n)[column] * state_.weight[w][n];
    }
    return value;
  }

  __device__ __forceinline__ void WriteRows() {
    const PartialResults& partials = params_.partials;
    for (int n = warp_; n < row_count_; n += kPolicy.warps) {
      const int64_t head = rows_.Head(n);
      const int64_t row = rows_.Row(n);
      if (splits_ > 1) {
        const int64_t index =
            PartialIndex(partials, problem_.q_heads, s_.batch, head, row) + split_;
        for (int column = lane_; column < problem_.v_dim; column += kWarpSize) {
          partials.output[index * problem_.v_dim + column] = MergedOutput(n, column);
        }
        if (lane_ == 0) {
          partials.maximum[index] = state_.row_maximum[n];
          partials.sum[index] = state_.row_sum[n];
        }
        continue;
      }
      const RowEnd end =
          FinishRow(problem_, s_, head, row, state_.row_maximum[n], state_.row_sum[n]);
      for (int column = lane_; column < problem_.v_dim; column += kWarpSize) {
        StoreOutput(problem_, s_, head, row, column,
                    end.is_empty ? 0.0f : MergedOutput(n, column) * end.factor);
      }
      if (lane_ == 0) StoreLse(problem_, s_, head, row, end.Lse());
    }
  }

  const ForwardParams& params_;
  const Problem& problem_;
  char* const shared_;
  State& state_;
  const int warp_;
  const int lane_;
  const Sequence& s_;
  int64_t split_;
  int64_t splits_;     // of the sequence
  int64_t first_key_;  // of the split
  int64_t end_key_;
  WarpRows rows_;
  int row_count_;
  const RowSource& keys_;
  const RowSource& values_;
  const char* key_chunk_;  // what this lane copies, of the warp's first key
  const char* value_chunk_;
  uint32_t listed_;  // steps with something visible, and those of them with something hidden
  uint32_t partial_;
  int whole_steps_;   // before a step that the end of the keys cuts
  uint32_t waiting_;  // listed steps whose loads have not begun
  Warp attention_;
};

template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(ForwardShortPolicy(kDType, kHeadDim).threads,
                                  ForwardShortPolicy(kDType, kHeadDim).blocks_per_multiprocessor)
    ShortKernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(1024) char shared[];
  // The row tiles of a split lie side by side: they read the same keys. In 32 bits, where divisions
  // are short.
  const uint32_t row_tiles = static_cast<uint32_t>(params.row_blocks);
  const uint32_t splits = static_cast<uint32_t>(core::Max<int64_t>(params.partials.splits, 1));
  const uint32_t kv_heads = static_cast<uint32_t>(params.problem.kv_heads);
  const uint32_t row_tile = blockIdx.x % row_tiles;
  const uint32_t piece = blockIdx.x / row_tiles;
  const uint32_t split = piece % splits;
  const uint32_t head = piece / splits;
  AllowDependentLaunch();  // of the merge
  ShortBlock<kDType, kHeadDim> block(params, shared);
  block.Run(head / kv_heads, head % kv_heads, split, row_tile);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_SHORT_KERNEL_CUH_
