// The two warps that have everything loaded: one goes ahead over the row blocks of this block of
// threads and loads Q, the other finds out which tiles they see and loads those.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LOADING_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LOADING_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

namespace tandem::cuda::hopper {

template <int kHeadDim, Variant kVariant>
class ItemWarp : LoadingWarp<kHeadDim, kVariant> {
 public:
  using LoadingWarp<kHeadDim, kVariant>::LoadingWarp;

  __device__ void Run() {
    if (!IsCareful(kVariant) && params_.queue.taken != nullptr) {
      TakeFromQueue();
    } else {
      TakeByTurns();
    }
    Item end = {};
    end.is_end = 1;
    Announce(end);
  }

 private:
  // Units in order, so that neighbours read the same keys at about the same time.
  __device__ __forceinline__ void TakeByTurns() {
    const int64_t blocks = gridDim.x;
    const uint32_t units_of_head = static_cast<uint32_t>(params_.units_of_head);
    const uint32_t last = static_cast<uint32_t>(params_.row_blocks) - 1;
    const auto serve = [&](int64_t unit) {
      const uint32_t head = static_cast<uint32_t>(unit) / units_of_head;
      const uint32_t n = static_cast<uint32_t>(unit) % units_of_head;
      const bool is_pair = units_of_head <= last && n != last - n;
#pragma unroll 1
      for (int part = 0; part <= (is_pair ? 1 : 0); ++part) Serve(head, part == 0 ? last - n : n);
    };
    if constexpr (IsCareful(kVariant)) {
      // A unit for each lane: mostly there is nothing to do, and that is soon known.
      for (int64_t first = blockIdx.x; first < params_.units; first += blocks * kWarpSize) {
        const int64_t mine = first + blocks * lane_;
        bool is_flagged = false;
        if (mine < params_.units) {
          const uint32_t n = static_cast<uint32_t>(mine) % units_of_head;
          const CarefulFlags* const flags =
              params_.flags + mine / units_of_head * params_.row_blocks;
          is_flagged = IsFlagged<kPolicy.warpgroups>(flags[last - n]) ||
                       IsFlagged<kPolicy.warpgroups>(flags[n]);
        }
        for (uint32_t left = __ballot_sync(~0u, is_flagged); left != 0; left &= left - 1) {
          serve(first + blocks * (__ffs(static_cast<int>(left)) - 1));
        }
      }
    } else {
      for (int64_t unit = blockIdx.x; unit < params_.units; unit += blocks) serve(unit);
    }
  }

  __device__ __forceinline__ void TakeFromQueue() {
    WaitForEarlierLaunch();  // LaunchFillQueue
    const WorkQueue& queue = params_.queue;
    const int sequences = static_cast<int>(problem_.batch);
    const int units = queue.first_units[sequences];
    for (int unit = static_cast<int>(blockIdx.x); unit < units;) {
      const int place = FindSequence(unit, sequences);
      const int64_t batch = queue.sequences[place];
      int32_t status = 0;
      const Sequence s = core::ResolveSequence(problem_, batch, &status);
      const auto row_blocks =
          static_cast<uint32_t>(core::CeilDiv<int64_t>(s.q_rows, kPolicy.block_rows));
      const auto n = static_cast<uint32_t>(unit - queue.first_units[place]);
      Serve(static_cast<uint32_t>(batch * problem_.q_heads) + n / row_blocks,
            row_blocks - 1 - n % row_blocks);
      // No sooner than the one before this one is at work: until then another block may be free
      // for it. An early one was announced so late.
      if constexpr (!kIsEarly) WaitForPlace();
      if (lane_ == 0) unit = static_cast<int>(gridDim.x) + atomicAdd(queue.taken, 1);
      unit = __shfl_sync(~0u, unit, 0);
    }
  }

