// The two loading warps of masks that leave rows more than one interval of keys (row ranges,
// segments, block-sparse lists, prefixes of bands with a left edge): ClassWarp goes ahead and tells
// the tiles apart, 32 at a time, WordWarp writes what the rows see of the partial ones while the
// tile before is multiplied.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_WORDS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_WORDS_CUH_

#include "backend_cuda/hopper/forward_state.cuh"

namespace tandem::cuda::hopper {

template <int kHeadDim, Variant kVariant>
class ClassWarp : LoadingWarp<kHeadDim, kVariant> {
 public:
  using LoadingWarp<kHeadDim, kVariant>::LoadingWarp;

  __device__ void Run() {
    for (uint32_t n = 0;; ++n) {
      Wait(Barrier(state_.item_full[n % kItems]), n / kItems & 1);
      item_ = &state_.items[n % kItems];
      if (item_->is_end != 0) return;
      if (item_->has_tiles != 0) Classify();
    }
  }

 private:
  // Tiles [begin, end) from the last to the first. Where none is visible one is visited all the
  // same.
  __device__ __forceinline__ void Classify() {
    FindRangesHull();
    FindSegments();
    bool has_any = false;
    for (int first = item_->end - 1; first >= item_->begin; first -= kWarpSize) {
      TileGroup group = {};
      if (first >= hull_begin_ && first - kWarpSize < hull_end_) group = ClassifyGroup(first);
      has_any = has_any || group.visible != 0;
      if (!has_any && first - kWarpSize < item_->begin) {
        group.visible = group.nothing = 1u << (first - item_->begin);
      }
      const int slot = groups_ % kTileGroups;
      Wait(Barrier(state_.group_empty[slot]), (groups_ / kTileGroups & 1) ^ 1);
      if (lane_ == 0) {
        state_.groups[slot] = group;
        Arrive(Barrier(state_.group_full[slot]));
      }
      ++groups_;
      __syncwarp();
    }
  }

  __device__ __forceinline__ TileGroup ClassifyGroup(int first) const {
    const core::Mask& mask = problem_.mask;
    const Sequence& s = item_->sequence;
    const int64_t row = s.q_offset + item_->first_row;
    const int64_t rows_end = row + item_->existing_rows;
    // A tile of this lane's own, of those terms whose classes do not take many steps.
    const int tile = first - lane_;
    const int64_t key = s.kv_offset + int64_t{tile} * kBlockKeys;
    const int64_t keys_end = s.kv_offset + core::Min<int64_t>((tile + 1) * kBlockKeys, item_->keys);
    core::TileClass lists = core::TileClass::kEmpty;
    core::TileClass dense = core::TileClass::kFull;
    if (tile >= item_->begin) {
      lists = core::TileClass::kFull;
      for (int t = 0; t < mask.band_count; ++t) {
        if (core::IsInterval(mask.bands[t])) continue;
        lists = core::CombineTerms(
            lists, core::ClassifyBand(mask.bands[t], s, item_->head, row, rows_end, key, keys_end));
      }
      for (int t = 0; t < mask.block_sparse_count; ++t) {
        lists = core::CombineTerms(
            lists, ClassifyLists(mask.block_sparse[t], row, rows_end, key, keys_end));
      }
      if (mask.dense.words != nullptr) dense = DenseClass<kBlockKeys>(problem_, *item_, tile);
    }
    const bool is_interval = tile >= item_->full_begin && tile < item_->full_end;
    const auto among = [](bool is_one) { return __ballot_sync(~0u, is_one); };
    TileGroup group = {};
    uint32_t within = among(is_interval);  // full by what the rows' views have
    group.visible = among(lists != core::TileClass::kEmpty && dense != core::TileClass::kEmpty);
    uint32_t full = among(lists == core::TileClass::kFull);
    for (int t = 0; t < mask.row_ranges_count && group.visible != 0; ++t) {
      ClassifyRanges(mask.row_ranges[t], first, &group.visible,
                     IsOneRange(mask.row_ranges[t]) ? &within : &full);
    }
    for (int t = 0; t < mask.segments_count && group.visible != 0; ++t) {
      ClassifySegments(t, first, &group.visible, &full);
    }
    group.structured = ~within & group.visible;
    group.dense = among(dense == core::TileClass::kPartial) & group.visible;
    group.words = ~full & group.visible;
    return group;
  }

