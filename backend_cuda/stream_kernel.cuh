// The forward kernel for short queries without anything but lengths, decoding above all: it reads
// keys and values once and never lets the memory rest. short_kernel.cuh serves the other problems.
//
// The keys of a sequence are split at multiples of SplitKeys. An item is one split and 16 rows of
// the query rows and heads that share a key head (row n is row n / group, head n % group of the
// group). A block takes one item after the other. Its loading warp copies the queries, keys and
// values of all of them, step after step, into a ring of stages, without a pause from one item to
// the next; the other warps follow, each on its own 16 keys of a step, and are merged at the end of
// an item. Where a sequence has several splits, items leave partial results, and MergeSplitsKernel
// adds them up in the order of the splits. Both merges are those of the running softmax
// (core/softmax.h).
//
// Which keys a warp takes is a matter of the sequence alone: how many stages and blocks there are
// changes no bit. Code that is run once for an item costs as much as what it does: it is not in the
// caches next to the multiprocessor. So it is short here, and all warps find items by themselves;
// shortest where sequences are alike and every step is a box of the tensor memory accelerator
// (kAlike), a third of the other kernel.
#ifndef TANDEM_BACKEND_CUDA_STREAM_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_STREAM_KERNEL_CUH_

#include <cuda.h>

#include <type_traits>

#include "backend_cuda/barrier.cuh"
#include "backend_cuda/row_output.cuh"
#include "backend_cuda/stream_policy.h"
#include "backend_cuda/warp_attention.cuh"

namespace tandem::cuda {

struct StreamItem {
  Sequence sequence;
  WarpRows rows;
  int32_t kv_head;
  int32_t split;
  int32_t splits;  // of the sequence
  int32_t row_count;
  int32_t first_key;
  int32_t keys;  // of the split
};

// What is the same for all items where all sequences are alike.
struct StreamPlan {
  int32_t items;  // of a sequence; 0: sequences differ, or steps are not all whole boxes
  int32_t all_items;
  int32_t row_tiles;
  int32_t rows;  // of a group
  int32_t splits;
  int32_t split_keys;
  int32_t keys;
  int32_t group;
};

// has_maps: `keys` and `values` are there.
struct StreamParams {
  StreamPlan plan;
  int32_t has_maps;
  CUtensorMap keys;
  CUtensorMap values;
  ForwardParams forward;
};

// Enumerates the items of sequences that are alike.
class AlikeItems {
 public:
  __device__ explicit AlikeItems(const StreamParams& params)
      : plan_(params.plan), problem_(params.forward.problem) {}

  __device__ __forceinline__ bool Find(int n, StreamItem& item) const {
    if (n >= plan_.all_items) return false;
    const auto batch = static_cast<uint32_t>(n) / static_cast<uint32_t>(plan_.items);
    const uint32_t index = static_cast<uint32_t>(n) - batch * plan_.items;
    const uint32_t piece = index / static_cast<uint32_t>(plan_.row_tiles);
    Sequence& s = item.sequence;
    s.batch = batch;
    s.q_start = 0;
    s.kv_start = 0;
    s.q_rows = problem_.q_rows;
    s.kv_rows = problem_.kv_rows;
    s.q_offset = problem_.q_offset;
    s.kv_offset = problem_.kv_offset;
    s.q_len = problem_.global_q_len;
    s.kv_len = problem_.global_kv_len;
    item.splits = plan_.splits;
    item.kv_head = static_cast<int32_t>(piece / static_cast<uint32_t>(plan_.splits));
    item.split = static_cast<int32_t>(piece) - item.kv_head * plan_.splits;
    item.first_key = item.split * plan_.split_keys;
    item.keys = core::Min(plan_.keys - item.first_key, plan_.split_keys);
    item.rows = {static_cast<int32_t>(index - piece * plan_.row_tiles) * kShortBlockRows,
                 plan_.group, int64_t{item.kv_head * plan_.group}};
    item.row_count = core::Min(plan_.rows - item.rows.first, kShortBlockRows);
    return true;
  }

