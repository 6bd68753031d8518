// The warpgroup that finds out which tiles a block of the backward pass visits, has them loaded
// (TMA) and makes the bits of what is visible in them.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_

#include "backend_cuda/hopper/backward_params.h"
#include "backend_cuda/hopper/instructions.cuh"
#include "backend_cuda/tensor_core.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda::hopper {

using core::Problem;
using core::Sequence;

// A step's tile: 64 rows of the side that is walked over.
struct StepTile {
  uint32_t word;  // index << kPropertyBits | properties
  uint32_t head;  // of the queries

  static constexpr uint32_t kEnd = 1;             // there is no tile, nor another one
  static constexpr uint32_t kStructuredPart = 2;  // lengths and bands hide pairs
  static constexpr uint32_t kDensePart = 4;
  static constexpr uint32_t kFlagged = 8;  // it has elements that products cannot serve
  static constexpr int kPropertyBits = 4;

  __device__ __forceinline__ int FirstRow() const {
    return static_cast<int>(word >> kPropertyBits) * kStepRows;
  }
  __device__ __forceinline__ bool IsEnd() const { return (word & kEnd) != 0; }
  __device__ __forceinline__ bool IsHidden() const {
    return (word & (kStructuredPart | kDensePart)) != 0;
  }
  __device__ __forceinline__ bool IsFlagged() const { return (word & kFlagged) != 0; }
};

// What a block serves: kKeptRows rows of one head.
struct KeptBlock {
  Sequence sequence;
  int64_t head;  // of the queries, or of the keys where those are kept
  int64_t first_row;
};

// What the warps of a block share, after the tiles.
template <int kHeadDim, GradientSide kSide>
struct alignas(16) GradientState {
  static constexpr BackwardPolicy kPolicy = MakeBackwardPolicy(kHeadDim);
  static constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  static constexpr int kOffset = 2 * kPolicy.kept_bytes + 2 * kPolicy.stages * kPolicy.step_bytes;

  // Of the rows of a step, where those are of Q: what lane c reads at once, rows 8 t + 2 c + e of
  // two t, lies together (StatisticsPlace).
  float lse[kPolicy.stages][kKeepsKeys ? kStepRows : 4];
  float offset[kPolicy.stages][kKeepsKeys ? kStepRows : 4];
  // Of each row that is kept, what it shares with the rows of the step, in quad order
  // (core::BitOrder); kept up where pairs are hidden. Two turns of the stages, so that words are
  // made while a step waits for its stage.
  uint64_t words[2 * kPolicy.stages][kKeptRows];
  StepTile tiles[kPolicy.stages];
  uint64_t full[kPolicy.stages];
  uint64_t empty[kPolicy.stages];
  uint64_t kept_full;
  KeptBlock block;
};
__device__ __forceinline__ int StatisticsPlace(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}
template <int kHeadDim, GradientSide kSide>
inline constexpr int kGradientSharedBytes =
    GradientState<kHeadDim, kSide>::kOffset +
    static_cast<int>(sizeof(GradientState<kHeadDim, kSide>));

inline constexpr int kLoadingWarps = 4;
// The full barriers: once the copies are begun, and once words and statistics are written.
inline constexpr int kFullArrivals = 2;
inline constexpr int kEmptyArrivals = 8;  // warps with rows

// Bit l of word k becomes bit k of word l, for the words of a warp's lanes.
static __device__ __forceinline__ uint32_t TransposeBits(uint32_t word, int lane) {
#pragma unroll
  for (int j = 16; j > 0; j /= 2) {
    const uint32_t low = j == 16  ? 0x0000ffffu
                         : j == 8 ? 0x00ff00ffu
                         : j == 4 ? 0x0f0f0f0fu
                         : j == 2 ? 0x33333333u
                                  : 0x55555555u;
    const uint32_t other = __shfl_xor_sync(~0u, word, j);
    word = (lane & j) == 0 ? (word & low) | (other & low) << j : (word & ~low) | (other >> j & low);
  }
  return word;
}