  // core::ClassifyBlockSparse, with short divisions.
  __device__ __forceinline__ core::TileClass ClassifyLists(const core::BlockSparseTerm& term,
                                                           int64_t row, int64_t rows_end,
                                                           int64_t key, int64_t keys_end) const {
    const uint32_t q_block = static_cast<uint32_t>(term.q_block);
    const uint32_t kv_block = static_cast<uint32_t>(term.kv_block);
    const uint32_t first = static_cast<uint32_t>(key) / kv_block;
    const uint32_t last = static_cast<uint32_t>(keys_end - 1) / kv_block;
    const uint32_t last_row = static_cast<uint32_t>(rows_end - 1) / q_block;
    bool any = false;
    bool all = true;
    for (uint32_t i = static_cast<uint32_t>(row) / q_block; i <= last_row; ++i) {
      const uint32_t* const blocks = term.bits + item_->sequence.batch * term.batch_stride +
                                     item_->head * term.head_stride + i * term.row_stride;
      for (uint32_t j = first; j <= last; ++j) {
        const bool is_listed = (blocks[j >> 5] >> (j & 31) & 1) != 0;
        any = any || is_listed;
        all = all && is_listed;
      }
    }
    return !any  ? core::TileClass::kEmpty
           : all ? core::TileClass::kFull
                 : core::TileClass::kPartial;
  }

  // Bits of the tiles [begin, end) in a group.
  static __device__ __forceinline__ uint32_t TileBits(int first, int begin, int end) {
    const int low = core::Clamp(first - end + 1, 0, 32);
    const int high = core::Clamp(first - begin + 1, 0, 32);
    return low >= high ? 0 : (~0u >> (32 - high)) & (~0u << low);
  }

  // Calls visit(row, begin, end) for the ranges of this lane's rows, local keys.
  template <typename Visit>
  __device__ __forceinline__ void ForEachRange(const core::RowRangesTerm& term, Visit visit) const {
    const Sequence& s = item_->sequence;
    const int32_t* const rows = term.data + s.batch * term.batch_stride +
                                item_->head * term.head_stride +
                                (s.q_offset + item_->first_row) * term.row_stride;
    for (int row = lane_; row < item_->existing_rows; row += kWarpSize) {
      for (int64_t r = 0; r < term.count; ++r) {
        const int32_t* const range = rows + row * term.row_stride + r * term.range_stride;
        const auto local = [&](int64_t key) {
          return static_cast<int>(core::Clamp<int64_t>(key - s.kv_offset, 0, item_->keys));
        };
        visit(row, local(range[0]), local(range[term.end_stride]));
      }
    }
  }

  // The tiles outside which row ranges hide everything.
  __device__ __forceinline__ void FindRangesHull() {
    hull_begin_ = 0;
    hull_end_ = INT32_MAX;
    for (int t = 0; t < problem_.mask.row_ranges_count; ++t) {
      int least = INT32_MAX;
      int most = 0;
      ForEachRange(problem_.mask.row_ranges[t], [&](int, int begin, int end) {
        if (begin >= end) return;
        least = core::Min(least, begin);
        most = core::Max(most, end);
      });
      hull_begin_ = core::Max(hull_begin_, __reduce_min_sync(~0u, least) / kBlockKeys);
      hull_end_ = core::Min(hull_end_, core::CeilDiv(__reduce_max_sync(~0u, most), kBlockKeys));
    }
  }

  // By the rows of the block, each of which has some tiles and all of some.
  __device__ __forceinline__ void ClassifyRanges(const core::RowRangesTerm& term, int first,
                                                 uint32_t* visible, uint32_t* full) const {
    uint32_t some = 0;
    uint32_t all = ~0u;
    uint32_t all_of_row = 0;
    int last_row = -1;
    ForEachRange(term, [&](int row, int begin, int end) {
      if (row != last_row) {
        if (last_row >= 0) all &= all_of_row;
        all_of_row = 0;
        last_row = row;
      }
      if (begin >= end) return;
      some |= TileBits(first, begin / kBlockKeys, core::CeilDiv(end, kBlockKeys));
      all_of_row |= TileBits(first, core::CeilDiv(begin, kBlockKeys),
                             end == item_->keys ? INT32_MAX : end / kBlockKeys);
    });
    if (last_row >= 0) all &= all_of_row;
    *visible &= __reduce_or_sync(~0u, some);
    *full &= __reduce_and_sync(~0u, all);
  }