  // The place of the sequence of a unit in the queue: the last whose first unit is no later. Each
  // step looks at one place in 32.
  __device__ __forceinline__ int FindSequence(int unit, int sequences) const {
    int begin = 0;
    for (int count = sequences; count > 1;) {
      const int step = (count + kWarpSize - 1) / kWarpSize;
      const int offset = lane_ * step;
      const bool is_before = offset < count && params_.queue.first_units[begin + offset] <= unit;
      const int found = (__popc(__ballot_sync(~0u, is_before)) - 1) * step;
      begin += found;
      count = core::Min(step, count - found);
    }
    return begin;
  }

  __device__ __forceinline__ void Serve(uint32_t head, uint32_t row_block) {
    CarefulFlags* const flags = params_.flags + int64_t{head} * params_.row_blocks + row_block;
    if (IsCareful(kVariant) && !IsFlagged<kPolicy.warpgroups>(*flags)) return;
    const uint32_t q_heads = static_cast<uint32_t>(problem_.q_heads);
    Item item = {};
    int32_t status = 0;
    item.sequence = core::ResolveSequence(problem_, head / q_heads, &status);
    item.head = head % q_heads;
    const int64_t missing = MissingRows(item.sequence.q_rows);
    item.first_row = row_block == 0 ? 0 : int64_t{row_block} * kPolicy.block_rows - missing;
    const int64_t block_rows = kPolicy.block_rows - (row_block == 0 ? missing : 0);
    item.flags = flags;
    if (status != 0 && lane_ == 0 && row_block == 0 && item.head == 0 &&
        problem_.device_status != nullptr) {
      atomicOr(problem_.device_status, status);
    }
    const Sequence& s = item.sequence;
    if (item.first_row >= s.q_rows) return;
    item.place = make_int4(static_cast<int>(s.q_start + item.first_row),
                           static_cast<int>(item.head), BatchIndex(problem_, s), 0);
    const auto rows_before = [&](int64_t row) {
      return static_cast<int32_t>(core::Clamp<int64_t>(row - item.first_row, 0, block_rows));
    };
    item.rows = rows_before(s.q_rows);
    item.existing_rows = rows_before(ExistingRows(s));
    const core::Array4& out = problem_.out;
    item.out = static_cast<char*>(out.data) + core::QueryOffset(out, s, item.head, item.first_row) *
                                                  (out.dtype == core::DType::kF32 ? 4 : 2);
    if (problem_.lse.data != nullptr) {
      item.lse = static_cast<float*>(problem_.lse.data) +
                 core::QueryOffset(problem_.lse, s, item.head, item.first_row);
    }
    if (IsShort(problem_, s)) {
      item.first_written_row = rows_before(MaxShortRows(problem_.group));
    } else if (item.existing_rows > 0) {
      FindKeys(item);
    }
    const int attempts = IsCareful(kVariant) ? 2 : 1;
    for (int attempt = 0; attempt < attempts; ++attempt) {
      item.is_strict = attempt;
      Announce(item);
    }
  }

  // Row blocks of three warpgroups: where rows do not fill them, the first one has whole warpgroups
  // fewer. Under a causal mask that is the block with the fewest keys.
  static __device__ __forceinline__ int64_t MissingRows(int64_t rows) {
    if (kPolicy.warpgroups != 3 || MayHaveWords(kVariant)) return 0;
    return core::RoundUp<int64_t>(rows, kPolicy.block_rows) - core::RoundUp<int64_t>(rows, 64);
  }

