// The portable forward kernel (sm_80 and newer): flash attention on warp-level tensor-core
// products, for sequences with more than a few query rows (short_kernel.cuh has the others).
//
// A block serves `block_rows` query rows of one head of one sequence and walks over the key tiles
// that these rows may see: it classifies tiles in chunks of one per thread and keeps the visible
// ones in a list. K and V tiles take turns: each is loaded asynchronously while the one before it
// is multiplied; with a K tile come the dense mask's words and the bias of the step. Steps that are
// like most have a loop of their own (VisitWholeSteps), the others the general step (VisitTile).
//
// NaN and infinity in V at hidden pairs would reach the output as 0 * NaN. That is not looked for
// in advance: a block whose output has a NaN starts again on the careful path, which takes such
// elements out of the tile and gives every other row the same bits.
//
// A row's bits depend on its own sequence, head and terms alone: tiles start at multiples of
// block_keys, and every step treats its rows independently of each other.
#ifndef TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_

#include "backend_cuda/forward_state.cuh"
#include "backend_cuda/warp_output.cuh"

namespace tandem::cuda {

template <DType kDType, int kHeadDim, ScoreTerms kTerms>
class ForwardBlock {
 public:
  static constexpr bool kIsPlain =
      kTerms == ScoreTerms::kStructured || kTerms == ScoreTerms::kHiding;
  static constexpr bool kMayBeDense = kTerms != ScoreTerms::kStructured;
  static constexpr TilePolicy kPolicy = ForwardPolicy(kDType, kHeadDim);
  static constexpr int kKeyTiles = kPolicy.block_keys / 8;
  using Warp = WarpAttention<kDType, kHeadDim, kPolicy.row_tiles, kKeyTiles>;

  __device__ ForwardBlock(const ForwardParams& params, char* shared)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        state_(*reinterpret_cast<BlockState*>(shared + kStateOffset)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        query_address_(SharedAddress(shared) + Warp::RowMajorOffset(lane_) +
                       warp_ * kWarpRows * Warp::kRowBytes),
        key_address_(SharedAddress(Slot(0)) + Warp::KeyOffset(lane_)),
        value_address_(SharedAddress(Slot(1)) + Warp::RowMajorOffset(lane_)),
        chunk_address_(Column::Target(SharedAddress(Slot(0)), threadIdx.x)) {
    // Opaque, so that they are kept and not computed anew from the thread's index.
    asm volatile(""
                 : "+r"(query_address_), "+r"(key_address_), "+r"(value_address_),
                   "+r"(chunk_address_), "+r"(lane_));
  }

  __device__ void Run(int64_t batch, int64_t head, int64_t row_block) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(problem_, batch, &status);
    const int64_t first_row = row_block * kPolicy.block_rows;
    if (threadIdx.x == 0 && status != 0 && head == 0 && row_block == 0 &&
        problem_.device_status != nullptr) {
      atomicOr(problem_.device_status, status);
    }
    if (first_row >= s.q_rows) return;
    const bool is_short = IsShort(problem_, s);
    // Q is under way while the block finds out what to do.
    if (!kIsF32 && !is_short) StartQuery(s, head, first_row);
    if (threadIdx.x == 0) SetUp(s, head, first_row);
    __syncthreads();
    if (is_short) {
      // The kernel of short queries leaves rows that do not exist.
      WriteEmptyRows(problem_, s, head, core::Max<int64_t>(first_row, MaxShortRows(problem_.group)),
                     state_.rows_end);
      return;
    }
    if (kIsF32) StartQuery(s, head, first_row);
    PrepareCopies();
    bool is_careful = false;
    do {
      VisitTiles(is_careful);
      is_careful = !is_careful && __syncthreads_or(warp_state_.HasNanOutput());
    } while (is_careful);
    WriteRows();
  }

 private:
  static constexpr int kPlanes = Planes(kDType);
  static constexpr bool kIsF32 = kDType == DType::kF32;
  static constexpr DType kRowType = kMathType<kDType>;  // of K and V rows, or of their planes
  static constexpr int kStateOffset = kPolicy.query_bytes + 2 * kPolicy.tile_bytes;
  static constexpr int kBiasOffset = kStateOffset + static_cast<int>(sizeof(BlockState));
  static constexpr int kWarpRows = 16 * kPolicy.row_tiles;
  static constexpr int kQueryPlaneBytes = kPolicy.query_bytes / kPlanes;
  static constexpr int kTilePlaneBytes = kPolicy.tile_bytes / kPlanes;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, of a row
  using Column = ChunkColumn<kHeadDim, kPolicy.block_keys, kPolicy.threads>;
  static_assert(core::kTile % kPolicy.block_keys == 0, "a step lies in one canonical tile");
  static_assert(kPolicy.threads <= 128 && kPolicy.block_rows <= 128,
                "the state holds one entry per thread and one per row");
  static_assert(sizeof(BlockState) % 16 == 0, "the bias tile would not be aligned");
  static_assert(kPolicy.query_bytes % 1024 == 0 && kPolicy.tile_bytes % 1024 == 0,
                "fragment addresses are made by XOR");