 private:
  const StreamPlan& plan_;
  const Problem& problem_;
};

// Enumerates the items of all sequences, for one warp: row tiles by splits by key heads of one
// sequence after the other.
class StreamItems {
 public:
  __device__ explicit StreamItems(const StreamParams& params)
      : params_(params.forward),
        problem_(params.forward.problem),
        lane_(threadIdx.x % kWarpSize),
        are_alike_(!core::IsPacked(problem_) && problem_.q_lengths.data == nullptr &&
                   problem_.kv_lengths.data == nullptr) {
    if (are_alike_) mine_ = Count(0);
  }

  // Finds item n; n only grows.
  __device__ __forceinline__ bool Find(int n, StreamItem& item) {
    int64_t batch = 0;
    uint32_t index = 0;  // of the item in its sequence
    if (are_alike_) {
      if (mine_ == 0) return false;
      batch = static_cast<uint32_t>(n) / static_cast<uint32_t>(mine_);
      if (batch >= problem_.batch) return false;
      index = static_cast<uint32_t>(n) - static_cast<uint32_t>(batch) * mine_;
      item.splits = splits_;
    } else {
      while (n >= first_item_ + counted_) {
        first_item_ += counted_;
        first_batch_ += kWarpSize;
        if (first_batch_ >= problem_.batch) return false;
        CountThirtyTwo();
      }
      const int owner = __popc(__ballot_sync(~0u, up_to_mine_ <= n - first_item_));
      batch = first_batch_ + owner;
      index = static_cast<uint32_t>(n - first_item_ - __shfl_sync(~0u, up_to_mine_ - mine_, owner));
      item.splits = __shfl_sync(~0u, splits_, owner);
    }
    int32_t status = 0;
    item.sequence = core::ResolveSequence(problem_, batch, &status);
    const Sequence& s = item.sequence;
    const auto row_tiles = static_cast<uint32_t>(RowTiles(s));
    const uint32_t piece = index / row_tiles;
    item.kv_head = static_cast<int32_t>(piece / static_cast<uint32_t>(item.splits));
    item.split = static_cast<int32_t>(piece) - item.kv_head * item.splits;
    const auto split_keys = static_cast<int32_t>(SplitKeys(s));
    item.first_key = item.split * split_keys;
    item.keys = core::Min(static_cast<int32_t>(core::LocalKeys(s)) - item.first_key, split_keys);
    const auto group = static_cast<int32_t>(problem_.group);
    item.rows = {static_cast<int32_t>(index - piece * row_tiles) * kShortBlockRows, group,
                 static_cast<int64_t>(item.kv_head) * group};
    item.row_count = core::Min(Rows(s) - item.rows.first, kShortBlockRows);
    return true;
  }

 private:
  // Query rows of a group that are written here.
  __device__ __forceinline__ int Rows(const Sequence& s) const {
    return static_cast<int>(core::Min(s.q_rows, params_.partials.rows) * problem_.group);
  }
  __device__ __forceinline__ int RowTiles(const Sequence& s) const {
    return (Rows(s) + kShortBlockRows - 1) / kShortBlockRows;
  }

  // The items of a sequence, and its splits.
  __device__ __forceinline__ int Count(int64_t batch) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(problem_, batch, &status);
    if (status != 0 && blockIdx.x == 0 && problem_.device_status != nullptr) {
      atomicOr(problem_.device_status, status);
    }
    splits_ = core::Max(static_cast<int32_t>(SplitCount(s)), 1);
    if (!IsShort(problem_, s)) return 0;
    return RowTiles(s) * splits_ * static_cast<int32_t>(problem_.kv_heads);
  }