  // The intervals of the terms that move by one from each row to the next, for all rows at once.
  __device__ __forceinline__ void FindSlope(const Item& item) {
    const Sequence& s = item.sequence;
    const core::Mask& mask = problem_.mask;
    constexpr int64_t kFar = 1 << 30;
    int64_t begin = -kFar;
    int64_t end = kFar;
    int64_t prefix = 0;
    if (kVariant != Variant::kPlain) {
      for (int t = 0; t < mask.band_count; ++t) {
        const core::BandTerm& band = mask.bands[t];
        if (!core::IsInterval(band)) continue;
        const core::Interval keys =
            core::BandInterval(band, s, item.head, s.q_offset + item.first_row);
        begin = core::Max(begin, keys.begin - s.kv_offset);
        end = core::Min(end, keys.end - s.kv_offset);
        prefix = core::Max(prefix, core::BandPrefix(band, s) - s.kv_offset);
      }
    }
    slope_ = {static_cast<int32_t>(core::Min(begin, kFar)),
              static_cast<int32_t>(core::Max(end, -kFar)),
              static_cast<int32_t>(core::Min(prefix, kFar)), mask.band_count <= 1 || prefix == 0};
  }

  // What an existing row sees, but for dense terms.
  __device__ __forceinline__ RowView KeysOf(const Item& item, int row) const {
    RowView view = {};
    if (kVariant == Variant::kPlain || slope_.is_exact) {
      view.begin = core::Clamp(slope_.begin + row, 0, item.keys);
      view.end = core::Clamp(core::Max(slope_.end + row, slope_.prefix), view.begin, item.keys);
    } else {
      const core::Interval keys =
          core::VisibleKeys(problem_.mask, item.sequence, item.head, item.first_row + row);
      view.begin = static_cast<int>(keys.begin);
      view.end = static_cast<int>(keys.end);
    }
    return view;
  }

  __device__ __forceinline__ void FindKeys(Item& item) {
    const Sequence& s = item.sequence;
    item.keys = static_cast<int>(core::LocalKeys(s));
    FindSlope(item);
    // Of the first row, the last, and the last of each warpgroup, by a lane each.
    const int row = lane_ == 0 ? 0 : lane_ == 1 ? item.existing_rows : 64 * (lane_ - 1);
    const RowView mine =
        KeysOf(item, core::Clamp(row - (lane_ == 0 ? 0 : 1), 0, item.existing_rows - 1));
    const auto of_lane = [](int value, int lane) { return __shfl_sync(~0u, value, lane); };
    const RowView first = {of_lane(mine.begin, 0), of_lane(mine.end, 0), nullptr};
    const RowView last = {of_lane(mine.begin, 1), of_lane(mine.end, 1), nullptr};
    item.begin = static_cast<uint32_t>(first.begin) / kBlockKeys;
    item.end = static_cast<uint32_t>(last.end + kBlockKeys - 1) / kBlockKeys;
    item.full_begin = static_cast<uint32_t>(last.begin + kBlockKeys - 1) / kBlockKeys;
    item.full_end = static_cast<uint32_t>(first.end) / kBlockKeys;
    item.has_tiles = item.end > item.begin;
    if (kVariant == Variant::kPlain || HasWords<kVariant>(params_)) return;
    const bool has_dense = MayHaveDense(kVariant) && problem_.mask.dense.words != nullptr;
    for (int w = 0; w < kPolicy.warpgroups; ++w) {
      const uint32_t end = of_lane(mine.end, w + 2) + kBlockKeys - 1;
      item.ends[w] = core::Max(static_cast<int>(end / kBlockKeys), item.begin + 1);
      // A dense term may hide all tiles before.
      if (has_dense || item.existing_rows <= 64 * w) item.ends[w] = item.end;
    }
    if (!has_dense) return;
    // A dense term may hide all of them.
    bool has_any = false;
    for (int start = item.begin; start < item.end && !has_any; start += kWarpSize) {
      const int tile = start + lane_;
      has_any = __any_sync(~0u, tile < item.end && DenseClass<kBlockKeys>(problem_, item, tile) !=
                                                       core::TileClass::kEmpty);
    }
    item.has_tiles = has_any;
  }

  // An item is announced before there is a place for its Q, so that its first keys come meanwhile:
  // every warp has written the item three before. Not where Q is given back so early itself, and
  // not at head dimension 64, where four stages of keys are enough.
  static constexpr bool kIsEarly = kHeadDim > 128 ||
                                   (kHeadDim > 64 && !HasBias(kVariant) && !IsCareful(kVariant));

