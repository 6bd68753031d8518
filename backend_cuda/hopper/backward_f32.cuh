// The backward kernel of sm_90a in f32's accuracy, over planes of three bf16 parts (an f32 is their
// sum): every product is six products of parts, all but those below the last bit of an f32. As in
// backward_kernel.cuh one side is kept and the other walked over,
//     S = A1 B1^T,  dP = A2 B2^T,  sum1 += dS B1,  sum2 += P B2,
// here 64 rows by steps of 32. Two warpgroups take the steps in turn, each with sums of its own,
// which are added up at the end; so one evaluates pairs while the other multiplies, and the order
// of every sum is fixed.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_CUH_

#include "backend_cuda/backward_terms.cuh"
#include "backend_cuda/hopper/backward_output.cuh"
#include "backend_cuda/hopper/backward_tiles.cuh"
#include "core/gradient.h"

namespace tandem::cuda::hopper {

inline constexpr int kF32Parts = 3;

struct F32BackwardPolicy {
  int stages;  // steps in shared memory; as many warps load
  int threads;
  int kept_plane_bytes;  // of one part of one of the two tensors
  int step_plane_bytes;
  int kept_bytes;  // of all parts of one of the two tensors
  int step_bytes;
};
constexpr F32BackwardPolicy MakeF32BackwardPolicy(int head_dim) {
  F32BackwardPolicy policy = {};
  policy.stages = head_dim <= 64 ? 4 : 2;
  policy.threads = 3 * kWarpgroupThreads;
  policy.kept_plane_bytes = kF32KeptRows * head_dim * 2;
  policy.step_plane_bytes = kF32StepRows * head_dim * 2;
  policy.kept_bytes = kF32Parts * policy.kept_plane_bytes;
  policy.step_bytes = kF32Parts * policy.step_plane_bytes;
  return policy;
}

// A step's tile: 32 rows of the side that is walked over, with StepTile's properties.
struct F32StepTile {
  uint32_t properties;
  int32_t first_row;
  uint32_t head;  // of the queries
};

template <int kHeadDim, GradientSide kSide>
struct alignas(16) F32GradientState {
  static constexpr F32BackwardPolicy kPolicy = MakeF32BackwardPolicy(kHeadDim);
  static constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  static constexpr int kOffset = 2 * kPolicy.kept_bytes + 2 * kPolicy.stages * kPolicy.step_bytes;
  static constexpr int kWords = kKeepsKeys ? kF32StepRows : kF32KeptRows;

  // Of the rows of a step, where those are of Q, at StatisticsPlace.
  float lse[kPolicy.stages][kKeepsKeys ? kF32StepRows : 4];
  float offset[kPolicy.stages][kKeepsKeys ? kF32StepRows : 4];
  // Of each query, the 64 keys around those of the tile that it sees, in quad order; where pairs
  // are hidden.
  uint64_t words[kPolicy.stages][kWords];
  F32StepTile tiles[kPolicy.stages];
  uint64_t full[kPolicy.stages];
  uint64_t empty[kPolicy.stages];
  uint64_t kept_full;
  KeptBlock block;
};
template <int kHeadDim, GradientSide kSide>
inline constexpr int kF32GradientSharedBytes =
    F32GradientState<kHeadDim, kSide>::kOffset +
    static_cast<int>(sizeof(F32GradientState<kHeadDim, kSide>));

// ---- loading ----

// kEveryMask: not only lengths, bands and dense masks.
template <int kHeadDim, GradientSide kSide, bool kEveryMask>
class F32GradientLoader {
 public:
  using State = F32GradientState<kHeadDim, kSide>;
  static constexpr F32BackwardPolicy kPolicy = State::kPolicy;
  static constexpr bool kKeepsKeys = State::kKeepsKeys;

  __device__ F32GradientLoader(const GradientParams& params, uint32_t shared, State& state)
      : params_(params),
        base_(params.base),
        problem_(params.base.problem),
        shared_(shared),
        state_(state),
        s_(state.block.sequence),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_(static_cast<int>(state.block.first_row)),
        existing_(ExistingRows(s_)) {}