  // The segments of the block's rows, and, of a new sequence, those of its first tiles.
  __device__ __forceinline__ void FindSegments() {
    const Sequence& s = item_->sequence;
    for (int t = 0; t < problem_.mask.segments_count; ++t) {
      SegmentRange rows = {INT32_MAX, INT32_MIN};
      for (int row = lane_; row < item_->existing_rows; row += kWarpSize) {
        const int segment =
            core::QuerySegment(problem_.mask.segments[t], s, s.q_offset + item_->first_row + row);
        rows = {core::Min(rows.least, segment), core::Max(rows.most, segment)};
      }
      of_rows_[t] = {__reduce_min_sync(~0u, rows.least), __reduce_max_sync(~0u, rows.most)};
    }
    if (s.batch == batch_) return;
    batch_ = s.batch;
    const int tiles = core::Min(core::CeilDiv(item_->keys, kBlockKeys), kMostKnownTiles);
    for (int t = 0; t < problem_.mask.segments_count; ++t) {
      for (int first = tiles - 1; first >= 0; first -= kWarpSize) {
        const SegmentRange mine = ReadSegments(problem_.mask.segments[t], first);
        if (first >= lane_) state_.segments[t][first - lane_] = mine;
      }
    }
    __syncwarp();
  }

  // Those of the keys of this lane's tile, read by all lanes for one tile after the other.
  __device__ __forceinline__ SegmentRange ReadSegments(const core::SegmentsTerm& term,
                                                       int first) const {
    constexpr int kAtOnce = 4;
    const Sequence& s = item_->sequence;
    SegmentRange mine = {};
    for (int n = 0; n < kWarpSize; n += kAtOnce) {
      SegmentRange part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        part[i] = {INT32_MAX, INT32_MIN};
        const int tile = core::Max(first - n - i, 0);
#pragma unroll
        for (int offset = 0; offset < kBlockKeys; offset += kWarpSize) {
          const int key = core::Min(tile * kBlockKeys + offset + lane_, item_->keys - 1);
          const int segment = core::KeySegment(term, s, s.kv_offset + key);
          part[i] = {core::Min(part[i].least, segment), core::Max(part[i].most, segment)};
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const SegmentRange whole = {__reduce_min_sync(~0u, part[i].least),
                                    __reduce_max_sync(~0u, part[i].most)};
        if (lane_ == n + i) mine = whole;
      }
    }
    return mine;
  }

  // As core::ClassifySegments.
  __device__ __forceinline__ void ClassifySegments(int t, int first, uint32_t* visible,
                                                   uint32_t* full) const {
    SegmentRange keys = {INT32_MAX, INT32_MIN};
    if (first >= kMostKnownTiles) {
      keys = ReadSegments(problem_.mask.segments[t], first);
    } else if (first >= lane_) {
      keys = state_.segments[t][first - lane_];
    }
    const SegmentRange rows = t == 0 ? of_rows_[0] : of_rows_[1];
    const bool is_empty =
        rows.most < 0 || keys.most < 0 || rows.most < keys.least || keys.most < rows.least;
    const bool is_full =
        rows.least == rows.most && keys.least == keys.most && rows.least == keys.least;
    *visible &= __ballot_sync(~0u, !is_empty);
    *full &= __ballot_sync(~0u, is_full);
  }

  using Base = LoadingWarp<kHeadDim, kVariant>;
  using Base::kBlockKeys;
  using Base::lane_;
  using Base::problem_;
  using Base::state_;
  const Item* item_;
  uint32_t groups_ = 0;
  int64_t batch_ = -1;  // the sequence whose tiles' segments are known
  int hull_begin_;
  int hull_end_;
  SegmentRange of_rows_[core::kMaxSegments];
};

template <int kHeadDim, Variant kVariant>
class WordWarp : LoadingWarp<kHeadDim, kVariant> {
 public:
  using LoadingWarp<kHeadDim, kVariant>::LoadingWarp;

  __device__ void Run() {
    has_segments_alone_ = HasSegmentsAlone();
    for (uint32_t n = 0;; ++n) {
      Wait(Barrier(state_.item_full[n % kItems]), n / kItems & 1);
      item_ = &state_.items[n % kItems];
      if (item_->is_end != 0) return;
      if (item_->has_tiles == 0) continue;
      for (bool is_last = false; !is_last; ++tiles_) {
        const int stage = tiles_ % kPolicy.stages;
        Wait(Barrier(state_.tile_known[stage]), tiles_ / kPolicy.stages & 1);
        const Tile tile = state_.tiles[stage];
        if (tile.HasWords()) Write(tile, state_.words[stage]);
        __syncwarp();
        if (lane_ == 0) Arrive(Barrier(state_.key_full[stage]));
        is_last = tile.IsLast();
      }
    }
  }

 private:
  using Tile = typename LoadingWarp<kHeadDim, kVariant>::Tile;
  static constexpr int kParts = LoadingWarp<kHeadDim, kVariant>::kBlockKeys / 32;
  static constexpr int kDone = INT32_MIN;  // in place of a segment; none is visible below 0
  // Keys of a tile, bit j of part n for key 32 n + j.
  struct KeyBits {
    uint32_t part[kParts];
  };