  // For the Q of the next item, and but for kIsEarly for the item itself: every warp has done with
  // the item two (kBias: with the Q of the one) before.
  __device__ __forceinline__ void WaitForPlace() const {
    Wait(Barrier(state_.query_empty[items_ % kPolicy.query_stages]),
         (items_ / kPolicy.query_stages & 1) ^ 1);
  }

  __device__ __forceinline__ void Announce(const Item& item) {
    const int stage = items_ % kPolicy.query_stages;
    const uint32_t full = Barrier(state_.query_full[stage]);
    if constexpr (!kIsEarly) WaitForPlace();
    if (kVariant != Variant::kPlain && item.has_tiles != 0) {
      for (int row = lane_; row < kPolicy.block_rows; row += kWarpSize) {
        state_.views[items_ % kItems][row] = FindView(item, row);
      }
      __syncwarp();
    }
    if (lane_ == 0) {
      state_.items[items_ % kItems] = item;
      Arrive(Barrier(state_.item_full[items_ % kItems]));
      if constexpr (kIsEarly) WaitForPlace();
      if (item.has_tiles != 0) {
        ArriveExpecting(full, kPolicy.query_bytes);
        const Sequence& s = item.sequence;
#pragma unroll
        for (int part = 0; part < kHeadDim / 64; ++part) {
          CopyBox(shared_ + stage * kPolicy.query_bytes + part * kPolicy.block_rows * 128,
                  &params_.query, full, 64 * part, static_cast<int>(s.q_start + item.first_row),
                  static_cast<int>(item.head), BatchIndex(problem_, s));
        }
      } else {
        Arrive(full);
      }
    }
    ++items_;
    __syncwarp();
  }

  // What a row sees: no key where it is not there, and its dense words are those of another.
  __device__ __forceinline__ RowView FindView(const Item& item, int row) const {
    const Sequence& s = item.sequence;
    RowView view = {};
    if (row < item.existing_rows) {
      view = KeysOf(item, row);
      if constexpr (MayHaveWords(kVariant)) KeepRanges(item, row, view);
    }
    const core::DenseBits& dense = problem_.mask.dense;
    if (MayHaveDense(kVariant) && dense.words != nullptr) {
      const int64_t i = core::Min<int64_t>(s.q_offset + item.first_row + row, dense.q_extent - 1);
      view.words =
          dense.words + core::DenseWordIndex(dense, s.batch, item.head, i, s.kv_offset / 64);
    }
    return view;
  }

  __device__ __forceinline__ void KeepRanges(const Item& item, int row, RowView& view) const {
    const Sequence& s = item.sequence;
    for (int t = 0; t < problem_.mask.row_ranges_count; ++t) {
      const core::RowRangesTerm& term = problem_.mask.row_ranges[t];
      if (!IsOneRange(term)) continue;
      const int32_t* const range = term.data + s.batch * term.batch_stride +
                                   item.head * term.head_stride +
                                   (s.q_offset + item.first_row + row) * term.row_stride;
      const auto local = [&](int64_t key) {
        return static_cast<int>(core::Clamp<int64_t>(key - s.kv_offset, 0, item.keys));
      };
      view.begin = core::Max(view.begin, local(range[0]));
      view.end = core::Min(view.end, local(range[term.end_stride]));
    }
  }

  using Base = LoadingWarp<kHeadDim, kVariant>;
  using Base::kBlockKeys;
  using Base::kPolicy;
  using Base::lane_;
  using Base::params_;
  using Base::problem_;
  using Base::shared_;
  using Base::state_;
  // Local keys that rows see: of row 0, one more for each other row.
  struct Slope {
    int32_t begin;
    int32_t end;
    int32_t prefix;  // all see the keys before it
    bool is_exact;   // else each row is asked for by itself
  };
  Slope slope_;
  uint32_t items_ = 0;  // announced
};

template <int kHeadDim, Variant kVariant>
class TileWarp : LoadingWarp<kHeadDim, kVariant> {
 public:
  using LoadingWarp<kHeadDim, kVariant>::LoadingWarp;