template <int kHeadDim, GradientSide kSide>
class GradientLoader {
 public:
  using State = GradientState<kHeadDim, kSide>;
  static constexpr BackwardPolicy kPolicy = State::kPolicy;
  static constexpr bool kKeepsKeys = State::kKeepsKeys;

  __device__ GradientLoader(const GradientParams& params, uint32_t shared, State& state)
      : params_(params),
        base_(params.base),
        problem_(params.base.problem),
        shared_(shared),
        state_(state),
        s_(state.block.sequence),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        first_(static_cast<int>(state.block.first_row)),
        existing_rows_(
            static_cast<int>(core::Clamp<int64_t>(s_.q_len - s_.q_offset, 0, s_.q_rows))) {}

  __device__ void Run() {
    const int64_t head = state_.block.head;
    if (threadIdx.x == 0) {
      const uint32_t barrier = SharedAddress(&state_.kept_full);
      ArriveExpecting(barrier, 2 * kPolicy.kept_bytes);
      const int64_t row =
          kKeepsKeys ? KeyPlaneRow(base_, s_, head) : QueryPlaneRow(base_, s_, head);
#pragma unroll 1
      for (int half = 0; half < kKeptRows; half += kStepRows) {
        Load<kKeptRows>(shared_ + half * 128, kKeepsKeys ? params_.keys : params_.queries,
                        kPolicy.kept_bytes, barrier, static_cast<int>(row) + first_ + half);
      }
    }
    if (kKeepsKeys) {
      has_kept_flags_ = HasKeyFlags(head, first_, kKeptRows);
#pragma unroll 1
      for (int64_t n = 0; n < problem_.group; ++n) ListHead(head * problem_.group + n, head);
    } else {
      has_kept_flags_ = HasQueryFlags(head, first_, kKeptRows);
      ListHead(head, head / problem_.group);
    }
    if (!IsMine()) return;
    const uint32_t full = WaitForStage();
    if (lane_ == 0) {
      state_.tiles[steps_ % kPolicy.stages] = {StepTile::kEnd, 0};
      Arrive(full);
      Arrive(full);
    }
  }

 private:
  // ---- which tiles ----