  // Those of 32 sequences, one a lane.
  __device__ __forceinline__ void CountThirtyTwo() {
    const int64_t batch = first_batch_ + lane_;
    mine_ = batch < problem_.batch ? Count(batch) : 0;
    up_to_mine_ = mine_;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const int32_t before = __shfl_up_sync(~0u, up_to_mine_, lanes);
      if (lane_ >= lanes) up_to_mine_ += before;
    }
    counted_ = __shfl_sync(~0u, up_to_mine_, kWarpSize - 1);
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const int lane_;
  const bool are_alike_;              // all sequences
  int64_t first_batch_ = -kWarpSize;  // of the 32 sequences
  int first_item_ = 0;                // theirs
  int counted_ = 0;
  int mine_ = 0;  // of this lane's sequence, or any; and of those up to it
  int up_to_mine_ = 0;
  int splits_ = 1;  // of this lane's sequence
};

template <DType kDType, int kHeadDim, bool kAlike = false>
class StreamBlock {
 public:
  using Items = std::conditional_t<kAlike, AlikeItems, StreamItems>;
  static constexpr StreamPolicy kPolicy = ForwardStreamPolicy(kHeadDim);
  using Warp = WarpAttention<kDType, kHeadDim, 1, 2, kPolicy.keys>;
  using Column = ChunkColumn<kHeadDim, kPolicy.keys, kWarpSize, true>;

  // Behind the stages and the queries.
  struct State {
    uint64_t full[kMostStreamStages];
    float maximum[kPolicy.warps][kShortBlockRows];
    float sum[kPolicy.warps][kShortBlockRows];
  };
  static constexpr int kStageBytes = 2 * kPolicy.tile_bytes;
  static constexpr int kFixedBytes =
      kStreamQueries * kPolicy.query_bytes + static_cast<int>(sizeof(State));
  static_assert(kPolicy.warps * kShortBlockRows * kHeadDim * 4 <= kStageBytes,
                "the warps' outputs take the place of a step's tiles");

  __device__ StreamBlock(const StreamParams& params, char* shared)
      : maps_(params),
        params_(params.forward),
        problem_(params.forward.problem),
        shared_(shared),
        queries_(shared + params.forward.stages * kStageBytes),
        state_(*reinterpret_cast<State*>(queries_ + kStreamQueries * kPolicy.query_bytes)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize) {}