  __device__ void Run() {
    for (uint32_t n = 0;; ++n) {
      Wait(Barrier(state_.item_full[n % kItems]), n / kItems & 1);
      item_ = &state_.items[n % kItems];
      if (item_->is_end != 0) return;
      if (item_->has_tiles == 0) continue;
      kv_head_ = static_cast<int>(item_->head / problem_.group);
      kv_start_ = static_cast<int>(item_->sequence.kv_start);
      batch_ = BatchIndex(problem_, item_->sequence);
      ListTiles(item_->begin, item_->end);
    }
  }

 private:
  // From the last tile to the first: with causal masks the tile in which every row sees something
  // comes first.
  __device__ __forceinline__ void ListTiles(int begin, int end) {
    if (HasWords<kVariant>(params_)) {
      ListGroups(begin, end);
    } else if (!MayHaveDense(kVariant) || problem_.mask.dense.words == nullptr) {
      if (lane_ == 0) {
        for (int tile = end - 1; tile >= begin; --tile) {
          Add(tile, IsFull(tile) ? 0 : Tile::kStructuredPart);
        }
      }
    } else {
      for (int first = end - 1; first >= begin; first -= kWarpSize) {
        const int mine = first - lane_;
        core::TileClass by_dense = core::TileClass::kEmpty;
        if (mine >= begin) by_dense = DenseClass<kBlockKeys>(problem_, *item_, mine);
        uint32_t left = __ballot_sync(~0u, by_dense != core::TileClass::kEmpty);
        const uint32_t partial = __ballot_sync(~0u, by_dense == core::TileClass::kPartial);
        if (lane_ == 0) {
          for (; left != 0; left &= left - 1) {
            const int n = __ffs(static_cast<int>(left)) - 1;
            Add(first - n, (IsFull(first - n) ? 0 : Tile::kStructuredPart) |
                               ((partial >> n & 1) != 0 ? Tile::kDensePart : 0));
          }
        }
      }
    }
    if (lane_ == 0) Finish();
    __syncwarp();
  }

  // Those that ClassWarp found.
  __device__ __forceinline__ void ListGroups(int begin, int end) {
    if constexpr (MayHaveWords(kVariant)) {
      for (int first = end - 1; first >= begin; first -= kWarpSize) {
        const int slot = groups_ % kTileGroups;
        Wait(Barrier(state_.group_full[slot]), groups_ / kTileGroups & 1);
        const TileGroup group = state_.groups[slot];
        __syncwarp();
        ++groups_;
        if (lane_ != 0) continue;
        Arrive(Barrier(state_.group_empty[slot]));
        for (uint32_t left = group.visible; left != 0; left &= left - 1) {
          const int n = __ffs(static_cast<int>(left)) - 1;
          const auto property = [n](uint32_t tiles, uint32_t value) {
            return (tiles >> n & 1) != 0 ? value : 0;
          };
          Add(first - n, property(group.structured, Tile::kStructuredPart) |
                             property(group.dense, Tile::kDensePart) |
                             property(group.words, Tile::kWordPart) |
                             property(group.nothing, Tile::kNothing));
        }
      }
    }
  }

  // Whether lengths and bands hide nothing of a tile.
  __device__ __forceinline__ bool IsFull(int tile) const {
    return tile >= item_->full_begin && tile < item_->full_end;
  }

