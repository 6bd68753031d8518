// The portable backward kernel (sm_80 and newer), written once for both sides: a block keeps rows
// of Q and dO, or of K and V, and walks over the tiles of the other side that see them, in
// ascending order. With A and B for what is kept and what is walked over,
//     S = A1 B1^T,  dP = A2 B2^T,  sum1 += dS B1,  sum2 += P B2:
// sum1 is dQ or dK, sum2 is dV. Every gradient is summed by one block in a fixed order, so nothing
// is atomic, and the bits depend on the block's own sequence, heads and terms alone.
//
// The planes (backward_params.h) hold finite numbers only. Rows that are empty have P = 0 by their
// statistics. What is not finite, where it is seen, is put into the products by backward_terms.cuh,
// which also has the terms of scores.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_BACKWARD_KERNEL_CUH_

#include "backend_cuda/backward.h"
#include "backend_cuda/backward_terms.cuh"
#include "core/mask_tiles.h"

namespace tandem::cuda {

// Of a listed tile: what hides pairs of it, and whether it has elements that products cannot serve.
inline constexpr int kHiddenByTerms = 1;
inline constexpr int kHiddenByDense = 2;
inline constexpr int kHiddenPairs = kHiddenByTerms | kHiddenByDense;
inline constexpr int kFlaggedPairs = 4;
inline constexpr int kTileBits = 3;

// Floats from row to row of sums that wait in shared memory; rows of a fragment lie in different
// banks.
constexpr int SumPitch(int head_dim) { return head_dim + 8; }

// Writes the first `rows` rows of sums times `factor`; + 0 turns -0 into +0.
static __device__ __noinline__ void StoreSums(const Array4* gradient, int64_t offset, int rows,
                                              int64_t dim, float factor, const float* sums,
                                              int pitch) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  for (int row = static_cast<int>(threadIdx.x) / kWarpSize; row < rows; row += warps) {
    for (int column = lane; column < dim; column += kWarpSize) {
      StoreElement(gradient->data, gradient->dtype,
                   offset + row * gradient->row_stride + column * gradient->column_stride,
                   sums[row * pitch + column] * factor + 0.0f);
    }
  }
}

template <DType kDType>
inline constexpr int kPlanesOf = Planes(kDType);

// Starts the copies of `kRows` rows of planes into a tile.
template <DType kDType, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void StartPlanes(uint32_t tile, const uint16_t* planes, int64_t row) {
  using Column = ChunkColumn<kHeadDim, kRows, kThreads>;
  constexpr int kPlanes = kPlanesOf<kDType>;
  constexpr int64_t kRowBytes = int64_t{2} * kPlanes * kHeadDim;
  const char* from = reinterpret_cast<const char*>(planes) + row * kRowBytes;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    Column::CopyWhole(Column::Target(tile + plane * kRows * kHeadDim * 2, threadIdx.x),
                      from + Column::Row(threadIdx.x) * kRowBytes +
                          2 * (plane * kHeadDim + Column::Column(threadIdx.x)),
                      Column::kRowStep * kRowBytes);
  }
}

// kHasTerms: scores are more than products by an ordinary scale.
template <DType kDType, int kHeadDim, GradientSide kSide, bool kHasTerms>
class GradientBlock {
 public:
  static constexpr GradientPolicy kPolicy = MakeGradientPolicy(kDType, kHeadDim, kSide, kHasTerms);
  static constexpr bool kKeepsKeys = kSide == GradientSide::kKeys;
  static constexpr int kStepTiles = kPolicy.step_rows / 8;
  using Warp = WarpAttention<kDType, kHeadDim, kPolicy.row_tiles, kStepTiles>;
  using Scores = typename Warp::Scores;
  using Sums = PairSums[2 * kPolicy.row_tiles];

  static constexpr int kWordsPerQuery =
      kKeepsKeys ? (kPolicy.block_rows + core::kTile - 1) / core::kTile : 1;
  static constexpr int kWords =
      (kKeepsKeys ? kPolicy.step_rows : kPolicy.block_rows) * kWordsPerQuery;
  // Of a query: its visible keys of a tile.
  using Word = std::conditional_t<kKeepsKeys || (kPolicy.step_rows > 32), uint64_t, uint32_t>;