  // ---- setup ----

  __device__ __forceinline__ void SetUp(const Sequence& sequence, int64_t head, int64_t first_row) {
    const int64_t kv_head = static_cast<uint32_t>(head) / static_cast<uint32_t>(problem_.group);
    state_.sequence = sequence;
    state_.head = head;
    state_.first_row = first_row;
    state_.rows_end = core::Min<int64_t>(state_.first_row + kPolicy.block_rows, sequence.q_rows);
    if constexpr (kIsF32) {
      state_.keys = PlaneSource(params_.keys, sequence, kv_head);
      state_.values = PlaneSource(params_.values, sequence, kv_head);
      state_.query_flags[0] = state_.query_flags[1] = 0;
    } else {
      state_.keys = MakeRowSource<kDType>(
          problem_.k, core::KeyOffset(problem_.k, sequence, kv_head, 0), problem_.qk_dim);
      state_.values = MakeRowSource<kDType>(
          problem_.v, core::KeyOffset(problem_.v, sequence, kv_head, 0), problem_.v_dim);
    }
    if (params_.bias_bytes != 0) {
      state_.bias = static_cast<const char*>(problem_.bias.data) +
                    core::BiasOffset(problem_.bias, sequence, head, sequence.q_offset + first_row,
                                     sequence.kv_offset) *
                        params_.bias_bytes;
    }
    const int rows = static_cast<int>(state_.rows_end - first_row);
    const RowIntervals intervals = FindRowIntervals(problem_.mask, sequence, head, first_row, rows);
    const core::Interval hull =
        intervals.are_all_terms
            ? intervals.Hull()
            : core::VisibleKeyHull(problem_.mask, sequence, head, first_row, state_.rows_end);
    const core::Interval common = intervals.Common(rows);
    state_.intervals = intervals;
    state_.tile_begin = hull.begin / kPolicy.block_keys;
    state_.tile_end = core::CeilDiv<int64_t>(hull.end, kPolicy.block_keys);
    state_.full_begin = core::CeilDiv<int64_t>(common.begin, kPolicy.block_keys);
    state_.full_end = common.end / kPolicy.block_keys;
  }

  __device__ __forceinline__ RowSource PlaneSource(const SplitTensor& tensor, const Sequence& s,
                                                   int64_t kv_head) const {
    RowSource source = {};
    source.base = reinterpret_cast<const char*>(tensor.planes + PlaneRow(problem_, s, kv_head) *
                                                                    kPlanes * kHeadDim);
    source.row_stride = kPlanes * kHeadDim;
    source.column_stride = 1;
    source.columns = kHeadDim;
    source.is_vector = true;
    return source;
  }

  __device__ __forceinline__ void StartQuery(const Sequence& s, int64_t head, int64_t first_row) {
    if (!kIsF32 && params_.has_whole_rows != 0 && first_row + kPolicy.block_rows <= s.q_rows) {
      using QueryColumn = ChunkColumn<kHeadDim, kPolicy.block_rows, kPolicy.threads>;
      const int64_t row_bytes = problem_.q.row_stride * 2;
      const char* rows = static_cast<const char*>(problem_.q.data) +
                         core::QueryOffset(problem_.q, s, head, first_row) * 2;
      QueryColumn::CopyWhole(QueryColumn::Target(SharedAddress(shared_), threadIdx.x),
                             QueryColumn::Source(rows, row_bytes, kHeadDim, threadIdx.x),
                             QueryColumn::kRowStep * row_bytes);
      CommitCopies();
      return;
    }
    const RowSource source = MakeRowSource<kDType>(
        problem_.q, core::QueryOffset(problem_.q, s, head, 0), problem_.qk_dim);
    StageTile<kDType, kHeadDim, kPolicy.block_rows, kPolicy.threads, TileUse::kScores>(
        source, first_row, s.q_rows, shared_, state_.query_flags, threadIdx.x);
    CommitCopies();
  }

  __device__ __forceinline__ void PrepareCopies() {
    key_chunk_ = Column::Source(state_.keys.base, state_.keys.row_stride * 2, state_.keys.columns,
                                threadIdx.x);
    value_chunk_ = Column::Source(state_.values.base, state_.values.row_stride * 2,
                                  state_.values.columns, threadIdx.x);
    if (IsDense()) state_.dense_rows[threadIdx.x] = DenseRow();
    Column::ClearBeyond(Slot(0), state_.keys.columns, threadIdx.x);
    Column::ClearBeyond(Slot(1), state_.values.columns, threadIdx.x);
  }