  // Tiles by lane 0. Whether one is the last is known when the next comes: K of a tile is loaded
  // then, and V after the K of the next.
  __device__ __forceinline__ void Add(int index, uint32_t properties) {
    if (has_pending_) LoadPending(0);
    has_pending_ = true;
    pending_ = {static_cast<uint32_t>(index) << Tile::kPropertyBits | properties};
  }
  __device__ __forceinline__ void Finish() {
    LoadPending(Tile::kLast);
    LoadValues(last_);
    has_pending_ = false;
    last_ = kNone;
  }
  __device__ __forceinline__ void LoadPending(uint32_t is_last) {
    const int stage = keys_ % kPolicy.stages;
    Wait(Barrier(state_.key_empty[stage]), (keys_ / kPolicy.stages & 1) ^ 1);
    state_.tiles[stage] = {pending_.word | is_last};
    if constexpr (MayHaveWords(kVariant)) {
      if (HasWords<kVariant>(params_)) Arrive(Barrier(state_.tile_known[stage]));
    }
    if constexpr (HasDenseRows(kVariant)) {
      if (CopiesDenseRows<kVariant>(params_)) Arrive(Barrier(state_.tile_known[stage]));
    }
    Load(&params_.keys, Barrier(state_.key_full[stage]), State::kKeyOffset, stage,
         pending_.Index());
    ++keys_;
    if constexpr (kPolicy.bias_parts == 2) LoadBias(0);
    if (last_ != kNone) LoadValues(last_);
    LoadBias(kPolicy.bias_parts - 1);
    last_ = pending_.Index();
  }
  // A part of the bias of the pending tile. The last one has to wait for one of the tile before.
  __device__ __forceinline__ void LoadBias(int part) {
    if constexpr (HasBias(kVariant)) {
      const int stage = biases_ % kPolicy.bias_stages;
      Wait(Barrier(state_.bias_empty[stage]), (biases_ / kPolicy.bias_stages & 1) ^ 1);
      const uint32_t full = Barrier(state_.bias_full[stage]);
      const BiasSource& bias = params_.bias;
      const Sequence& s = item_->sequence;
      ArriveExpecting(full, bias.per_row != 0 ? kPolicy.bias_bytes : kBiasKeys * 2);
      CopyBox(shared_ + State::kBiasOffset + stage * kPolicy.bias_bytes, &bias.map, full,
              static_cast<int>(s.kv_offset) + pending_.FirstKey() + part * kBiasKeys,
              static_cast<int>(s.q_offset + item_->first_row) * bias.per_row,
              static_cast<int>(item_->head) * bias.per_head,
              static_cast<int>(s.batch) * bias.per_batch);
      ++biases_;
    }
  }
  __device__ __forceinline__ void LoadValues(int index) {
    const int stage = values_ % kPolicy.value_stages;
    Wait(Barrier(state_.value_empty[stage]), (values_ / kPolicy.value_stages & 1) ^ 1);
    Load(&params_.values, Barrier(state_.value_full[stage]), State::kValueOffset, stage, index);
    ++values_;
  }
  __device__ __forceinline__ void Load(const CUtensorMap* map, uint32_t barrier, int offset,
                                       int stage, int index) {
    ArriveExpecting(barrier, kPolicy.tile_bytes);
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      CopyBox(shared_ + offset + stage * kPolicy.tile_bytes + part * kBlockKeys * 128, map, barrier,
              64 * part, kv_start_ + index * kBlockKeys, kv_head_, batch_);
    }
  }

  static constexpr int kNone = -1;

  using Base = LoadingWarp<kHeadDim, kVariant>;
  using Base::kBlockKeys;
  using Base::kPolicy;
  using Base::lane_;
  using Base::params_;
  using Base::problem_;
  using Base::shared_;
  using Base::state_;
  using typename Base::State;
  using typename Base::Tile;
  const Item* item_;
  uint32_t keys_ = 0;  // tiles loaded
  uint32_t values_ = 0;
  uint32_t biases_ = 0;  // parts of tiles
  uint32_t groups_ = 0;
  bool has_pending_ = false;
  Tile pending_;
  int last_ = kNone;  // the tile whose V comes next
  int kv_head_, kv_start_, batch_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_LOADING_CUH_