  // What the threads share beside the tiles.
  struct alignas(16) State {
    Sequence sequence;
    int64_t head;  // of the queries
    RowStatistics statistics[kPolicy.stages][kKeepsKeys ? kPolicy.step_rows : 1];
    Word words[kPolicy.stages][kWords];
    Word kept[kPolicy.stages][kHasTerms ? kWords : 1];  // by dropout
    int32_t warp_counts[4];
    uint16_t list[128];  // tiles to visit: (tile - first of the chunk) << kTileBits | properties
  };
  static constexpr int kTileBytes =
      2 * kPolicy.kept_bytes + 2 * kPolicy.stages * kPolicy.step_bytes;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(State));

  __device__ GradientBlock(const BackwardParams& params, char* shared, int part)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        state_(*reinterpret_cast<State*>(shared + kTileBytes)),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        part_(part) {}

  // head: of the queries, or of the keys where those are kept.
  __device__ void Run(int64_t batch, int64_t head, int64_t block) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(problem_, batch, &status);
    first_row_ = block * kPolicy.block_rows;
    if (first_row_ >= (kKeepsKeys ? s.kv_rows : s.q_rows)) return;
    if (threadIdx.x == 0) state_.sequence = s;
    kv_head_ = kKeepsKeys ? head : head / problem_.group;
    const GradientPlanes& kept = kKeepsKeys ? params_.keys : params_.queries;
    const int64_t plane_row =
        first_row_ + (kKeepsKeys ? KeyPlaneRow(params_, s, head) : QueryPlaneRow(params_, s, head));
    StartPlanes<kDType, kHeadDim, kPolicy.block_rows, kPolicy.threads>(SharedAddress(shared_),
                                                                       kept.first, plane_row);
    StartPlanes<kDType, kHeadDim, kPolicy.block_rows, kPolicy.threads>(
        SharedAddress(shared_) + kPolicy.kept_bytes, kept.second, plane_row);
    CommitCopies();
    first_sum_.Reset();
    if constexpr (kKeepsKeys && !kPolicy.has_parts) second_sum_.Reset();
    PairSums sums[2 * kPolicy.row_tiles] = {};
    const int64_t heads = kKeepsKeys ? problem_.group : 1;
    for (int64_t n = 0; n < heads; ++n) {
      __syncthreads();
      if (threadIdx.x == 0) state_.head = kKeepsKeys ? head * problem_.group + n : head;
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2 * kPolicy.row_tiles; ++r) sums[r] = {0.0f, 0.0f};
      VisitHead(sums);
      WriteSums(sums);
    }
    WaitCopies<0>();
    WriteGradients();
  }

 private:
  static constexpr int kPlanes = Planes(kDType);
  static constexpr int kPitch = SumPitch(kHeadDim);
  static constexpr int kWarpRows = 16 * kPolicy.row_tiles;
  static constexpr int kKeptPlaneBytes = kPolicy.kept_bytes / kPlanes;
  static constexpr int kStepPlaneBytes = kPolicy.step_bytes / kPlanes;
  static_assert(kPolicy.kept_bytes % 1024 == 0 && kPolicy.step_bytes % 1024 == 0,
                "fragment addresses are made by XOR");
  static_assert(kPlaneRows % kPolicy.block_rows == 0 && kPlaneRows % kPolicy.step_rows == 0 &&
                    core::kTile % kPolicy.step_rows == 0,
                "tiles would not be whole");
  static_assert(kPolicy.block_rows * kPitch * 4 <= kTileBytes,
                "the sums do not fit the place of the tiles");
  static_assert(kPolicy.threads <= 128 && kPolicy.step_rows <= kPolicy.threads &&
                kWords <= kPolicy.threads);

  struct Tile {
    int64_t first;  // row of the side that is walked over
    int properties;
  };

  // ---- tiles to visit ----

  __device__ __forceinline__ void VisitHead(Sums& sums) {
    const Sequence& s = state_.sequence;
    int64_t tile = 0;
    int64_t end = 0;
    if constexpr (kKeepsKeys) {
      end = core::CeilDiv<int64_t>(core::Clamp<int64_t>(s.q_len - s.q_offset, 0, s.q_rows),
                                   kPolicy.step_rows);
    } else {
      const core::Interval hull =
          core::VisibleKeyHull(problem_.mask, s, state_.head, first_row_,
                               core::Min<int64_t>(first_row_ + kPolicy.block_rows, s.q_rows));
      tile = hull.begin / kPolicy.step_rows;
      end = core::CeilDiv<int64_t>(hull.end, kPolicy.step_rows);
      LoadStatistics();
    }
    for (; tile < end; tile += kPolicy.threads) {
      ListTiles(tile, end);
      VisitTiles(tile, sums);
    }
  }

  __device__ __forceinline__ void LoadStatistics() {
    const RowStatistics* from = params_.statistics +
                                QueryPlaneRow(params_, state_.sequence, state_.head) + first_row_ +
                                warp_ * kWarpRows;
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_statistics_[m][r] = from[Warp::LaneRow(m, r)];
    }
  }

  // Flags of the rows of one side of a tile.
  __device__ __forceinline__ bool HasFlags(bool of_keys, int64_t first, int64_t rows) const {
    const Sequence& s = state_.sequence;
    const GradientPlanes& planes = of_keys ? params_.keys : params_.queries;
    for (int64_t row = first; row < first + rows; row += core::kTile) {
      const int64_t word = of_keys ? KeyFlagWord(params_, s, kv_head_, row)
                                   : QueryFlagWord(params_, s, state_.head, row);
      if ((planes.first_flags[word] | planes.second_flags[word]) != 0) return true;
    }
    return false;
  }

  // Lists the tiles of [begin, begin + threads) that are not EMPTY.
  __device__ __forceinline__ void ListTiles(int64_t begin, int64_t end) {
    const Sequence& s = state_.sequence;
    const int64_t first = (begin + threadIdx.x) * kPolicy.step_rows;
    bool is_listed = false;
    int properties = 0;
    if (begin + threadIdx.x < end) {
      const int64_t query = kKeepsKeys ? first : first_row_;
      const int64_t key = kKeepsKeys ? first_row_ : first;
      const int64_t queries = kKeepsKeys ? kPolicy.step_rows : kPolicy.block_rows;
      const int64_t keys = kKeepsKeys ? kPolicy.block_rows : kPolicy.step_rows;
      const core::TileClasses classes =
          core::ClassifyTerms(problem_.mask, s, state_.head, query,
                              core::Min<int64_t>(query + queries, s.q_rows), key, key + keys);
      is_listed = core::CombineTerms(classes.structured, classes.dense) != core::TileClass::kEmpty;
      if (classes.structured == core::TileClass::kPartial) properties |= kHiddenByTerms;
      if (classes.dense == core::TileClass::kPartial) properties |= kHiddenByDense;
      // Terms are not looked up for rows that are not there.
      if (kHasTerms && query + queries > s.q_rows) properties |= kHiddenByTerms;
      if (is_listed && (HasFlags(kKeepsKeys, first_row_, kPolicy.block_rows) ||
                        HasFlags(!kKeepsKeys, first, kPolicy.step_rows))) {
        properties |= kFlaggedPairs;
      }
    }
    const uint32_t ballot = __ballot_sync(~0u, is_listed);
    if (lane_ == 0) state_.warp_counts[warp_] = __popc(ballot);
    __syncthreads();
    int position = __popc(ballot & ((1u << lane_) - 1u));
    list_count_ = 0;
    for (int warp = 0; warp < kPolicy.warps; ++warp) {
      if (warp < warp_) position += state_.warp_counts[warp];
      list_count_ += state_.warp_counts[warp];
    }
    if (is_listed) {
      state_.list[position] = static_cast<uint16_t>(threadIdx.x << kTileBits | properties);
    }
    __syncthreads();
  }

  __device__ __forceinline__ Tile ListedTile(int64_t begin, int step) const {
    const int entry = state_.list[step];
    return {(begin + (entry >> kTileBits)) * kPolicy.step_rows, entry & ((1 << kTileBits) - 1)};
  }

  __device__ __forceinline__ uint32_t StepAddress(int stage) const {
    return SharedAddress(shared_) + 2 * kPolicy.kept_bytes + stage * 2 * kPolicy.step_bytes;
  }

  // Starts the copies of a tile.
  __device__ __forceinline__ void StartTile(const Tile& tile, int stage) {
    const Sequence& s = state_.sequence;
    const GradientPlanes& planes = kKeepsKeys ? params_.queries : params_.keys;
    const int64_t row = tile.first + (kKeepsKeys ? QueryPlaneRow(params_, s, state_.head)
                                                 : KeyPlaneRow(params_, s, kv_head_));
    const uint32_t target = StepAddress(stage);
    StartPlanes<kDType, kHeadDim, kPolicy.step_rows, kPolicy.threads>(target, planes.first, row);
    StartPlanes<kDType, kHeadDim, kPolicy.step_rows, kPolicy.threads>(target + kPolicy.step_bytes,
                                                                      planes.second, row);
    if constexpr (kKeepsKeys) {
      if (threadIdx.x < kPolicy.step_rows) {
        CopyAsync8(SharedAddress(&state_.statistics[stage][threadIdx.x]),
                   params_.statistics + row + threadIdx.x, 8);
      }
    }
    CommitCopies();
  }

  // The query and the first key, local, of this thread's word of a tile.
  __device__ __forceinline__ int64_t WordQuery(const Tile& tile) const {
    return (kKeepsKeys ? tile.first : first_row_) + threadIdx.x / kWordsPerQuery;
  }
  __device__ __forceinline__ int64_t WordKey(const Tile& tile) const {
    return (kKeepsKeys ? first_row_ : tile.first) + threadIdx.x % kWordsPerQuery * core::kTile;
  }

  // Whether a word's keys lie in one prepared word: not in a shard that begins inside a word.
  __device__ __forceinline__ bool HasWholeWords() const {
    return (state_.sequence.kv_offset & 63) == 0;
  }

  // The prepared word that this thread's word of a tile is part of, in its own order: asked for
  // before another tile is multiplied, and used after it.
  __device__ __forceinline__ uint64_t LoadDenseWord(const Tile& tile) const {
    if ((tile.properties & kHiddenByDense) == 0 || threadIdx.x >= kWords || !HasWholeWords()) {
      return 0;
    }
    const Sequence& s = state_.sequence;
    const core::DenseBits& dense = problem_.mask.dense;
    const int64_t query = WordQuery(tile);
    const int64_t i = s.q_offset + query;
    const int64_t j = s.kv_offset + WordKey(tile);
    if (query >= s.q_rows || i >= dense.q_extent || j >= dense.kv_extent) return 0;
    return dense.words[core::DenseWordIndex(dense, s.batch, state_.head, i, j >> 6)];
  }

  // Puts what the rows of a tile see where the block reads it.
  __device__ __forceinline__ void StoreWords(const Tile& tile, uint64_t dense_word, int stage) {
    if ((tile.properties & kHiddenPairs) != 0 && threadIdx.x < kWords) {
      state_.words[stage][threadIdx.x] = static_cast<Word>(VisibleWord(tile, dense_word));
    }
    if (!kHasTerms || problem_.dropout.enabled == 0) return;
    const Sequence& s = state_.sequence;
    const int64_t first_query = kKeepsKeys ? tile.first : first_row_;
    const int64_t first_key = kKeepsKeys ? first_row_ : tile.first;
    constexpr int kParts = kWordsPerQuery * static_cast<int>(sizeof(Word)) / 4;
    for (int w = threadIdx.x; w < kWords / kWordsPerQuery * kParts; w += kPolicy.threads) {
      reinterpret_cast<uint32_t*>(state_.kept[stage])[w] = KeptKeys(
          problem_.dropout, s.batch * problem_.q_heads + state_.head,
          s.q_offset + first_query + w / kParts, s.kv_offset + first_key + w % kParts * 32);
    }
  }
  __device__ __forceinline__ uint64_t VisibleWord(const Tile& tile, uint64_t dense_word) const {
    const Sequence& s = state_.sequence;
    const int64_t query = WordQuery(tile);
    const int64_t key = WordKey(tile);
    if (!HasWholeWords()) return VisibleKeys(problem_, s, state_.head, query, key);
    if (query >= s.q_rows || key >= core::LocalKeys(s)) return 0;
    uint64_t word = ~uint64_t{0};
    if ((tile.properties & kHiddenByTerms) != 0) {
      word = WordOfStructuredTerms(problem_.mask, s, state_.head, query, key);
    }
    if ((tile.properties & kHiddenByDense) != 0) {
      if (problem_.mask.dense.bit_order == core::BitOrder::kQuad) {
        dense_word = core::FromQuadOrder(dense_word);
      }
      word &= dense_word >> (key & 63);
    }
    return word;
  }

  __device__ __forceinline__ void VisitTiles(int64_t begin, Sums& sums) {
    if (list_count_ == 0) return;
    Tile tile = ListedTile(begin, 0);
    StoreWords(tile, LoadDenseWord(tile), 0);
    if constexpr (kPolicy.stages == 2) StartTile(tile, 0);
    for (int step = 0; step < list_count_; ++step) {
      const bool has_next = step + 1 < list_count_;
      const Tile next = ListedTile(begin, has_next ? step + 1 : step);
      const int stage = kPolicy.stages == 2 ? step & 1 : 0;
      if constexpr (kPolicy.stages == 1) StartTile(tile, 0);
      if (kPolicy.stages == 2 && has_next) {
        StartTile(next, stage ^ 1);
        WaitCopies<1>();
      } else {
        WaitCopies<0>();
      }
      const uint64_t dense_word = LoadDenseWord(next);
      __syncthreads();
      VisitTile(tile, stage, sums);
      if constexpr (kPolicy.stages == 1) __syncthreads();
      if (has_next) StoreWords(next, dense_word, kPolicy.stages == 2 ? stage ^ 1 : 0);
      __syncthreads();
      tile = next;
    }
  }

  // ---- one tile ----

  __device__ __forceinline__ void VisitTile(const Tile& tile, int stage, Sums& sums) {
    const uint32_t kept =
        SharedAddress(shared_) + Warp::RowMajorOffset(lane_) + warp_ * kWarpRows * Warp::kRowBytes;
    const uint32_t first = StepAddress(stage);
    const uint32_t second = first + kPolicy.step_bytes;
    typename Warp::QueryFragments unused;
    Scores products;
    Scores dp = {};
    Warp::template MultiplyQueryKey<false>(
        kept, kKeptPlaneBytes, unused, first + Warp::KeyOffset(lane_), kStepPlaneBytes, products);
    if (!kPolicy.has_parts || part_ == 0) {
      Warp::template MultiplyQueryKey<false>(kept + kPolicy.kept_bytes, kKeptPlaneBytes, unused,
                                             second + Warp::KeyOffset(lane_), kStepPlaneBytes, dp);
    }
    if ((tile.properties & kFlaggedPairs) != 0) {
      PairTile pairs;
      pairs.params = &params_;
      pairs.sequence = &state_.sequence;
      pairs.head = state_.head;
      pairs.first_query = kKeepsKeys ? tile.first : first_row_ + warp_ * kWarpRows;
      pairs.first_key = kKeepsKeys ? first_row_ + warp_ * kWarpRows : tile.first;
      pairs.row_tiles = kPolicy.row_tiles;
      pairs.step_tiles = kStepTiles;
      pairs.keeps_keys = kKeepsKeys;
      InMemory(products, dp, [&](float* scores, float* gradients) {
        PatchPairs<kDType>(pairs, scores, gradients);
      });
    }
    if constexpr (kHasTerms) {
      EvaluateTerms(tile, stage, products, dp, sums);
    } else if ((tile.properties & kHiddenPairs) != 0) {
      Evaluate<true>(stage, products, dp);
    } else {
      Evaluate<false>(stage, products, dp);
    }
    typename Warp::Probabilities packed;
    if constexpr (kKeepsKeys && !kPolicy.has_parts) {
      Warp::PackProbabilities(products, packed);
      second_sum_.MultiplyProbabilityValue(packed, second + Warp::RowMajorOffset(lane_),
                                           kStepPlaneBytes);
    }
    if (kPolicy.has_parts && part_ == 1) {
      Warp::PackProbabilities(products, packed);
      first_sum_.MultiplyProbabilityValue(packed, second + Warp::RowMajorOffset(lane_),
                                          kStepPlaneBytes);
    } else {
      Warp::PackProbabilities(dp, packed);
      first_sum_.MultiplyProbabilityValue(packed, first + Warp::RowMajorOffset(lane_),
                                          kStepPlaneBytes);
    }
  }

  // Bits of a word for the warp's rows where keys are kept, the lane's first in bit 0; else of the
  // keys, likewise.
  __device__ __forceinline__ Word LaneWord(const Word* words, int query) const {
    if constexpr (kKeepsKeys) {
      const char* word =
          reinterpret_cast<const char*>(words + query * kWordsPerQuery) + warp_ * kWarpRows / 8;
      return (kPolicy.row_tiles == 2 ? *reinterpret_cast<const uint32_t*>(word)
                                     : *reinterpret_cast<const uint16_t*>(word)) >>
             (lane_ >> 2);
    }
    return words[query] >> (2 * (lane_ & 3));
  }

  // Scores that are nothing but products: S and dP to P and dS.
  template <bool kHidden>
  __device__ __forceinline__ void Evaluate(int stage, Scores& products, Scores& dp) const {
    Word rows[kPolicy.row_tiles][2];
    if constexpr (kHidden && !kKeepsKeys) {
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          rows[m][r] = LaneWord(state_.words[stage], warp_ * kWarpRows + Warp::LaneRow(m, r));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
      RowStatistics columns[2];
      Word visible[2];
      if constexpr (kKeepsKeys) {
        LoadColumns(stage, n, columns);
#pragma unroll
        for (int e = 0; kHidden && e < 2; ++e) {
          visible[e] = LaneWord(state_.words[stage], 8 * n + 2 * (lane_ & 3) + e);
        }
      }
#pragma unroll
      for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          RowStatistics statistics;
          bool is_visible = true;
          if constexpr (kKeepsKeys) {
            statistics = columns[e % 2];
            if (kHidden) is_visible = ((visible[e % 2] >> (16 * m + 8 * (e / 2))) & 1u) != 0;
          } else {
            statistics = row_statistics_[m][e / 2];
            if (kHidden) is_visible = ((rows[m][e / 2] >> (8 * n + e % 2)) & 1u) != 0;
          }
          const float x = MinKeepNan(fmaf(products[m][n][e], params_.unit, -statistics.lse), 0.0f);
          const float p = kDType == DType::kF32 ? expf(x) : Exp2Approximate(x);
          const float ds = core::ScoreGradient(p, dp[m][n][e], statistics.offset);
          products[m][n][e] = is_visible ? p : 0.0f;
          dp[m][n][e] = is_visible ? ds : 0.0f;
        }
      }
    }
  }

  // Statistics of the lane's two rows of Q in step tile n.
  __device__ __forceinline__ void LoadColumns(int stage, int n, RowStatistics (&columns)[2]) const {
    const float4 both =
        *reinterpret_cast<const float4*>(&state_.statistics[stage][8 * n + 2 * (lane_ & 3)]);
    columns[0] = {both.x, both.y};
    columns[1] = {both.z, both.w};
  }

  // The words of a tile as bits of the lane's pairs.
  __device__ __forceinline__ void LoadBits(const Word* words,
                                           PairBits<kPolicy.row_tiles>& bits) const {
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) {
      bits[m] = 0;
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          Word word;
          if constexpr (kKeepsKeys) {
            word = LaneWord(words, 8 * n + 2 * (lane_ & 3) + e % 2) >> (16 * m + 8 * (e / 2));
          } else {
            word = LaneWord(words, warp_ * kWarpRows + Warp::LaneRow(m, e / 2)) >> (8 * n + e % 2);
          }
          bits[m] |= static_cast<uint32_t>(word & 1u) << (16 * (e / 2) + 2 * n + e % 2);
        }
      }
    }
  }

  __device__ __forceinline__ void EvaluateTerms(const Tile& tile, int stage, Scores& products,
                                                Scores& dp, Sums& sums) const {
    PairBits<kPolicy.row_tiles> visible;
    PairBits<kPolicy.row_tiles> kept;
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) visible[m] = kept[m] = ~0u;
    if ((tile.properties & kHiddenPairs) != 0) LoadBits(state_.words[stage], visible);
    if (problem_.dropout.enabled != 0) LoadBits(state_.kept[stage], kept);
    const int64_t kept_row = first_row_ + warp_ * kWarpRows + (lane_ >> 2);
    const int64_t other_row = tile.first + 2 * (lane_ & 3);
    const TermPairs<kDType, kKeepsKeys, kPolicy.row_tiles, kStepTiles> pairs(
        params_, state_.sequence, state_.head, kept_row, other_row);
    pairs.Evaluate(visible, kept, params_.has_slope != 0, products, dp, sums,
                   [&](int m, int n, int e) {
                     if constexpr (!kKeepsKeys) return row_statistics_[m][e / 2];
                     return state_.statistics[stage][8 * n + 2 * (lane_ & 3) + e % 2];
                   });
  }

  // ---- results ----

  // The sums of dS of the rows that are kept, for one head of the queries.
  __device__ __forceinline__ void WriteSums(const Sums& sums) const {
    if (!kHasTerms || (kKeepsKeys ? params_.key_sums : params_.row_sums) == nullptr || part_ != 0)
      return;
    const Sequence& s = state_.sequence;
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        PairSums sum = sums[2 * m + r];
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          sum.gradient += __shfl_xor_sync(~0u, sum.gradient, lanes);
          sum.distance_weighted += __shfl_xor_sync(~0u, sum.distance_weighted, lanes);
        }
        if ((lane_ & 3) != 0) continue;
        const int64_t row = first_row_ + warp_ * kWarpRows + Warp::LaneRow(m, r);
        if constexpr (kKeepsKeys) {
          params_.key_sums[KeySumRow(params_, s, state_.head) + row] = sum.gradient;
        } else {
          float* to = params_.row_sums + 2 * (QueryPlaneRow(params_, s, state_.head) + row);
          to[0] = sum.gradient;
          to[1] = sum.distance_weighted;
        }
      }
    }
  }

  __device__ __forceinline__ void WriteGradients() {
    if constexpr (kKeepsKeys) {
      if (kPolicy.has_parts && part_ == 1) {
        WriteGradient(problem_.dv, problem_.v_dim, 1.0f, first_sum_);
        return;
      }
      WriteGradient(problem_.dk, problem_.qk_dim, problem_.scale, first_sum_);
      if constexpr (!kPolicy.has_parts) {
        WriteGradient(problem_.dv, problem_.v_dim, 1.0f, second_sum_);
      }
    } else {
      WriteGradient(problem_.dq, problem_.qk_dim, problem_.scale, first_sum_);
    }
  }

  __device__ __forceinline__ void WriteGradient(const Array4& gradient, int64_t dim, float factor,
                                                const Warp& sum) {
    if (gradient.data == nullptr) return;
    __syncthreads();
    float* to = reinterpret_cast<float*>(shared_) + warp_ * kWarpRows * kPitch;
#pragma unroll
    for (int m = 0; m < kPolicy.row_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          *reinterpret_cast<float2*>(to + Warp::LaneRow(m, r) * kPitch + 8 * n + 2 * (lane_ & 3)) =
              make_float2(sum.output[m][n][2 * r], sum.output[m][n][2 * r + 1]);
        }
      }
    }
    __syncthreads();
    const Sequence& s = state_.sequence;
    const int64_t rows = (kKeepsKeys ? s.kv_rows : s.q_rows) - first_row_;
    const int64_t offset = kKeepsKeys ? core::KeyOffset(gradient, s, kv_head_, first_row_)
                                      : core::QueryOffset(gradient, s, state_.head, first_row_);
    StoreSums(&gradient, offset, static_cast<int>(core::Min<int64_t>(rows, kPolicy.block_rows)),
              dim, factor, reinterpret_cast<const float*>(shared_), kPitch);
  }

  const BackwardParams& params_;
  const Problem& problem_;
  char* const shared_;
  State& state_;
  const int warp_;
  const int lane_;
  const int part_;  // 1: dV, of a policy with parts
  int64_t kv_head_;
  int64_t first_row_;
  int list_count_;
  RowStatistics row_statistics_[kPolicy.row_tiles][2];
  Warp first_sum_;
  Warp second_sum_;
};