  // Waits for Q, but not for what was started after it in one group.
  __device__ __forceinline__ void FinishQuery() {
    WaitCopies<1>();
    if constexpr (!kIsF32) {
      if (problem_.scale < 0.0f) {
        FlipSigns<kHeadDim, kPolicy.block_rows, kPolicy.threads>(shared_, threadIdx.x);
      }
    }
    __syncthreads();
    if constexpr (kPolicy.query_in_registers) {
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int step = 0; step < Warp::kHeadSteps; ++step) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            Warp::LoadQuery(query_address_, step, m, plane, kQueryPlaneBytes,
                            query_[m][step][plane]);
          }
        }
      }
    }
  }

  // K tiles take slot 0, V tiles slot 1.
  __device__ __forceinline__ char* Slot(int slot) const {
    return shared_ + kPolicy.query_bytes + slot * kPolicy.tile_bytes;
  }

  // Lists the tiles of [begin, begin + threads) that are not EMPTY, with what hides pairs of them.
  __device__ __forceinline__ void ListVisibleTiles(int64_t begin) {
    const int64_t tile = begin + threadIdx.x;
    bool is_listed = false;
    int properties = 0;
    if (tile < state_.tile_end) {
      if (state_.intervals.are_all_terms && !IsDense()) {
        is_listed = true;
        if (tile < state_.full_begin || tile >= state_.full_end) properties = kIntervalPart;
      } else {
        const core::TileClasses classes = core::ClassifyTerms(
            problem_.mask, state_.sequence, state_.head, state_.first_row, state_.rows_end,
            tile * kPolicy.block_keys, (tile + 1) * kPolicy.block_keys);
        is_listed =
            core::CombineTerms(classes.structured, classes.dense) != core::TileClass::kEmpty;
        if (classes.structured == core::TileClass::kPartial) {
          properties |= state_.intervals.are_all_terms ? kIntervalPart : kStructuredPart;
        }
        if (kMayBeDense && classes.dense == core::TileClass::kPartial) properties |= kDensePart;
      }
      if ((tile + 1) * kPolicy.block_keys > core::LocalKeys(state_.sequence)) properties |= kCut;
      if constexpr (kIsF32) {
        if (is_listed) {
          if (StepFlags(params_.keys, tile * kPolicy.block_keys) != 0) properties |= kFlaggedKeys;
          if (StepFlags(params_.values, tile * kPolicy.block_keys) != 0) {
            properties |= kFlaggedValues;
          }
        }
      }
    }
    const uint32_t ballot = __ballot_sync(~0u, is_listed);
    if (lane_ == 0) state_.warp_counts[warp_] = __popc(ballot);
    __syncthreads();
    int position = __popc(ballot & ((1u << lane_) - 1u));
    int count = 0;
    for (int warp = 0; warp < kPolicy.threads / kWarpSize; ++warp) {
      if (warp < warp_) position += state_.warp_counts[warp];
      count += state_.warp_counts[warp];
    }
    if (is_listed)
      state_.list[position] = static_cast<uint16_t>(threadIdx.x << kPropertyBits | properties);
    if (threadIdx.x == 0) state_.list[count] = kCut;
    list_count_ = count;
    list_begin_ = static_cast<uint32_t>(begin);
    __syncthreads();
  }

  // A listed tile.
  struct Tile {
    uint32_t index;
    uint32_t properties;  // what hides pairs, and what is flagged

    __device__ __forceinline__ int64_t FirstKey() const {
      return static_cast<int64_t>(index) * kPolicy.block_keys;
    }
  };
  __device__ __forceinline__ Tile ListedTile(uint32_t entry) const {
    return {list_begin_ + (entry >> kPropertyBits), entry & ((1u << kPropertyBits) - 1)};
  }

  // ---- loads ----

  // Starts the load of a K tile, with the mask and the bias of its step.
  __device__ __forceinline__ void StartKeys(const Tile& tile) {
    if (params_.has_chunks) {
      CopyRows(key_chunk_, params_.key_steps, tile, 0);
    } else {
      StageElements<kRowType, kHeadDim, kPolicy.block_keys, kPolicy.threads, TileUse::kScores>(
          state_.keys, tile.FirstKey(), core::LocalKeys(state_.sequence), Slot(0), nullptr,
          threadIdx.x);
    }
    if (kMayBeDense && (tile.properties & kDensePart) != 0 && HasWholeWords()) {
      StageDenseWords(tile.FirstKey());
    }
    if constexpr (!kIsPlain) {
      if (params_.bias_bytes == 2) StageBias<2, false>(tile.FirstKey());
      if (params_.bias_bytes == 4) StageBias<4, false>(tile.FirstKey());
    }
    CommitCopies();
  }

  __device__ __forceinline__ void StartValues(const Tile& tile) {
    if (params_.has_chunks) {
      CopyRows(value_chunk_, params_.value_steps, tile, kPolicy.tile_bytes);
    } else {
      StageElements<kRowType, kHeadDim, kPolicy.block_keys, kPolicy.threads, TileUse::kValues>(
          state_.values, tile.FirstKey(), core::LocalKeys(state_.sequence), Slot(1), nullptr,
          threadIdx.x);
    }
    CommitCopies();
  }

  // Copies this thread's chunks of a tile into the slot at `offset`. `from`: its chunk of key 0.
  __device__ __forceinline__ void CopyRows(const char* from, const CopySteps& steps,
                                           const Tile& tile, int offset) {
    if (from == nullptr) return;
    from += static_cast<int64_t>(tile.index) * steps.step;
    const uint32_t target = chunk_address_ + offset;
    if constexpr (kIsF32) {
      // Planes have rows of zeros up to the end of the last tile.
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        Column::CopyWhole(target + plane * kTilePlaneBytes, from + plane * kHeadDim * 2,
                          steps.pass);
      }
    } else {
      if ((tile.properties & kCut) == 0) {
        Column::CopyWhole(target, from, steps.pass);
      } else {
        Column::CopyCut(target, from, steps.pass,
                        core::LocalKeys(state_.sequence) - tile.FirstKey(), threadIdx.x);
      }
    }
  }

  // Whether a step's 64 keys are one prepared word: not in a shard that begins inside a word.
  __device__ __forceinline__ bool HasWholeWords() const {
    return (state_.sequence.kv_offset & 63) == 0;
  }

  __device__ __forceinline__ bool IsDense() const {
    return kMayBeDense && problem_.mask.dense.words != nullptr;
  }
  // Where the words of this thread's row are, of the sequence's first key; null: it has none.
  __device__ __forceinline__ const uint64_t* DenseRow() const {
    const Sequence& s = state_.sequence;
    const core::DenseBits& dense = problem_.mask.dense;
    const int64_t row = state_.first_row + threadIdx.x;
    const int64_t i = s.q_offset + row;
    if (threadIdx.x >= kPolicy.block_rows || row >= state_.rows_end || i >= dense.q_extent) {
      return nullptr;
    }
    return dense.words + core::DenseWordIndex(dense, s.batch, state_.head, i, s.kv_offset >> 6);
  }

  __device__ __forceinline__ void StageDenseWords(int64_t first_key) {
    if (threadIdx.x >= kPolicy.block_rows) return;
    const core::DenseBits& dense = problem_.mask.dense;
    const uint64_t* row = state_.dense_rows[threadIdx.x];
    const bool is_there = row != nullptr;
    CopyAsync8(SharedAddress(&state_.visible_words[threadIdx.x]),
               is_there ? row + (first_key >> 6) * dense.word_stride : dense.words,
               is_there ? 8 : 0);
  }

  // kIsWhole: all of the block's rows and the tile's keys are there.
  template <int kBytes, bool kIsWhole>
  __device__ __forceinline__ void StageBias(int64_t first_key) {
    constexpr int kRowChunks = kPolicy.block_keys * kBytes / 16;
    constexpr int kStep = kPolicy.threads / kRowChunks;
    constexpr int kPasses = kPolicy.block_rows / kStep;
    const int chunk = threadIdx.x % kRowChunks;
    const int first = threadIdx.x / kRowChunks;
    const int64_t row_bytes = problem_.bias.row_stride * kBytes;
    const char* from = state_.bias + first * row_bytes + first_key * kBytes + chunk * 16;
    const uint32_t target =
        SharedAddress(shared_ + kBiasOffset) + first * BiasPitch(kBytes) + chunk * 16;
    const int rows = static_cast<int>(state_.rows_end - state_.first_row);
    const int64_t size = (core::LocalKeys(state_.sequence) - first_key) * kBytes - chunk * 16;
    if (kIsWhole || (rows == kPolicy.block_rows && size >= 16)) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        CopyAsync16(target + i * kStep * BiasPitch(kBytes), from + i * kStep * row_bytes);
      }
      return;
    }
    if constexpr (!kIsWhole) {
#pragma unroll 1
      for (int i = 0; i < kPasses; ++i) {
        const bool is_there = first + i * kStep < rows && size > 0;
        const uint32_t row_target = target + i * kStep * BiasPitch(kBytes);
        if (is_there && size < 16) {
          StagePartialChunk(row_target, from + i * kStep * row_bytes, static_cast<int>(size),
                            kBytes);
        } else {
          CopyAsync16(row_target, is_there ? from + i * kStep * row_bytes : state_.bias,
                      is_there ? 16 : 0);
        }
      }
    }
  }

  // Whether a tile has words that are neither copied nor row intervals.
  __device__ __forceinline__ bool HasComputedWords(const Tile& tile) const {
    return (tile.properties & kStructuredPart) != 0 ||
           (kMayBeDense && (tile.properties & kDensePart) != 0 && !HasWholeWords());
  }
  // That of this thread's row, in quad order.
  __device__ __forceinline__ uint64_t ComputedWord(const Tile& tile) const {
    const int64_t row = state_.first_row + threadIdx.x;
    if (threadIdx.x >= kPolicy.block_rows || row >= state_.rows_end) return 0;
    const Sequence& s = state_.sequence;
    const int64_t first_key = tile.FirstKey() & ~int64_t{63};
    return core::ToQuadOrder(
        HasWholeWords() ? WordOfStructuredTerms(problem_.mask, s, state_.head, row, first_key)
                        : WordOfAllTerms(problem_.mask, s, state_.head, row, first_key));
  }
  // Puts it where the block reads it; this thread's own copy of the dense word has arrived.
  __device__ __forceinline__ void StoreWord(const Tile& tile, uint64_t word) {
    if (threadIdx.x >= kPolicy.block_rows) return;
    if (kMayBeDense && (tile.properties & kDensePart) != 0 && HasWholeWords()) {
      word &= state_.visible_words[threadIdx.x];
    }
    state_.visible_words[threadIdx.x] = word;
  }

  // ---- the loop ----

  __device__ __forceinline__ void VisitTiles(bool is_careful) {
    warp_state_.Reset();
    const bool has_whole_steps = HasWholeSteps();
    for (int64_t first = state_.tile_begin; first < state_.tile_end; first += kPolicy.threads) {
      ListVisibleTiles(first);
      Tile tile = ListedTile(state_.list[0]);
      if (list_count_ != 0) {
        StartKeys(tile);
      } else {
        CommitCopies();
      }
      if (first == state_.tile_begin && !is_careful) FinishQuery();
      for (int step = 0; step < list_count_; ++step) {
        if (has_whole_steps && !is_careful) {
          step = VisitWholeSteps<false>(step);
          if constexpr (kIsPlain && kMayBeDense) step = VisitWholeSteps<true>(step);
          tile = ListedTile(state_.list[step]);
        }
        const bool has_next = step + 1 < list_count_;
        const Tile next = ListedTile(state_.list[has_next ? step + 1 : step]);
        VisitTile(tile, has_next, next, is_careful);
        tile = next;
      }
      __syncthreads();
    }
    WaitCopies<0>();  // of Q, where nothing is visible
  }

  // Whether the steps of this block can be whole steps.
  __device__ __forceinline__ bool HasWholeSteps() const {
    if constexpr (kIsF32 || kTerms == ScoreTerms::kAny) return false;
    if (params_.has_whole_rows == 0 || (IsDense() && !HasWholeWords())) return false;
    return kIsPlain || (problem_.bias.dtype == kDType && !IsDense() &&
                        state_.rows_end - state_.first_row == kPolicy.block_rows);
  }

  // Whole steps from `step` on: nothing but words of the dense term (kHasWords, else not even they)
  // hides pairs of the tile, and all keys of the next one exist. They are most steps of most
  // problems, and their loop has one branch, that of UpdateSoftmax. Returns the first other step.
  template <bool kHasWords>
  __device__ __forceinline__ int VisitWholeSteps(int step) {
    constexpr uint32_t kProperties = (1u << kPropertyBits) - 1;
    const auto is_whole = [](uint32_t entry, uint32_t next) {
      if constexpr (!kHasWords) return ((entry & kProperties) | (next & (kCut | kDensePart))) == 0;
      return ((entry & kProperties & ~kDensePart) | (next & kCut)) == 0 &&
             ((entry | next) & kDensePart) != 0;
    };
    uint32_t entry = state_.list[step];
    uint32_t next = state_.list[step + 1];
    if (kHasWords && (entry & kDensePart) == 0) return step;  // they have not been copied
    while (is_whole(entry, next)) {
      WaitCopies<0>();
      __syncthreads();
      CopyWhole(value_chunk_, params_.value_steps, entry, kPolicy.tile_bytes);
      CommitCopies();
      entry = next;
      ++step;
      next = state_.list[step + 1];
      typename Warp::Scores scores;
      Warp::template MultiplyQueryKey<kPolicy.query_in_registers>(
          query_address_, kQueryPlaneBytes, query_, key_address_, kTilePlaneBytes, scores);
      if constexpr (!kIsPlain) {
        ForEachStagedBias<kDType>([&](int m, int n, int e, float bias) {
          scores[m][n][e] = fmaf(scores[m][n][e], ScaleOfProducts(), bias);
        });
      }
      if constexpr (kHasWords) {
        typename Warp::Bits bits;
        LoadBits({0, kDensePart}, bits);
        Warp::HideScores(scores, bits);
      }
      warp_state_.UpdateSoftmax(scores, Scale());
      typename Warp::Probabilities packed;
      Warp::PackProbabilities(scores, packed);
      WaitCopies<0>();
      __syncthreads();
      CopyWhole(key_chunk_, params_.key_steps, entry, 0);
      const int64_t first_key = ListedTile(entry).FirstKey();
      if constexpr (kHasWords) StageDenseWords(first_key);
      if constexpr (!kIsPlain) StageBias<2, true>(first_key);
      CommitCopies();
      warp_state_.MultiplyProbabilityValue(packed, value_address_, kTilePlaneBytes);
    }
    return step;
  }

  __device__ __forceinline__ void CopyWhole(const char* from, const CopySteps& steps,
                                            uint32_t entry, int offset) const {
    Column::CopyWhole(chunk_address_ + offset,
                      from + static_cast<int64_t>(ListedTile(entry).index) * steps.step,
                      steps.pass);
  }

  // While K is multiplied V is under way, and the next K while V is.
  __device__ __forceinline__ void VisitTile(const Tile& tile, bool has_next, const Tile& next,
                                            bool is_careful) {
    const bool is_partial = (tile.properties & kHiddenMask) != 0;
    const bool has_computed_words = is_partial && HasComputedWords(tile);
    const uint64_t word = has_computed_words ? ComputedWord(tile) : 0;
    WaitCopies<0>();
    if (has_computed_words) StoreWord(tile, word);
    __syncthreads();
    StartValues(tile);
    typename Warp::Scores scores;
    Warp::template MultiplyQueryKey<kPolicy.query_in_registers>(
        query_address_, kQueryPlaneBytes, query_, key_address_, kTilePlaneBytes, scores);
    typename Warp::Bits bits;
    if (kTerms == ScoreTerms::kAny || kIsF32 || is_partial || is_careful) {
      LoadBits(tile, bits);
    }
    if constexpr (kIsF32) {
      const bool is_flagged = (tile.properties & kFlaggedKeys) != 0 ||
                              (state_.query_flags[0] | state_.query_flags[1]) != 0;
      if (is_flagged) ReplaceOverflowingScores(scores, tile.FirstKey(), bits);
    }
    if constexpr (!kIsPlain) FinishScores(scores, tile.FirstKey(), bits, is_careful);
    if (is_partial || (is_careful && !kIsPlain)) Warp::HideScores(scores, bits);
    warp_state_.UpdateSoftmax(scores, Scale());
    if constexpr (kTerms == ScoreTerms::kAny) {
      if (problem_.dropout.enabled != 0) {
        Warp::DropPairs(problem_, state_.sequence, Rows(), tile.FirstKey(), scores, bits);
      }
    }
    typename Warp::Probabilities packed;
    Warp::PackProbabilities(scores, packed);

    WaitCopies<0>();
    __syncthreads();
    if (has_next) StartKeys(next);
    bool has_taken_out = false;
    if (kIsF32) {
      if ((tile.properties & kFlaggedValues) != 0) {
        AddTakenOutValues(packed, bits, tile.FirstKey());
      }
    } else if (is_careful) {
      has_taken_out = __syncthreads_or(
          TakeOutNonFinite<kRowType, kHeadDim, kPolicy.block_keys, kPolicy.threads>(Slot(1),
                                                                                    threadIdx.x));
    }
    warp_state_.MultiplyProbabilityValue(packed, value_address_, kTilePlaneBytes);
    if (!kIsF32 && has_taken_out) {
      __syncthreads();
      StartValues(tile);
      WaitCopies<0>();
      __syncthreads();
      KeepNonFiniteAsOnes<kRowType, kHeadDim, kPolicy.block_keys, kPolicy.threads>(Slot(1),
                                                                                   threadIdx.x);
      __syncthreads();
      warp_state_.MarkNonFinite(bits, value_address_);
    }
  }

  __device__ __forceinline__ ScoreScale Scale() const {
    if constexpr (kIsPlain) return params_.score_scale;
    return ScaleBy(1.0f);
  }
  __device__ __forceinline__ WarpRows Rows() const {
    return {static_cast<int32_t>(state_.first_row) + warp_ * kWarpRows, 1, state_.head};
  }

  // This lane's visible pairs. In a full tile all of them, but for rows beyond the tensor's.
  __device__ __forceinline__ void LoadBits(const Tile& tile, typename Warp::Bits& bits) const {
    const bool has_words = (tile.properties & (kStructuredPart | kDensePart)) != 0;
    const bool has_intervals = (tile.properties & kIntervalPart) != 0;
    // A step of fewer than 64 keys takes its part of the word.
    const int shift =
        kPolicy.block_keys == core::kTile ? 0 : static_cast<int>(tile.FirstKey() % core::kTile) / 4;
    const LaneIntervals intervals(state_.intervals, tile.FirstKey() + 2 * (lane_ & 3));
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) {
      bits[m] = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_ * kWarpRows + Warp::LaneRow(m, r);
        uint32_t part = 0xffffu;
        if (has_words) {
          part = reinterpret_cast<const uint16_t*>(&state_.visible_words[row])[lane_ & 3] >> shift;
        }
        if (has_intervals) {
          part &= intervals.Row(row, Warp::BitsBelow);
        } else if (!has_words && (!kIsPlain || kIsF32) &&
                   state_.first_row + row >= state_.rows_end) {
          part = 0;
        }
        bits[m] |= part << (16 * r);
      }
    }
  }

  __device__ __forceinline__ void FinishScores(typename Warp::Scores& scores, int64_t first_key,
                                               typename Warp::Bits& bits, bool is_careful) {
    const Sequence& s = state_.sequence;
    if constexpr (kTerms == ScoreTerms::kBias) {
      AddBias(scores, ScaleOfProducts(), first_key);
    } else {
      Warp::FinishScores(problem_, s, Rows(), first_key, ScaleOfProducts(), scores,
                         [&](typename Warp::Scores& products, float factor) {
                           AddBias(products, factor, first_key);
                         });
    }
    // -inf hides a pair whatever its score.
    if (is_careful && problem_.bias.data != nullptr) {
      ForEachBias(first_key, [&](int m, int n, int e, float bias) {
        if (bias == core::NegativeInfinity()) bits[m] &= ~(1u << (16 * (e / 2) + 2 * n + e % 2));
      });
    }
  }

  __device__ __forceinline__ void AddBias(typename Warp::Scores& scores, float factor,
                                          int64_t first_key) const {
    ForEachBias(first_key, [&](int m, int n, int e, float bias) {
      scores[m][n][e] = fmaf(scores[m][n][e], factor, bias);
    });
  }

  // Calls visit(m, n, e, bias) for this lane's scores [m][n][e].
  template <typename Visit>
  __device__ __forceinline__ void ForEachBias(int64_t first_key, Visit visit) const {
    if (kTerms == ScoreTerms::kAny && params_.bias_bytes == 0) {
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            visit(m, n, e,
                  BiasOf(warp_ * kWarpRows + Warp::LaneRow(m, e / 2),
                         first_key + 8 * n + 2 * (lane_ & 3) + e % 2));
          }
        }
      }
      return;
    }
    switch (problem_.bias.dtype) {
      case DType::kF32:
        return ForEachStagedBias<DType::kF32>(visit);
      case DType::kF16:
        return ForEachStagedBias<DType::kF16>(visit);
      default:
        return ForEachStagedBias<DType::kBF16>(visit);
    }
  }

  template <DType kBiasType, typename Visit>
  __device__ __forceinline__ void ForEachStagedBias(Visit visit) const {
    const char* tile = shared_ + kBiasOffset;
    if constexpr (kBiasType == DType::kF32) {
      tile += (warp_ * kWarpRows + (lane_ >> 2)) * BiasPitch(4) + 8 * (lane_ & 3);
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float2 pair =
                *reinterpret_cast<const float2*>(tile + (16 * m + 8 * r) * BiasPitch(4) + 32 * n);
            visit(m, n, 2 * r, pair.x);
            visit(m, n, 2 * r + 1, pair.y);
          }
        }
      }
    } else {
      // A fragment load hands each lane the pairs of its scores.
      const uint32_t rows = SharedAddress(tile) +
                            (warp_ * kWarpRows + (lane_ & 15)) * BiasPitch(2) + 16 * (lane_ >> 4);
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          uint32_t pair[4];
          LoadMatrices(pair, rows + 16 * m * BiasPitch(2) + 16 * n);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            visit(m, n + i / 2, 2 * (i % 2), UnpackLow<kBiasType>(pair[i]));
            visit(m, n + i / 2, 2 * (i % 2) + 1, UnpackHigh<kBiasType>(pair[i]));
          }
        }
      }
    }
  }

  // The bias of a row of the block and a key, from device memory; 0 where one of them is not there.
  __device__ __forceinline__ float BiasOf(int row, int64_t key) const {
    const Sequence& s = state_.sequence;
    const Array4& bias = problem_.bias;
    if (state_.first_row + row >= state_.rows_end || key >= core::LocalKeys(s)) return 0.0f;
    return LoadElement(bias.data, bias.dtype,
                       core::BiasOffset(bias, s, state_.head, s.q_offset + state_.first_row + row,
                                        s.kv_offset + key));
  }

  // Q carries the scale's sign, but for f32.
  __device__ __forceinline__ float ScaleOfProducts() const {
    return kIsF32 ? problem_.scale : fabsf(problem_.scale);
  }

  // Bits of a step's keys in the flags of 64 keys of a sequence.
  __device__ __forceinline__ uint64_t StepFlags(const SplitTensor& tensor,
                                                int64_t first_key) const {
    const int64_t index = FlagIndex(problem_, state_.sequence.batch, state_.head / problem_.group) +
                          first_key / core::kTile;
    constexpr uint64_t kStepMask =
        kPolicy.block_keys == 64 ? ~uint64_t{0} : (uint64_t{1} << (kPolicy.block_keys % 64)) - 1;
    return (tensor.flags[index] >> (first_key % core::kTile)) & kStepMask;
  }

  // Scores of f32 rows and keys that the split cannot serve, from device memory.
  __device__ __forceinline__ void ReplaceOverflowingScores(typename Warp::Scores& scores,
                                                           int64_t first_key,
                                                           const typename Warp::Bits& bits) {
    const uint64_t key_flags = StepFlags(params_.keys, first_key);
    Warp::ForEachScore(scores, [&](float& score, int m, int r, int key, uint32_t bit) {
      const int row = warp_ * kWarpRows + Warp::LaneRow(m, r);
      const bool is_flagged =
          (((state_.query_flags[row / 64] >> (row % 64)) | (key_flags >> key)) & 1u) != 0;
      if ((bits[m] & bit) == 0 || !is_flagged) return;
      score = PlainProduct(problem_, state_.sequence, state_.head, state_.first_row + row,
                           first_key + key);
    });
  }

  // What the values of f32 that the split cannot serve add to the output.
  __device__ __forceinline__ void AddTakenOutValues(const typename Warp::Probabilities& packed,
                                                    const typename Warp::Bits& bits,
                                                    int64_t first_key) {
    const uint64_t taken_out = StepFlags(params_.values, first_key);
    const RowSource source = MakeRowSource<kDType>(
        problem_.v, core::KeyOffset(problem_.v, state_.sequence, state_.head / problem_.group, 0),
        problem_.v_dim);
    warp_state_.AddTakenOutValues(packed, bits, taken_out, source, [&](int key) {
      return source.base + (first_key + key) * source.row_stride * kElementBytes<kDType>;
    });
  }

  // ---- results ----

  __device__ __forceinline__ void WriteRows() {
    static_assert(kPolicy.block_rows * kHeadDim * 4 <= kStateOffset,
                  "the output does not fit the place of the tiles");
    WriteWarpRows(problem_, state_.sequence, state_.head, state_.first_row + warp_ * kWarpRows,
                  Scale().scale, warp_state_, shared_ + warp_ * kWarpRows * kHeadDim * 4);
  }

  const ForwardParams& params_;
  const Problem& problem_;
  char* const shared_;
  BlockState& state_;
  const int warp_;
  int lane_;
  uint32_t query_address_;  // shared addresses of this lane's fragments
  uint32_t key_address_;
  uint32_t value_address_;
  uint32_t chunk_address_;  // of the chunk that this thread copies
  const char* key_chunk_;   // where from, of key 0
  const char* value_chunk_;
  int list_count_;
  uint32_t list_begin_;  // the first tile of the list's chunk
  Warp warp_state_;
  typename Warp::QueryFragments query_;
};