  __device__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < params_.stages; ++i) {
        InitBarrier(SharedAddress(&state_.full[i]), kWarpSize);
      }
    }
    __syncthreads();
    if (warp_ == kPolicy.warps) {
      LoadAll();
    } else {
      MultiplyAll();
    }
  }

 private:
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;
  static constexpr int kRowBytes = Column::kRowBytes;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kParts = kHeadDim / 64;  // of a tile
  static constexpr bool kHasBoxes = kParts > 0;
  static constexpr int kMultiplyingThreads = kPolicy.warps * kWarpSize;

  // A stage of the ring and the turn of the ring it is at.
  struct Place {
    int stage;
    uint32_t turn;
  };
  __device__ __forceinline__ void Advance(Place& place) const {
    if (++place.stage < params_.stages) return;
    place.stage = 0;
    ++place.turn;
  }
  // Stages and queries are given back at barriers of threads: an mbarrier takes the arrival of one
  // lane after the other.
  __device__ __forceinline__ void GiveBack(int barrier) const {
    ArriveThreads(barrier, kPolicy.threads);
  }
  __device__ __forceinline__ void TakeBack(int barrier) const {
    SyncThreads(barrier, kPolicy.threads);
  }
  __device__ __forceinline__ char* Tile(int stage, bool is_value) const {
    return shared_ + stage * kStageBytes + (is_value ? kPolicy.tile_bytes : 0);
  }
  __device__ __forceinline__ char* Query(int n) const {
    return queries_ + n % kStreamQueries * kPolicy.query_bytes;
  }
  // A sequence without keys has one step all the same.
  static __device__ __forceinline__ int Steps(const StreamItem& item) {
    return core::Max((item.keys + kPolicy.keys - 1) / kPolicy.keys, 1);
  }

  // ---- the loading warp ----

  __device__ __forceinline__ void LoadAll() {
    Items items(maps_);
    StreamItem item;
    Place place = {0, 0};
    int items_here = 0;
    for (int n = blockIdx.x; items.Find(n, item); n += gridDim.x, ++items_here) {
      if constexpr (kAlike) {
        LoadBoxes(item, items_here, place);
      } else {
        LoadSteps(item, items_here, place);
      }
    }
    // What was given back and not taken.
    const int stages = place.turn != 0 ? params_.stages : place.stage;
    for (int i = 0; i < stages; ++i, Advance(place)) {
      if (place.turn == 0) place.stage = i;
      TakeBack(kStageBarrier + place.stage);
    }
    for (int i = 0; i < core::Min(items_here, kStreamQueries); ++i) TakeBack(kQueryBarrier + i);
    WaitCopies<0>();
  }

  // The steps of an item, all by the tensor memory accelerator.
  __device__ __forceinline__ void LoadBoxes(const StreamItem& item, int items_here, Place& place) {
    const int steps = Steps(item);
    for (int step = 0; step < steps; ++step) {
      if (place.turn != 0) TakeBack(kStageBarrier + place.stage);
      if (lane_ == 0) CopyBoxes(item, step, place.stage);
      if (step == 0) CopyQuery(item, items_here);
      ArriveAfterCopies(SharedAddress(&state_.full[place.stage]));
      Advance(place);
    }
  }

  __device__ __forceinline__ void LoadSteps(const StreamItem& item, int items_here, Place& place) {
    const int64_t key_bytes = problem_.k.row_stride * 2;
    const int64_t value_bytes = problem_.v.row_stride * 2;
    const char* keys = nullptr;
    const char* values = nullptr;
    if (!problem_.has_block_table) {
      keys = Column::Source(First(problem_.k, item), key_bytes, problem_.qk_dim, lane_);
      values = Column::Source(First(problem_.v, item), value_bytes, problem_.v_dim, lane_);
    }
    const int steps = Steps(item);
    for (int step = 0; step < steps; ++step) {
      const int left = item.keys - step * kPolicy.keys;
      Pages pages;
      if (problem_.has_block_table) pages = FindPages(problem_, item, step);
      if (place.turn != 0) TakeBack(kStageBarrier + place.stage);
      const uint32_t key_tile = SharedAddress(Tile(place.stage, false));
      const uint32_t value_tile = SharedAddress(Tile(place.stage, true));
      if (problem_.has_block_table) {
        CopyPages(problem_, false, item.kv_head, pages, key_tile);
        CopyPages(problem_, true, item.kv_head, pages, value_tile);
      } else if (kHasBoxes && maps_.has_maps && left >= kPolicy.keys) {
        if (lane_ == 0) CopyBoxes(item, step, place.stage);
      } else {
        CopyRows(key_tile, keys, problem_.k.data, params_.key_steps.pass, left);
        CopyRows(value_tile, values, problem_.v.data, params_.value_steps.pass, left);
      }
      if (keys != nullptr) keys += params_.key_steps.step;
      if (values != nullptr) values += params_.value_steps.step;
      if (step == 0) CopyQuery(item, items_here);
      ArriveAfterCopies(SharedAddress(&state_.full[place.stage]));
      Advance(place);
    }
  }

  // A whole step by the tensor memory accelerator. Its lines are the first to leave the L2: nobody
  // reads them again, or soon.
  __device__ __forceinline__ void CopyBoxes(const StreamItem& item, int step, int stage) const {
#if __CUDA_ARCH__ >= 900
    const uint32_t full = SharedAddress(&state_.full[stage]);
    ExpectBytes(full, kStageBytes);
    const int row = static_cast<int>(item.sequence.kv_start) + item.first_key + step * kPolicy.keys;
    const int batch =
        !kAlike && core::IsPacked(problem_) ? 0 : static_cast<int>(item.sequence.batch);
    const auto copy = [&](const CUtensorMap& map, bool is_value) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        CopyBoxOnce(SharedAddress(Tile(stage, is_value)) + part * (kPolicy.keys * 128), &map, full,
                    part * 64, row, item.kv_head, batch);
      }
    };
    copy(maps_.keys, false);
    copy(maps_.values, true);