  __device__ __forceinline__ bool HasSegmentsAlone() const {
    const core::Mask& mask = problem_.mask;
    bool is_alone = mask.segments_count == 1 && mask.block_sparse_count == 0;
    for (int t = 0; t < mask.band_count; ++t) {
      is_alone = is_alone && core::IsInterval(mask.bands[t]);
    }
    for (int t = 0; t < mask.row_ranges_count; ++t) {
      is_alone = is_alone && IsOneRange(mask.row_ranges[t]);
    }
    return is_alone;
  }

  __device__ __forceinline__ void Write(const Tile& tile, uint4* words) const {
    const bool is_nothing = (tile.word & Tile::kNothing) != 0;
    if (!is_nothing && has_segments_alone_) return WriteSegments(tile, words);
    KeyBits of_key[core::kMaxSegments];
#pragma unroll
    for (int t = 0; t < core::kMaxSegments; ++t) {
      if (t < problem_.mask.segments_count) of_key[t] = SegmentsOfKeys(t, tile);
    }
#pragma unroll 2
    for (int row = lane_; row < kPolicy.block_rows; row += kWarpSize) {
      KeyBits keys = {};
      if (!is_nothing && row < item_->existing_rows) keys = KeysOfRow(tile, row);
#pragma unroll
      for (int t = 0; t < core::kMaxSegments; ++t) {
        if (t < problem_.mask.segments_count) KeepSegment(t, of_key[t], row, keys);
      }
      words[row] = InQuads(keys);
    }
  }

  // Where segments alone make words: all rows of a segment see the same.
  __device__ __forceinline__ void WriteSegments(const Tile& tile, uint4* words) const {
    const core::SegmentsTerm& term = problem_.mask.segments[0];
    const Sequence& s = item_->sequence;
    const KeyBits of_key = SegmentsOfKeys(0, tile);
    int segments[kPolicy.block_rows / kWarpSize];
#pragma unroll
    for (int n = 0; n < kPolicy.block_rows / kWarpSize; ++n) {
      const int row = kWarpSize * n + lane_;
      segments[n] = -1;
      if (row < item_->existing_rows) {
        segments[n] =
            core::Max(-1, core::QuerySegment(term, s, s.q_offset + item_->first_row + row));
      }
    }
#pragma unroll
    for (int n = 0; n < kPolicy.block_rows / kWarpSize; ++n) {
      uint32_t left = __ballot_sync(~0u, segments[n] != kDone);
      while (left != 0) {
        const int one = __shfl_sync(~0u, segments[n], __ffs(static_cast<int>(left)) - 1);
        KeyBits keys = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint32_t bits = __ballot_sync(~0u, static_cast<int>(of_key.part[part]) == one);
          if (one >= 0) keys.part[part] = bits;
        }
        const uint4 quads = InQuads(keys);
#pragma unroll
        for (int m = n; m < kPolicy.block_rows / kWarpSize; ++m) {
          if (segments[m] != one) continue;
          words[kWarpSize * m + lane_] = quads;
          segments[m] = kDone;
        }
        left = __ballot_sync(~0u, segments[n] != kDone);
      }
    }
  }

  // Word c of a row: bit 2 t + e for key 8 t + 2 c + e.
  static __device__ __forceinline__ uint4 InQuads(const KeyBits& keys) {
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t high[kParts];  // two bits of each byte, beside each other in the highest byte
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        high[n] = (keys.part[n] >> (2 * c) & 0x03030303u) * 0x01041040u;
      }
      words[c] = __byte_perm(high[0], high[1], 0x0073) & 0xffffu;
      if constexpr (kParts == 4) {
        words[c] = __byte_perm(words[c], __byte_perm(high[2], high[3], 0x0073), 0x5410);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Keys [begin, end) of the tile.
  static __device__ __forceinline__ void AddInterval(int64_t begin, int64_t end, KeyBits& keys) {
    const int low = static_cast<int>(core::Clamp<int64_t>(begin, 0, kBlockKeys));
    const int high = static_cast<int>(core::Clamp<int64_t>(end, 0, kBlockKeys));
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      keys.part[n] |= BitsBelow(high - 32 * n) & ~BitsBelow(low - 32 * n);
    }
  }
  static __device__ __forceinline__ uint32_t BitsBelow(int n) {
    return __funnelshift_rc(~0u, 0u, 32u - static_cast<uint32_t>(core::Clamp(n, 0, 32)));
  }