template <DType kDType, int kHeadDim, ScoreTerms kTerms>
__global__ void __launch_bounds__(ForwardPolicy(kDType, kHeadDim).threads,
                                  ForwardPolicy(kDType, kHeadDim).blocks_per_multiprocessor)
    ForwardKernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(1024) char shared[];
  // Heads in sections whose keys and values stay in the L2 cache; the longest row blocks (with
  // causal masks, the last) first in each. In 32 bits, where divisions are short.
  const uint32_t q_heads = static_cast<uint32_t>(params.problem.q_heads);
  const uint32_t section_heads = static_cast<uint32_t>(params.section_heads);
  const uint32_t row_blocks = static_cast<uint32_t>(params.row_blocks);
  const uint32_t first_head = blockIdx.x / (section_heads * row_blocks) * section_heads;
  const uint32_t rest = blockIdx.x - first_head * row_blocks;
  const uint32_t heads_here =
      core::Min(section_heads, static_cast<uint32_t>(params.problem.batch) * q_heads - first_head);
  const uint32_t row_block = row_blocks - 1 - rest / heads_here;
  const uint32_t head = first_head + rest % heads_here;
  ForwardBlock<kDType, kHeadDim, kTerms> block(params, shared);
  block.Run(head / q_heads, head % q_heads, row_block);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_FORWARD_KERNEL_CUH_