#endif
  }

  __device__ __forceinline__ const char* First(const Array4& array, const StreamItem& item) const {
    return static_cast<const char*>(array.data) +
           core::KeyOffset(array, item.sequence, item.kv_head, item.first_key) * 2;
  }

  // from: null where this lane's column is beyond the tensor's. What is not there becomes zeros.
  __device__ __forceinline__ void CopyRows(uint32_t tile, const char* from, const void* data,
                                           int64_t pass_bytes, int left) const {
    const uint32_t target = Column::Target(tile, lane_);
    if (left >= kPolicy.keys && from != nullptr) {
      Column::CopyWhole(target, from, pass_bytes);
    } else {
      Column::CopyCut(target, from == nullptr ? static_cast<const char*>(data) : from, pass_bytes,
                      from == nullptr ? 0 : left, lane_);
    }
  }

  // Rows of different heads are not equally far apart, so each chunk finds its own row.
  __device__ __forceinline__ void CopyQuery(const StreamItem& item, int items_here) const {
    if (items_here >= kStreamQueries) TakeBack(kQueryBarrier + items_here % kStreamQueries);
    const Array4& q = problem_.q;
    const uint32_t tile = SharedAddress(Query(items_here));
#pragma unroll 1
    for (int c = lane_; c < kShortBlockRows * kChunks; c += kWarpSize) {
      const int n = c / kChunks;
      const int column = c % kChunks * 8;
      const bool is_there = n < item.row_count && column < problem_.qk_dim;
      int64_t offset = 0;
      if (is_there) {
        offset = core::QueryOffset(q, item.sequence, item.rows.Head(n), item.rows.Row(n)) + column;
      }
      CopyAsync16(tile + ChunkOffset<kHeadDim>(n, c % kChunks),
                  static_cast<const char*>(q.data) + offset * 2, is_there ? 16 : 0);
    }
  }

  // ---- pages ----

  // Where the rows of a step are: row n of it is held by lane n % 32. Calls, with their arguments
  // by value: a reference to a member would put all of them into local memory.
  struct Pages {
    int32_t page[kPolicy.keys / kWarpSize];  // -1: the item has no such key
    int32_t row[kPolicy.keys / kWarpSize];   // of the page
  };

  // Pages outside the tensors are reported; others are read in their place.
  static __device__ __noinline__ Pages FindPages(const Problem& problem, StreamItem item,
                                                 int step) {
    Pages pages;
    int32_t status = 0;
#pragma unroll
    for (int i = 0; i < kPolicy.keys / kWarpSize; ++i) {
      const int n = step * kPolicy.keys + i * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
      pages.page[i] = -1;
      pages.row[i] = 0;
      if (n < item.keys) {
        const auto key = static_cast<uint32_t>(item.first_key + n);
        const auto page_size = static_cast<uint32_t>(problem.page_table.page_size);
        pages.page[i] = static_cast<int32_t>(
            core::LoadPage(problem.page_table, item.sequence.batch, key / page_size, &status));
        pages.row[i] = static_cast<int32_t>(key % page_size);
      }
    }
    if (status != 0 && problem.device_status != nullptr) atomicOr(problem.device_status, status);
    return pages;
  }

  static __device__ __forceinline__ void CopyPages(const Problem& problem, bool is_value,
                                                   int32_t kv_head, Pages pages, uint32_t tile) {
    const Array4& array = is_value ? problem.v : problem.k;
    const int lane = threadIdx.x % kWarpSize;
    const int column = lane % kChunks * 8;
    const bool has_column = column < (is_value ? problem.v_dim : problem.qk_dim);
    const char* const base =
        static_cast<const char*>(array.data) + (kv_head * array.head_stride + column) * 2;
#pragma unroll
    for (int i = 0; i < kPolicy.keys / kWarpSize; ++i) {
#pragma unroll 4
      for (int first = 0; first < kWarpSize; first += kWarpSize / kChunks) {
        const int n = first + lane / kChunks;
        const int64_t page = __shfl_sync(~0u, pages.page[i], n);
        const int64_t row = __shfl_sync(~0u, pages.row[i], n);
        const bool is_there = page >= 0 && has_column;
        CopyAsync16(tile + ChunkOffset<kHeadDim, kPolicy.keys>(i * kWarpSize + n, lane % kChunks),
                    is_there ? base + (page * array.batch_stride + row * array.row_stride) * 2
                             : static_cast<const char*>(array.data),
                    is_there ? 16 : 0);
      }
    }
  }

  // ---- the multiplying warps ----

  __device__ __forceinline__ void MultiplyAll() {
    Items items(maps_);
    StreamItem item;
    Place place = {0, 0};
    int items_here = 0;
    for (int n = blockIdx.x; items.Find(n, item); n += gridDim.x, ++items_here) {
      attention_.Reset();
      const uint32_t query = SharedAddress(Query(items_here)) + Warp::RowMajorOffset(lane_);
      const int steps = Steps(item);
      for (int step = 0; step < steps; ++step) {
        WaitBarrier(SharedAddress(&state_.full[place.stage]), place.turn & 1);
        if (step == 0 && kQueryInRegisters) {
#pragma unroll
          for (int i = 0; i < Warp::kHeadSteps; ++i) {
            Warp::LoadQuery(query, i, 0, 0, 0, fragments_[0][i][0]);
          }
          GiveBack(kQueryBarrier + items_here % kStreamQueries);
        }
        VisitTile(query, place.stage, item.keys - step * kPolicy.keys - 16 * warp_);
        if (step + 1 == steps) break;
        GiveBack(kStageBarrier + place.stage);
        Advance(place);
      }
      if (!kQueryInRegisters) {
        GiveBack(kQueryBarrier + items_here % kStreamQueries);
      }
      MergeWarps(item, place.stage);
      WriteRows(item, place.stage);
      PublishSharedWrites();
      GiveBack(kStageBarrier + place.stage);
      Advance(place);
    }
  }

  // left: keys of the item from this warp's first on.
  __device__ __forceinline__ void VisitTile(uint32_t query, int stage, int left) {
    if (left <= 0) return;
    typename Warp::Scores scores;
    const uint32_t keys = SharedAddress(Tile(stage, false)) + warp_ * 16 * kRowBytes;
    Warp::template MultiplyQueryKey<kQueryInRegisters>(query, 0, fragments_,
                                                       keys + Warp::KeyOffset(lane_), 0, scores);
    Warp::ForEachScore(scores,
                       [&](float& score, int, int, int, uint32_t) { score *= problem_.scale; });
    if (left < 16) {
      Warp::ForEachScore(scores, [&](float& score, int, int, int key, uint32_t) {
        if (key >= left) score = core::NegativeInfinity();
      });
    }
    attention_.UpdateSoftmax(scores, ScaleBy(1.0f));
    typename Warp::Probabilities packed;
    Warp::PackProbabilities(scores, packed);
    attention_.MultiplyProbabilityValue(packed,
                                        keys + kPolicy.tile_bytes + Warp::ValueOffset(lane_), 0);
  }

  // The warps' outputs take the place of the last step's tiles.
  __device__ __forceinline__ float* WarpOutput(int stage, int warp, int n) const {
    return reinterpret_cast<float*>(Tile(stage, false)) + (warp * kShortBlockRows + n) * kHeadDim;
  }

  __device__ __forceinline__ void MergeWarps(const StreamItem& item, int stage) {
    attention_.FinishSums();
    SyncThreads(kMultiplyingBarrier, kMultiplyingThreads);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r >= item.row_count) break;
      const int n = Warp::LaneRow(0, r);
      if (n < item.row_count) {
        if ((lane_ & 3) == 0) {
          state_.maximum[warp_][n] = attention_.maximum[0][r];
          state_.sum[warp_][n] = attention_.sum[0][r];
        }
        float* row = WarpOutput(stage, warp_, n);
#pragma unroll
        for (int t = 0; t < kHeadDim / 8; ++t) {
          *reinterpret_cast<float2*>(row + 8 * t + 2 * (lane_ & 3)) =
              make_float2(attention_.output[0][t][2 * r], attention_.output[0][t][2 * r + 1]);
        }
      }
    }
    SyncThreads(kMultiplyingBarrier, kMultiplyingThreads);
  }

  // The warps' results, in their order, as those of one running softmax.
  __device__ __forceinline__ void WriteRows(const StreamItem& item, int stage) {
    const PartialResults& partials = params_.partials;
#pragma unroll 1
    for (int n = warp_; n < item.row_count; n += kPolicy.warps) {
      float maximum = core::NegativeInfinity();
#pragma unroll
      for (int w = 0; w < kPolicy.warps; ++w) maximum = MaxKeepNan(maximum, state_.maximum[w][n]);
      float weight[kPolicy.warps];
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kPolicy.warps; ++w) {
        weight[w] = core::SoftmaxRescale(state_.maximum[w][n], maximum);
        sum += state_.sum[w][n] * weight[w];
      }
      float value[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        value[c] = 0.0f;
#pragma unroll
        for (int w = 0; w < kPolicy.warps; ++w) {
          value[c] += WarpOutput(stage, w, n)[lane_ + c * kWarpSize] * weight[w];
        }
      }
      if (item.splits == 1) {
        Store(item, n, maximum, sum, value);
        continue;
      }
      const int64_t index = PartialIndex(partials, problem_.q_heads, item.sequence.batch,
                                         item.rows.Head(n), item.rows.Row(n)) +
                            item.split;
      float* const output = partials.output + index * problem_.v_dim;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane_ + c * kWarpSize < problem_.v_dim) output[lane_ + c * kWarpSize] = value[c];
      }
      if (lane_ == 0) {
        partials.maximum[index] = maximum;
        partials.sum[index] = sum;
      }
    }
  }

  static constexpr int kColumns = kHeadDim / kWarpSize;  // of a lane

  // Row n of an item, by one warp.
  __device__ __forceinline__ void Store(const StreamItem& item, int n, float maximum, float sum,
                                        const float (&value)[kColumns]) const {
    const int64_t head = item.rows.Head(n);
    const int64_t row = item.rows.Row(n);
    const RowEnd end = FinishRow(problem_, item.sequence, head, row, maximum, sum);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane_ + c * kWarpSize;
      if (column < problem_.v_dim) {
        StoreOutput(problem_, item.sequence, head, row, column,
                    end.is_empty ? 0.0f : value[c] * end.factor);
      }
    }
    if (lane_ == 0) StoreLse(problem_, item.sequence, head, row, end.Lse());
  }

  const StreamParams& maps_;
  const ForwardParams& params_;
  const Problem& problem_;
  char* const shared_;
  char* const queries_;
  State& state_;
  const int warp_;
  const int lane_;
  typename Warp::QueryFragments fragments_;
  Warp attention_;
};

template <DType kDType, int kHeadDim, bool kAlike>
__global__ void __launch_bounds__(ForwardStreamPolicy(kHeadDim).threads,
                                  ForwardStreamPolicy(kHeadDim).blocks_per_multiprocessor)
    StreamKernel(const __grid_constant__ StreamParams params) {
#if __CUDA_ARCH__ < 900
  if constexpr (kAlike) return;  // it has no boxes
#endif
  extern __shared__ __align__(1024) char shared[];
  AllowDependentLaunch();  // of the merge
  StreamBlock<kDType, kHeadDim, kAlike> block(params, shared);
  block.Run();
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_STREAM_KERNEL_CUH_