  // What a row sees by the terms that look at it alone; lengths and bands that are intervals, and
  // the dense term, are left to those who read the words.
  __device__ __forceinline__ KeyBits KeysOfRow(const Tile& tile, int row) const {
    const core::Mask& mask = problem_.mask;
    const Sequence& s = item_->sequence;
    const int64_t i = s.q_offset + item_->first_row + row;
    const int64_t first_key = s.kv_offset + tile.FirstKey();
    KeyBits keys;
#pragma unroll
    for (int n = 0; n < kParts; ++n) keys.part[n] = ~0u;
    const auto keep = [&](const KeyBits& allowed) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) keys.part[n] &= allowed.part[n];
    };
    for (int t = 0; t < mask.band_count; ++t) {
      const core::BandTerm& band = mask.bands[t];
      if (core::IsInterval(band)) continue;
      const core::Interval seen = core::BandInterval(band, s, item_->head, i);
      KeyBits allowed = {};
      AddInterval(seen.begin - first_key, seen.end - first_key, allowed);
      AddInterval(-first_key, core::BandPrefix(band, s) - first_key, allowed);
      keep(allowed);
    }
    for (int t = 0; t < mask.row_ranges_count; ++t) {
      const core::RowRangesTerm& term = mask.row_ranges[t];
      if (IsOneRange(term)) continue;
      const int32_t* const ranges = term.data + s.batch * term.batch_stride +
                                    item_->head * term.head_stride + i * term.row_stride;
      KeyBits allowed = {};
      for (int64_t r = 0; r < term.count; ++r) {
        const int32_t* const range = ranges + r * term.range_stride;
        AddInterval(range[0] - first_key, range[term.end_stride] - first_key, allowed);
      }
      keep(allowed);
    }
    for (int t = 0; t < mask.block_sparse_count; ++t) {
      const core::BlockSparseTerm& term = mask.block_sparse[t];
      const uint32_t q_block = static_cast<uint32_t>(i) / static_cast<uint32_t>(term.q_block);
      const uint32_t* const blocks = term.bits + s.batch * term.batch_stride +
                                     item_->head * term.head_stride + q_block * term.row_stride;
      const int kv_block = static_cast<int>(term.kv_block);
      const int end = core::Min(item_->keys - tile.FirstKey(), kBlockKeys);
      uint32_t block = static_cast<uint32_t>(first_key) / static_cast<uint32_t>(kv_block);
      int64_t begin = int64_t{block} * kv_block - first_key;
      KeyBits allowed = {};
      for (; begin < end; ++block, begin += kv_block) {
        if ((blocks[block >> 5] >> (block & 31) & 1) == 0) continue;
        AddInterval(begin, begin + kv_block, allowed);
      }
      keep(allowed);
    }
    return keys;
  }

  // Of keys `lane` + 32 n.
  __device__ __forceinline__ KeyBits SegmentsOfKeys(int t, const Tile& tile) const {
    const Sequence& s = item_->sequence;
    KeyBits segments;
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const int key = tile.FirstKey() + kWarpSize * n + lane_;
      segments.part[n] = static_cast<uint32_t>(
          key < item_->keys ? core::KeySegment(problem_.mask.segments[t], s, s.kv_offset + key)
                            : -1);
    }
    return segments;
  }

  // Hides keys of other segments, by all lanes: for each segment that a row of theirs is of, the
  // keys that are of it.
  __device__ __forceinline__ void KeepSegment(int t, const KeyBits& of_key, int row,
                                              KeyBits& keys) const {
    const Sequence& s = item_->sequence;
    const int segment =
        row < item_->existing_rows
            ? core::QuerySegment(problem_.mask.segments[t], s, s.q_offset + item_->first_row + row)
            : -1;
    KeyBits kept = {};
    for (uint32_t left = __ballot_sync(~0u, segment >= 0); left != 0;) {
      const int one = __shfl_sync(~0u, segment, __ffs(static_cast<int>(left)) - 1);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        const uint32_t bits = __ballot_sync(~0u, static_cast<int>(of_key.part[n]) == one);
        if (segment == one) kept.part[n] = bits;
      }
      left &= ~__ballot_sync(~0u, segment == one);
    }
#pragma unroll
    for (int n = 0; n < kParts; ++n) keys.part[n] &= kept.part[n];
  }

  using Base = LoadingWarp<kHeadDim, kVariant>;
  using Base::kBlockKeys;
  using Base::kPolicy;
  using Base::lane_;
  using Base::problem_;
  using Base::state_;
  const Item* item_;
  uint32_t tiles_ = 0;
  bool has_segments_alone_;
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_WORDS_CUH_