template <DType kDType, int kHeadDim, GradientSide kSide, bool kHasTerms>
__global__ void __launch_bounds__(MakeGradientPolicy(kDType, kHeadDim, kSide, kHasTerms).threads, 2)
    GradientKernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) char shared[];
  // Heads in sections whose rows stay in the L2 cache, the longest blocks first in each: with
  // causal masks the last rows of queries, and the first keys.
  const auto blocks = static_cast<uint32_t>(params.blocks);
  const auto section = static_cast<uint32_t>(params.section_heads);
  const auto heads = static_cast<uint32_t>(kSide == GradientSide::kKeys ? params.problem.kv_heads
                                                                        : params.problem.q_heads);
  const uint32_t first_head = blockIdx.x / (section * blocks) * section;
  const uint32_t rest = blockIdx.x - first_head * blocks;
  const uint32_t heads_here =
      core::Min(section, static_cast<uint32_t>(params.problem.batch) * heads - first_head);
  const uint32_t turn = rest / heads_here;
  const uint32_t head = first_head + rest % heads_here;
  GradientBlock<kDType, kHeadDim, kSide, kHasTerms> block(params, shared,
                                                          static_cast<int>(blockIdx.y));
  block.Run(head / heads, head % heads, kSide == GradientSide::kKeys ? turn : blocks - 1 - turn);
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_KERNEL_CUH_