  __device__ void Run() {
    if (warp_ >= kPolicy.stages) return;
    const int64_t head = state_.block.head;
    if (threadIdx.x == 0) {
      const uint32_t barrier = SharedAddress(&state_.kept_full);
      const int64_t row =
          kKeepsKeys ? KeyPlaneRow(base_, s_, head) : QueryPlaneRow(base_, s_, head);
      ArriveExpecting(barrier, 2 * kPolicy.kept_bytes);
#pragma unroll 1
      for (int half = 0; half < kF32KeptRows; half += kF32StepRows) {
        Load<kF32KeptRows>(shared_ + half * 128, kKeepsKeys ? params_.keys : params_.queries,
                           kPolicy.kept_bytes, barrier, static_cast<int>(row) + first_ + half);
      }
    }
    if (kKeepsKeys) {
      has_kept_flags_ = HasKeyFlags(head, first_);
#pragma unroll 1
      for (int64_t n = 0; n < problem_.group; ++n) ListHead(head * problem_.group + n, head);
    } else {
      has_kept_flags_ = HasQueryFlags(head, first_);
      ListHead(head, head / problem_.group);
    }
    // One for each warpgroup.
#pragma unroll 1
    for (int n = 0; n < 2; ++n, ++steps_) {
      if (!IsMine()) continue;
      const uint32_t full = WaitForStage();
      if (lane_ == 0) {
        state_.tiles[steps_ % kPolicy.stages] = {StepTile::kEnd, 0, 0};
        Arrive(full);
      }
      Arrive(full);
    }
  }

 private:
  __device__ __forceinline__ HeadRows RowsOf(int64_t head) const {
    return {s_, head, query_row_, existing_};
  }

  __device__ __forceinline__ void ListHead(int64_t head, int64_t kv_head) {
    query_row_ = static_cast<int>(QueryPlaneRow(base_, s_, head));
    key_row_ = static_cast<int>(KeyPlaneRow(base_, s_, kv_head));
    int begin = 0;
    int end = existing_;
    if (!kKeepsKeys) {
      FindSteps<kEveryMask, kF32StepRows>(base_, RowsOf(head), first_, kF32KeptRows, begin, end);
    }
    end = core::CeilDiv(end, kF32StepRows);
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWarpSize) {
      uint32_t mine =
          tile + lane_ < end ? Properties(head, kv_head, (tile + lane_) * kF32StepRows) : kNoTile;
      if (kEveryMask && HasSegments(base_)) {
        mine = WithSegments<kKeepsKeys, kF32StepRows>(base_, s_, {first_, first_ + kF32KeptRows},
                                                      tile, mine, lane_);
      }
#pragma unroll 1
      for (uint32_t left = __ballot_sync(~0u, mine != kNoTile); left != 0; left &= left - 1) {
        const int n = __ffs(static_cast<int>(left)) - 1;
        const uint32_t properties = __shfl_sync(~0u, mine, n);
        if (IsMine()) {
          Announce({properties, (tile + n) * kF32StepRows, static_cast<uint32_t>(head)});
        }
        ++steps_;
      }
    }
  }

  // Of a tile with visible pairs; else kNoTile.
  __device__ __forceinline__ uint32_t Properties(int64_t head, int64_t kv_head, int other) const {
    constexpr int kRows = kKeepsKeys ? kF32StepRows : kF32KeptRows;
    constexpr int kKeys = kKeepsKeys ? kF32KeptRows : kF32StepRows;
    const int row = kKeepsKeys ? other : first_;
    const int key = kKeepsKeys ? first_ : other;
    uint32_t properties = HidingParts<kEveryMask>(base_, RowsOf(head), row, kRows, key, kKeys);
    if (properties == kNoTile) return kNoTile;
    if (has_kept_flags_ || (kKeepsKeys ? HasQueryFlags(head, row) : HasKeyFlags(kv_head, key))) {
      properties |= StepTile::kFlagged;
      if (row + kRows > existing_) properties |= StepTile::kStructuredPart;
    }
    return properties;
  }
  __device__ __forceinline__ bool HasKeyFlags(int64_t kv_head, int key) const {
    const int64_t word = KeyFlagWord(base_, s_, kv_head, key);
    return (base_.keys.first_flags[word] | base_.keys.second_flags[word]) != 0;
  }
  __device__ __forceinline__ bool HasQueryFlags(int64_t head, int row) const {
    const int64_t word = QueryFlagWord(base_, s_, head, row);
    return (base_.queries.first_flags[word] | base_.queries.second_flags[word]) != 0;
  }