  __device__ __forceinline__ void ListHead(int64_t head, int64_t kv_head) {
    query_row_ = static_cast<int>(QueryPlaneRow(base_, s_, head));
    key_row_ = static_cast<int>(KeyPlaneRow(base_, s_, kv_head));
    int begin = 0;
    int end = existing_rows_;
    if (!kKeepsKeys) {
      const bool has_rows = first_ < existing_rows_;
      begin = has_rows ? FirstInterval(first_).begin / kStepRows : 0;
      end = has_rows ? LastInterval(first_ + kKeptRows).end : 0;
    }
    end = core::CeilDiv(end, kStepRows);
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWarpSize) {
      const uint32_t mine = tile + lane_ < end ? Properties(head, kv_head, tile + lane_) : kNone;
#pragma unroll 1
      for (uint32_t left = __ballot_sync(~0u, mine != kNone); left != 0; left &= left - 1) {
        const int n = __ffs(static_cast<int>(left)) - 1;
        const uint32_t properties = __shfl_sync(~0u, mine, n);
        if (IsMine()) {
          Announce({static_cast<uint32_t>(tile + n) << StepTile::kPropertyBits | properties,
                    static_cast<uint32_t>(head)});
        }
        ++steps_;
      }
    }
  }

  static constexpr uint32_t kNone = ~0u;

  // Those of the first row of some, and of the last one that exists.
  __device__ __forceinline__ KeyInterval FirstInterval(int row) const {
    return base_.intervals[query_row_ + row];
  }
  __device__ __forceinline__ KeyInterval LastInterval(int end) const {
    return base_.intervals[query_row_ + core::Min(end, existing_rows_) - 1];
  }

  // Of a tile with visible pairs; else kNone.
  __device__ __forceinline__ uint32_t Properties(int64_t head, int64_t kv_head, int tile) const {
    constexpr int kRows = kKeepsKeys ? kStepRows : kKeptRows;
    constexpr int kKeys = kKeepsKeys ? kKeptRows : kStepRows;
    const int row = kKeepsKeys ? tile * kStepRows : first_;
    const int key = kKeepsKeys ? first_ : tile * kStepRows;
    const KeyInterval first = FirstInterval(row);
    const KeyInterval last = LastInterval(row + kRows);
    if (last.end <= key || first.begin >= key + kKeys) return kNone;
    uint32_t properties = 0;
    if (last.begin > key || first.end < key + kKeys) properties |= StepTile::kStructuredPart;
    if (problem_.mask.dense.words != nullptr) {
      const core::TileClass by_dense = core::ClassifyDense(
          problem_.mask.dense, s_, head, s_.q_offset + row,
          s_.q_offset + core::Min(row + kRows, existing_rows_), s_.kv_offset + key,
          s_.kv_offset + core::Min<int64_t>(key + kKeys, core::LocalKeys(s_)));
      if (by_dense == core::TileClass::kEmpty) return kNone;
      if (by_dense == core::TileClass::kPartial) properties |= StepTile::kDensePart;
    }
    const bool has_flags =
        kKeepsKeys ? HasQueryFlags(head, row, kRows) : HasKeyFlags(kv_head, key, kKeys);
    if (has_flags || has_kept_flags_) {
      properties |= StepTile::kFlagged;
      // Else rows that are not there show it by their statistics.
      if (row + kRows > existing_rows_) properties |= StepTile::kStructuredPart;
    }
    return properties;
  }

  __device__ __forceinline__ bool HasKeyFlags(int64_t kv_head, int key, int keys) const {
    const int64_t word = KeyFlagWord(base_, s_, kv_head, key);
    uint64_t flags = base_.keys.first_flags[word] | base_.keys.second_flags[word];
    if (keys > core::kTile) {
      flags |= base_.keys.first_flags[word + 1] | base_.keys.second_flags[word + 1];
    }
    return flags != 0;
  }
  // Rows of dO show what they are by their statistics.
  __device__ __forceinline__ bool HasQueryFlags(int64_t head, int row, int rows) const {
    const int64_t word = QueryFlagWord(base_, s_, head, row);
    uint64_t flags = base_.queries.first_flags[word];
    if (rows > core::kTile) flags |= base_.queries.first_flags[word + 1];
    return flags != 0;
  }

  // ---- one tile ----

  // Each warp serves the steps of its own, and so of one stage: the others' latencies hide its.
  __device__ __forceinline__ bool IsMine() const {
    return steps_ % kLoadingWarps == static_cast<uint32_t>(warp_);
  }
  static_assert(kPolicy.stages == kLoadingWarps);

  // Waits until the next step's stage is empty.
  __device__ __forceinline__ uint32_t WaitForStage() const {
    const uint32_t stage = steps_ % kPolicy.stages;
    Wait(SharedAddress(&state_.empty[stage]), (steps_ / kPolicy.stages & 1) ^ 1);
    return SharedAddress(&state_.full[stage]);
  }

  __device__ __forceinline__ void Announce(const StepTile& tile) {
    // The step that had these words is done with: the wait of this warp's last step says so.
    if (tile.IsHidden()) MakeWords(tile, state_.words[steps_ % (2 * kPolicy.stages)]);
    const uint32_t stage = steps_ % kPolicy.stages;
    const uint32_t full = WaitForStage();
    const int row = (kKeepsKeys ? query_row_ : key_row_) + tile.FirstRow();
    if (lane_ == 0) {
      state_.tiles[stage] = tile;
      ArriveExpecting(full, 2 * kPolicy.step_bytes);
      Load<kStepRows>(shared_ + 2 * kPolicy.kept_bytes + stage * 2 * kPolicy.step_bytes,
                      kKeepsKeys ? params_.queries : params_.keys, kPolicy.step_bytes, full, row);
    }
    if (kKeepsKeys) {
#pragma unroll
      for (int n = 0; n < kStepRows; n += kWarpSize) {
        const RowStatistics statistics = base_.statistics[row + n + lane_];
        state_.lse[stage][StatisticsPlace(n + lane_)] = statistics.lse;
        state_.offset[stage][StatisticsPlace(n + lane_)] = statistics.offset;
      }
    }
    __syncwarp();
    if (lane_ == 0) Arrive(full);
  }

  // 64 rows of both tensors of a side, into tiles of `kTileRows` rows.
  template <int kTileRows>
  __device__ __forceinline__ void Load(uint32_t target, const PlaneMaps& maps, int second_offset,
                                       uint32_t barrier, int row) const {
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target + part * kTileRows * 128, &maps.first, barrier, 64 * part, row, 0, 0);
    }
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(target + second_offset + part * kTileRows * 128, &maps.second, barrier, 64 * part,
              row, 0, 0);
    }
  }

  // ---- what is visible ----

  // Words in quad order: lane c's 16 bits stand for rows 8 n + 2 c + e of the step, as bit 2 n + e.
  __device__ __forceinline__ void MakeWords(const StepTile& tile, uint64_t* words) const {
    if constexpr (kKeepsKeys) {
      // 32 keys by 32 rows at a time. This lane asks for the row of bit `lane` of the result, and
      // what it gets has the keys in an order of their own, which says where the result goes.
      const int row = tile.FirstRow() + lane_ % 16 / 2 * 8 + lane_ / 16 * 2 + lane_ % 2;
      words += lane_ % 8 / 2 * 8 + lane_ / 8 * 2 + lane_ % 2;
#pragma unroll 1
      for (int block = 0; block < kKeptRows; block += core::kTile) {
        uint64_t rows[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) rows[n] = RowWord(tile, row + 4 * n, first_ + block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t bits[2];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            bits[n] = TransposeBits(
                __byte_perm(static_cast<uint32_t>(rows[n]), static_cast<uint32_t>(rows[n] >> 32),
                            half == 0 ? 0x6420 : 0x7531),
                lane_);
          }
          words[half * kWarpSize] = bits[0] | uint64_t{bits[1]} << 32;
        }
        words += core::kTile;
      }
    } else {
#pragma unroll 2
      for (int n = lane_; n < kKeptRows; n += kWarpSize) {
        words[n] = RowWord(tile, first_ + n, tile.FirstRow());
      }
    }
  }

  // The 64 keys from `key` on that a row sees, in quad order.
  __device__ __forceinline__ uint64_t RowWord(const StepTile& tile, int row, int key) const {
    if (row >= existing_rows_) return 0;
    uint64_t word = ~uint64_t{0};
    if ((tile.word & StepTile::kDensePart) != 0) {
      const core::DenseBits& dense = problem_.mask.dense;
      const int64_t i = s_.q_offset + row;
      const int64_t j = s_.kv_offset + key;
      word = i < dense.q_extent && j < dense.kv_extent
                 ? dense.words[core::DenseWordIndex(dense, s_.batch, tile.head, i, j >> 6)]
                 : 0;
    }
    if ((tile.word & StepTile::kStructuredPart) != 0) {
      const KeyInterval keys = base_.intervals[query_row_ + row];
      word &= core::ToQuadOrder(core::IntervalWord(keys.begin - key, keys.end - key));
    }
    return word;
  }

  const GradientParams& params_;
  const BackwardParams& base_;
  const Problem& problem_;
  const uint32_t shared_;
  State& state_;
  const Sequence& s_;
  const int warp_;
  const int lane_;
  const int first_;          // row that is kept
  const int existing_rows_;  // of Q
  int query_row_;            // of the planes, for local row 0 of the head at work
  int key_row_;
  bool has_kept_flags_ = false;
  uint32_t steps_ = 0;  // announced
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_BACKWARD_LOADING_CUH_