  __device__ __forceinline__ bool IsMine() const {
    return steps_ % kPolicy.stages == static_cast<uint32_t>(warp_);
  }
  // Waits until the next step's stage is empty.
  __device__ __forceinline__ uint32_t WaitForStage() const {
    const uint32_t stage = steps_ % kPolicy.stages;
    Wait(SharedAddress(&state_.empty[stage]), (steps_ / kPolicy.stages & 1) ^ 1);
    return SharedAddress(&state_.full[stage]);
  }

  __device__ __forceinline__ void Announce(const F32StepTile& tile) {
    const uint32_t stage = steps_ % kPolicy.stages;
    const uint32_t full = WaitForStage();
    const int row = (kKeepsKeys ? query_row_ : key_row_) + tile.first_row;
    if (lane_ == 0) {
      state_.tiles[stage] = tile;
      ArriveExpecting(full, 2 * kPolicy.step_bytes);
      Load<kF32StepRows>(shared_ + 2 * kPolicy.kept_bytes + stage * 2 * kPolicy.step_bytes,
                         kKeepsKeys ? params_.queries : params_.keys, kPolicy.step_bytes, full,
                         row);
    }
    if (kKeepsKeys) {
      const RowStatistics statistics = base_.statistics[row + lane_];
      state_.lse[stage][StatisticsPlace(lane_)] = statistics.lse;
      state_.offset[stage][StatisticsPlace(lane_)] = statistics.offset;
    }
    if ((tile.properties & (StepTile::kStructuredPart | StepTile::kDensePart)) != 0) {
      const int query = kKeepsKeys ? tile.first_row : first_;
      const int key = kKeepsKeys ? first_ : tile.first_row / core::kTile * core::kTile;
#pragma unroll
      for (int n = lane_; n < State::kWords; n += kWarpSize) {
        uint64_t word =
            RowWord<kEveryMask>(base_, RowsOf(tile.head), tile.properties, query + n, key);
        if (kEveryMask && HasSegments(base_)) word &= SegmentWord(base_, s_, query + n, key, lane_);
        state_.words[stage][n] = word;
      }
    }
    Arrive(full);
  }

  // 32 rows of the parts of both tensors of a side, into tiles of `kTileRows` rows.
  template <int kTileRows>
  __device__ __forceinline__ void Load(uint32_t target, const PlaneMaps& maps, int second_offset,
                                       uint32_t barrier, int row) const {
#pragma unroll 1
    for (int part = 0; part < kF32Parts * kHeadDim / 64; ++part) {
      CopyBox(target + part * kTileRows * 128, &maps.first, barrier, 64 * part, row, 0, 0);
      CopyBox(target + second_offset + part * kTileRows * 128, &maps.second, barrier, 64 * part,
              row, 0, 0);
    }
  }

  const GradientParams& params_;
  const BackwardParams& base_;
  const Problem& problem_;
  const uint32_t shared_;
  State& state_;
  const Sequence& s_;
  const int warp_;
  const int lane_;
  const int first_;     // row that is kept
  const int existing_;  // rows of Q
  int query_row_ = 0;   // of the planes, for local row 0 of the head at work
  int key_row_ = 0;
  bool has_kept_flags_ = false;
  uint32_t steps_ = 0;  // announced
};

// ---- multiplying ----

// As GradientWarpgroup, with steps of 32 rows.
template <int kHeadDim, GradientSide kSide>
class F32GradientWarpgroup {
 public:
  using State = F32GradientState<kHeadDim, kSide>;
  static constexpr F32BackwardPolicy kPolicy = State::kPolicy;
  static constexpr bool kKeepsKeys = State::kKeepsKeys;

  __device__ F32GradientWarpgroup(const GradientParams& params, uint32_t shared, State& state,
                                  int warpgroup)
      : base_(params.base),
        problem_(params.base.problem),
        shared_(shared),
        state_(state),
        block_(state.block),
        warpgroup_(warpgroup),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_warp_row_(16 * (static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize)) {}

  __device__ void Run() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) first_sum_[i] = 0.0f;
    if constexpr (kKeepsKeys) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) second_sum_[i] = 0.0f;
    }
    Wait(SharedAddress(&state_.kept_full), 0);
    if constexpr (!kKeepsKeys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowStatistics statistics =
            base_.statistics[QueryPlaneRow(base_, block_.sequence, block_.head) + block_.first_row +
                             first_warp_row_ + lane_ / 4 + 8 * r];
        lse_[r] = statistics.lse;
        offset_[r] = statistics.offset;
      }
    }
#pragma unroll 1
    for (uint32_t step = warpgroup_;; step += 2) {
      const uint32_t stage = __shfl_sync(~0u, step, 0) % kPolicy.stages;
      Wait(SharedAddress(&state_.full[stage]), step / kPolicy.stages & 1);
      const uint32_t properties = __shfl_sync(~0u, state_.tiles[stage].properties, 0);
      if ((properties & StepTile::kEnd) != 0) break;
      Visit(stage, properties);
      Arrive(SharedAddress(&state_.empty[stage]));
    }
    AddUp();
  }

 private:
  static constexpr int kTiles = kF32StepRows / 8;
  static constexpr int kElements = kF32StepRows / 2;
  static constexpr DType kPart = DType::kBF16;
  // Products are added up by cutting bits off, which a sum over many of them does not stand: it is
  // over steps that add_f32 rounds. So many columns of an addend have registers.
  static constexpr int kAddendColumns = kHeadDim > 64 && !kKeepsKeys ? 128 : 64;
  using Products = float[kElements];
  using Fragments = uint32_t[kF32Parts][kF32StepRows / 16][4];

  // Which parts of both operands are multiplied, the smallest products first.
  static constexpr int kTerms = 6;
  static __device__ constexpr int FirstPart(int term) {
    constexpr int kFirst[kTerms] = {2, 1, 0, 1, 0, 0};
    return kFirst[term];
  }
  static __device__ constexpr int SecondPart(int term) {
    constexpr int kSecond[kTerms] = {0, 1, 2, 0, 1, 0};
    return kSecond[term];
  }

  __device__ __forceinline__ void StartScores(Products& product, uint32_t kept, uint32_t step) {
    FenceProducts();
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const uint32_t a = KeyTile(kept + FirstPart(term) * kPolicy.kept_plane_bytes);
      const uint32_t b = KeyTile(step + SecondPart(term) * kPolicy.step_plane_bytes);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const uint32_t row = a + k / 4 * (kF32KeptRows * 128 >> 4) + k % 4 * 2;
        const uint32_t tile = b + k / 4 * (kF32StepRows * 128 >> 4) + k % 4 * 2;
        if (term == 0 && k == 0) {
          BeginScores<kPart>(product, row, tile);
        } else {
          AddScores<kPart>(product, row, tile);
        }
      }
    }
    CommitProducts();
  }

  // 64 or 128 columns of the product of parts with a step's rows, from zero.
  __device__ __forceinline__ void StartAddend(const Fragments& parts, uint32_t step, int column) {
    FenceProducts();
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const uint32_t tile =
          ValueTile(step + SecondPart(term) * kPolicy.step_plane_bytes, kF32StepRows) +
          column / 64 * (kF32StepRows * 128 >> 4);
#pragma unroll
      for (int k = 0; k < kF32StepRows / 16; ++k) {
        const uint32_t rows = tile + k * (16 * 128 >> 4);
        if (term == 0 && k == 0) {
          BeginValues<kPart>(addend_, parts[FirstPart(term)][k], rows);
        } else {
          AddValues<kPart>(addend_, parts[FirstPart(term)][k], rows);
        }
      }
    }
    CommitProducts();
  }
  // sum += that product, of which the first columns were begun.
  __device__ __forceinline__ void FinishSum(float (&sum)[kHeadDim / 2], const Fragments& parts,
                                            uint32_t step) {
#pragma unroll
    for (int column = 0; column < kHeadDim; column += kAddendColumns) {
      if (column > 0) StartAddend(parts, step, column);
      WaitProducts<0>(addend_);
#pragma unroll
      for (int i = 0; i < kAddendColumns / 2; ++i) sum[column / 2 + i] += addend_[i];
    }
  }

  static __device__ __forceinline__ void Split(const Products& x, Fragments& parts) {
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      uint32_t part[kF32Parts];
      SplitPair<kPart>(x[2 * i], x[2 * i + 1], part);
#pragma unroll
      for (int n = 0; n < kF32Parts; ++n) parts[n][i / 4][i % 4] = part[n];
    }
  }

  __device__ __forceinline__ void Visit(uint32_t stage, uint32_t properties) {
    const uint32_t step = shared_ + 2 * kPolicy.kept_bytes + stage * (2 * kPolicy.step_bytes);
    StartScores(scores_, shared_, step);
    StartScores(value_products_, shared_ + kPolicy.kept_bytes, step + kPolicy.step_bytes);
    LoadStatistics(stage);
    const bool is_hidden = (properties & (StepTile::kStructuredPart | StepTile::kDensePart)) != 0;
    const uint32_t bits = is_hidden ? LoadBits(stage) : ~0u;
    if ((properties & StepTile::kFlagged) != 0) {
      WaitProducts<0>(scores_);
      Pin(value_products_);
      Patch(stage);
    }
    WaitProducts<1>(scores_);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float x = MinKeepNan(fmaf(scores_[i], base_.unit, -Of(lse_, i)), 0.0f);
      scores_[i] = IsVisible(bits, i) ? expf(x) : 0.0f;
    }
    if constexpr (kKeepsKeys) {
      Split(scores_, probabilities_);
      StartAddend(probabilities_, step + kPolicy.step_bytes, 0);
      WaitProducts<1>(value_products_);
    } else {
      WaitProducts<0>(value_products_);
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float gradient = core::ScoreGradient(scores_[i], value_products_[i], Of(offset_, i));
      value_products_[i] = IsVisible(bits, i) ? gradient : 0.0f;
    }
    if constexpr (kKeepsKeys) {
      FinishSum(second_sum_, probabilities_, step + kPolicy.step_bytes);
    }
    Split(value_products_, gradients_);
    StartAddend(gradients_, step, 0);
    FinishSum(first_sum_, gradients_, step);
  }

  // ---- pairs ----

  // Of the lane's rows of the step, or of those it keeps.
  using Statistics = float[kKeepsKeys ? kF32StepRows / 4 : 2];
  static __device__ __forceinline__ float Of(const Statistics& statistics, int i) {
    return statistics[kKeepsKeys ? i / 4 * 2 + i % 2 : i / 2 % 2];
  }
  __device__ __forceinline__ void LoadStatistics(uint32_t stage) {
    if constexpr (kKeepsKeys) {
#pragma unroll
      for (int n = 0; n < kF32StepRows / 4; n += 4) {
        const int place = 4 * (n + (lane_ & 3));
        *reinterpret_cast<float4*>(&lse_[n]) =
            *reinterpret_cast<const float4*>(&state_.lse[stage][place]);
        *reinterpret_cast<float4*>(&offset_[n]) =
            *reinterpret_cast<const float4*>(&state_.offset[stage][place]);
      }
    }
  }

  // Bit i: the pair of element i is visible.
  static __device__ __forceinline__ bool IsVisible(uint32_t bits, int i) {
    return (bits >> i & 1u) != 0;
  }
  __device__ __forceinline__ uint32_t LoadBits(uint32_t stage) const {
    const uint64_t* const words = state_.words[stage];
    const int g = lane_ / 4;
    const int c = lane_ % 4;
    uint32_t bits = 0;
    if constexpr (kKeepsKeys) {
      // Keys g and g + 8 of the warp's are bits b and b + 2 of lane g / 2's 16.
      const int bit = 16 * (g / 2) + first_warp_row_ / 4 + g % 2;
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n) {
        const auto keys = static_cast<uint32_t>(words[8 * (n / 2) + 2 * c + n % 2] >> bit);
        bits |= (keys & 1u) << (4 * (n / 2) + n % 2) | (keys >> 2 & 1u)
                                                           << (4 * (n / 2) + 2 + n % 2);
      }
    } else {
      const int half = state_.tiles[stage].first_row / kF32StepRows % 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto keys =
            static_cast<uint32_t>(words[first_warp_row_ + g + 8 * r] >> (16 * c + 8 * half));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          bits |= (keys >> (2 * t) & 3u) << (4 * t + 2 * r);
        }
      }
    }
    return bits;
  }

  // Pairs of which a row or a key has elements that do not split: their products from the tensors,
  // in plain f32. No call, which would keep the products from running on their own.
  __device__ __forceinline__ void Patch(uint32_t stage) {
    const F32StepTile& tile = state_.tiles[stage];
    const Sequence& s = block_.sequence;
    const int64_t kept = block_.first_row + first_warp_row_ + lane_ / 4;
    const int64_t other = tile.first_row + 2 * (lane_ & 3);
    const int64_t kv_head = tile.head / problem_.group;
    float memory[2][kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      memory[0][i] = scores_[i];
      memory[1][i] = value_products_[i];
    }
#pragma unroll 1
    for (int i = 0; i < kElements; ++i) {
      const int64_t kept_row = kept + 8 * (i / 2 % 2);
      const int64_t other_row = other + 8 * (i / 4) + i % 2;
      const int64_t row = kKeepsKeys ? other_row : kept_row;
      const int64_t key = kKeepsKeys ? kept_row : other_row;
      if (row >= s.q_rows || key >= core::LocalKeys(s)) continue;
      const int64_t query_word = QueryFlagWord(base_, s, tile.head, row);
      const int64_t key_word = KeyFlagWord(base_, s, kv_head, key);
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const bool is_flagged =
            HasFlag(n == 0 ? base_.queries.first_flags : base_.queries.second_flags, query_word,
                    row) ||
            HasFlag(n == 0 ? base_.keys.first_flags : base_.keys.second_flags, key_word, key);
        if (!is_flagged) continue;
        const core::Array4& a = n == 0 ? problem_.q : problem_.dout;
        const core::Array4& b = n == 0 ? problem_.k : problem_.v;
        const int64_t a_offset = core::QueryOffset(a, s, tile.head, row);
        const int64_t b_offset = core::KeyOffset(b, s, kv_head, key);
        const int64_t dim = n == 0 ? problem_.qk_dim : problem_.v_dim;
        float sum = 0.0f;
#pragma unroll 1
        for (int64_t d = 0; d < dim; ++d) {
          sum = fmaf(LoadElement(a.data, a.dtype, a_offset + d * a.column_stride),
                     LoadElement(b.data, b.dtype, b_offset + d * b.column_stride), sum);
        }
        memory[n][i] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      scores_[i] = memory[0][i];
      value_products_[i] = memory[1][i];
    }
  }

  // ---- results ----

  // The sums of both warpgroups: the first one takes the first sum, the second one dV.
  __device__ __forceinline__ void AddUp() {
    SyncThreads(1, 2 * kWarpgroupThreads);
    if (warpgroup_ == 1) Give(first_sum_, 0);
    if constexpr (kKeepsKeys) {
      if (warpgroup_ == 0) Give(second_sum_, kHeadDim / 2);
    }
    SyncThreads(1, 2 * kWarpgroupThreads);
    if (warpgroup_ == 0) {
      Take(first_sum_, 0);
      Write(kKeepsKeys ? problem_.dk : problem_.dq, problem_.qk_dim, problem_.scale, first_sum_);
    } else if constexpr (kKeepsKeys) {
      Take(second_sum_, kHeadDim / 2);
      Write(problem_.dv, problem_.v_dim, 1.0f, second_sum_);
    }
  }
  // Where this lane's element `index` of what is exchanged is.
  __device__ __forceinline__ float* Exchanged(int index) const {
    extern __shared__ __align__(1024) char shared[];
    return reinterpret_cast<float*>(shared) + index * kWarpgroupThreads +
           static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  }
  __device__ __forceinline__ void Give(const float (&sum)[kHeadDim / 2], int first) const {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) *Exchanged(first + i) = sum[i];
  }
  __device__ __forceinline__ void Take(float (&sum)[kHeadDim / 2], int first) const {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) sum[i] += *Exchanged(first + i);
  }
  static_assert((kKeepsKeys ? 2 : 1) * kHeadDim / 2 * kWarpgroupThreads * 4 <= State::kOffset);

  __device__ __forceinline__ void Write(const core::Array4& gradient, int64_t dim, float factor,
                                        const float (&sum)[kHeadDim / 2]) const {
    if (gradient.data == nullptr) return;
    const Sequence& s = block_.sequence;
    const int64_t row = block_.first_row + first_warp_row_ + lane_ / 4;
    const int64_t offset = kKeepsKeys ? core::KeyOffset(gradient, s, block_.head, row)
                                      : core::QueryOffset(gradient, s, block_.head, row);
    const int64_t rows = (kKeepsKeys ? s.kv_rows : s.q_rows) - row;
    if (gradient.dtype == DType::kF16) {
      WriteGradientRows<DType::kF16>(gradient, offset, rows, dim, factor, sum);
    } else {
      WriteGradientRows<DType::kBF16>(gradient, offset, rows, dim, factor, sum);
    }
  }

  const BackwardParams& base_;
  const Problem& problem_;
  const uint32_t shared_;  // address of the tiles
  State& state_;
  const KeptBlock& block_;
  const int warpgroup_;
  const int lane_;
  const int first_warp_row_;  // of the block's

  alignas(16) Statistics lse_;
  alignas(16) Statistics offset_;
  Products scores_;
  Products value_products_;
  Fragments probabilities_;
  Fragments gradients_;
  float addend_[kAddendColumns / 2];                 // of a sum, from one step
  float first_sum_[kHeadDim / 2];                    // dQ or dK
  float second_sum_[kKeepsKeys ? kHeadDim / 2 : 1];  // dV
};

template <int kHeadDim, GradientSide kSide, bool kEveryMask>
__global__ void __launch_bounds__(MakeF32BackwardPolicy(kHeadDim).threads, 1)
    HopperF32GradientKernel(const __grid_constant__ GradientParams params) {
  using State = F32GradientState<kHeadDim, kSide>;
  constexpr F32BackwardPolicy kPolicy = State::kPolicy;
  constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t address = SharedAddress(shared);
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  const KeptBlock block = MakeKeptBlock<kSide, kF32KeptRows>(params.base);
  AllowDependentLaunch();
  if (block.first_row >= (kKeepsKeys ? block.sequence.kv_rows : block.sequence.q_rows)) {
    if (blockIdx.x == 0) WaitForEarlierLaunch();
    return;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kPolicy.stages; ++stage) {
      // Once the copies are begun, and once words and statistics are written.
      // By each lane, as those of backward_loading.cuh.
      InitBarrier(SharedAddress(&state.full[stage]), 1 + kWarpSize);
      InitBarrier(SharedAddress(&state.empty[stage]), kWarpgroupThreads);
    }
    InitBarrier(SharedAddress(&state.kept_full), 1);
    PublishBarriers();
    state.block = block;
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<24>();
    F32GradientLoader<kHeadDim, kSide, kEveryMask>(params, address, state).Run();
    if (blockIdx.x == 0) WaitForEarlierLaunch();
  } else {
    TakeRegisters<240>();
    F32GradientWarpgroup<kHeadDim, kSide>(params, address, state, warpgroup - 1).Run();
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_F32_CUH_
