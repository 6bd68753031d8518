// The forward kernel of sm_90a for f32: one warp loads the planes of key and value tiles by the
// tensor memory accelerator, two warpgroups of 64 query rows each multiply them (wgmma). As many
// blocks as multiprocessors walk over all row blocks.
//
// An f32 number is the sum of three bf16 ones (tile_staging.cuh), and a product of two numbers six
// products of planes; those of a tile are summed in one go, the small ones first. The tensor cores
// truncate where f32 addition rounds, so only the large products lose something, in one addition
// for 16 columns or keys, and never in a sum over tiles: that is made of f32 multiply-adds, with
// the factor of a raised maximum in them.
//
// What the planes cannot serve is added in plain f32, as in the portable kernel: scores of rows and
// keys that overflow, and values that do not split.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_F32_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_F32_KERNEL_CUH_

#include "backend_cuda/hopper/f32_loading.cuh"
#include "backend_cuda/row_output.cuh"
#include "backend_cuda/tile_staging.cuh"

namespace tandem::cuda::hopper {

// A warpgroup of 64 rows. This lane has rows 16 w + g and 16 w + g + 8 of them, r = 0 and 1; bit
// 2 t + e of a row's bits stands for its score [4 t + 2 r + e], key 8 t + 2 c + e of the tile.
template <int kHeadDim>
class F32Warpgroup {
 public:
  using State = F32State<kHeadDim>;

  __device__ F32Warpgroup(const F32Params& params, char* shared, State& state, int warpgroup)
      : params_(params),
        problem_(params.problem),
        state_(state),
        query_(shared + warpgroup * kF32Planes * State::kPlaneBytes),
        slots_(SharedAddress(shared) + State::kQueryBytes),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % kWarpSize),
        first_lane_row_(64 * warpgroup + 16 * (threadIdx.x % kWarpgroupThreads / kWarpSize) +
                        threadIdx.x % kWarpSize / 4) {}

  __device__ void Run() {
    for (uint32_t n = 0;; ++n) {
      const uint32_t stage = n % kF32Items;
      Wait(SharedAddress(&state_.item_full[stage]), n / kF32Items & 1);
      item_ = &state_.items[stage];
      if (item_->is_end != 0) {
        return;
      }
      Reset();
      if (item_->has_tiles != 0) {
        StageQuery();
        FindViews();
        VisitTiles();
      }
      Write();
      Release(state_.item_empty[stage]);
    }
  }

 private:
  static constexpr int kSlots = State::kSlots;
  static constexpr int kPlaneBytes = State::kPlaneBytes;
  static constexpr int kScoreTiles = kF32BlockKeys / 8;
  static constexpr int kOutputTiles = kHeadDim / 8;
  static constexpr uint32_t kAllBits = 0xffffu;

  // ---- an item ----

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maximum_[r] = core::NegativeInfinity();
      sum_[r] = 0.0f;
    }
  }

  // The planes of this warpgroup's rows of Q, with the scale's sign, in the order of wgmma's
  // operands.
  __device__ __forceinline__ void StageQuery() {
    constexpr int kChunks = kHeadDim / 8;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const F32Item& item = *item_;
    const RowSource source = MakeRowSource<DType::kF32>(
        problem_.q, core::QueryOffset(problem_.q, item.sequence, item.head, item.first_row),
        problem_.qk_dim);
    uint64_t* const flags = &state_.query_flags[warpgroup_];
    Sync();
    if (thread == 0) *flags = 0;
    Sync();
    const uint32_t flip = problem_.scale < 0.0f ? 0x80000000u : 0u;
#pragma unroll 2
    for (int c = thread; c < 64 * kChunks; c += kWarpgroupThreads) {
      const int row = c / kChunks;
      const int chunk = c % kChunks;
      const int in_block = 64 * warpgroup_ + row;
      const int columns_left = in_block < item.existing_rows ? source.columns - 8 * chunk : 0;
      const float* const from = reinterpret_cast<const float*>(source.base) +
                                in_block * source.row_stride + 8 * chunk * source.column_stride;
      float x[8];
      if (source.is_vector && columns_left >= 8) {
        const float4 low = reinterpret_cast<const float4*>(from)[0];
        const float4 high = reinterpret_cast<const float4*>(from)[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = e < columns_left ? from[e * source.column_stride] : 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = core::BitsToFloat(core::FloatToBits(x[e]) ^ flip);
      SplitChunk<TileUse::kScores>(
          x, query_ + chunk / 8 * (64 * 128) + row * 128 + ((chunk % 8 ^ (row & 7)) << 4),
          kPlaneBytes, flags, row);
    }
    PublishSharedWrites();
    Sync();
    const uint64_t word = *flags >> (first_lane_row_ - 64 * warpgroup_);
    query_flags_ = static_cast<uint32_t>(word & 1) | static_cast<uint32_t>(word >> 8 & 1) << 1;
    has_query_flags_ = __any_sync(~0u, query_flags_ != 0);
  }

  // What this lane's rows see: no key where one is not there, and its dense words are those of
  // another.
  __device__ __forceinline__ void FindViews() {
    const F32Item& item = *item_;
    const Sequence& s = item.sequence;
    const core::DenseBits& dense = problem_.mask.dense;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_lane_row_ + 8 * r;
      core::Interval keys = {0, 0};
      if (row < item.existing_rows) {
        keys = core::VisibleKeys(problem_.mask, s, item.head, item.first_row + row);
      }
      begin_[r] = static_cast<int>(keys.begin);
      end_[r] = static_cast<int>(keys.end);
      words_[r] = nullptr;
      if (dense.words != nullptr) {
        const int64_t i = core::Min<int64_t>(s.q_offset + item.first_row + row, dense.q_extent - 1);
        words_[r] =
            dense.words + core::DenseWordIndex(dense, s.batch, item.head, i, s.kv_offset / 64);
      }
    }
  }

  __device__ __forceinline__ void VisitTiles() {
    for (;;) {
      const F32Tile tile = StartScores();
      FinishScores();
      Softmax(tile);
      MultiplyValuesOfTile();
      if (tile.Has(F32Tile::kFlaggedValues)) AddTakenOutValues(tile);
      UpdateOutput();
      if (tile.Has(F32Tile::kLast)) break;
    }
  }

  // ---- products ----

  // The n-th plane of the tile at work, once it is there.
  __device__ __forceinline__ void WaitForPlane(int n) const {
    const uint32_t plane = planes_ + n;
    Wait(SharedAddress(&state_.plane_full[plane % kSlots]), plane / kSlots & 1);
  }
  // Known to the compiler to be the same for all lanes, so that descriptors are uniform.
  __device__ __forceinline__ uint32_t SlotOf(int n) const {
    return slots_ + __shfl_sync(~0u, (planes_ + n) % kSlots, 0) * kPlaneBytes;
  }
  __device__ __forceinline__ void ReleasePlane(int n) {
    Release(state_.plane_empty[(planes_ + n) % kSlots]);
  }

  template <bool kBegins>
  __device__ __forceinline__ void MultiplyQuery(int plane, uint32_t keys) {
    const uint32_t query = KeyTile(SharedAddress(query_) + plane * kPlaneBytes);
    keys = KeyTile(keys);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t offset = step / 4 * (64 * 128 >> 4) + step % 4 * 2;
      if (kBegins && step == 0) {
        BeginScores<DType::kBF16>(scores_, query + offset, keys + offset);
      } else {
        AddScores<DType::kBF16>(scores_, query + offset, keys + offset);
      }
    }
  }

  // The products with the low plane of K, under way.
  __device__ __forceinline__ F32Tile StartScores() {
    WaitForPlane(0);
    const F32Tile tile = {__shfl_sync(~0u, state_.tiles[planes_ % kSlots].word, 0)};
    const uint32_t keys = SlotOf(0);
    FenceProducts();
    MultiplyQuery<true>(0, keys);
    CommitProducts();
    return tile;
  }
  __device__ __forceinline__ void FinishScores() {
    WaitForPlane(1);
    const uint32_t middle = SlotOf(1);
    FenceProducts();
    MultiplyQuery<false>(1, middle);
    MultiplyQuery<false>(0, middle);
    CommitProducts();
    WaitProducts<1>();
    ReleasePlane(0);
    WaitForPlane(2);
    const uint32_t high = SlotOf(2);
    FenceProducts();
    MultiplyQuery<false>(2, high);
    MultiplyQuery<false>(1, high);
    MultiplyQuery<false>(0, high);
    CommitProducts();
    WaitProducts<1>();
    ReleasePlane(1);
    WaitProducts<0>(scores_);
    ReleasePlane(2);
  }

  template <bool kBegins>
  __device__ __forceinline__ void MultiplyProbabilities(int plane, uint32_t values) {
    values = ValueTile(values, kF32BlockKeys);
#pragma unroll
    for (int k = 0; k < kF32BlockKeys / 16; ++k) {
      const uint32_t tile = values + k * (16 * 128 >> 4);
      if (kBegins && k == 0) {
        BeginValues<DType::kBF16>(products_, probabilities_[k][plane], tile);
      } else {
        AddValues<DType::kBF16>(products_, probabilities_[k][plane], tile);
      }
    }
  }

  __device__ __forceinline__ void MultiplyValuesOfTile() {
    WaitForPlane(3);
    const uint32_t low = SlotOf(3);
    FenceProducts();
    MultiplyProbabilities<true>(0, low);
    CommitProducts();
    WaitForPlane(4);
    const uint32_t middle = SlotOf(4);
    FenceProducts();
    MultiplyProbabilities<false>(1, middle);
    MultiplyProbabilities<false>(0, middle);
    CommitProducts();
    WaitProducts<1>();
    ReleasePlane(3);
    WaitForPlane(5);
    const uint32_t high = SlotOf(5);
    FenceProducts();
    MultiplyProbabilities<false>(2, high);
    MultiplyProbabilities<false>(1, high);
    MultiplyProbabilities<false>(0, high);
    CommitProducts();
    WaitProducts<1>();
    ReleasePlane(4);
    WaitProducts<0>(products_);
    ReleasePlane(5);
    planes_ += 2 * kF32Planes;
  }

  __device__ __forceinline__ void UpdateOutput() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      output_[i] = fmaf(output_[i], factor_[i / 2 % 2], products_[i]);
    }
  }

  // ---- softmax ----

  // Scores become the planes of probabilities.
  __device__ __forceinline__ void Softmax(const F32Tile& tile) {
    uint32_t bits[2];
    FindBits(tile, bits);
    if (tile.Has(F32Tile::kFlaggedKeys) || has_query_flags_) ReplaceOverflowing(tile, bits);
    if (tile.Has(F32Tile::kStructuredPart | F32Tile::kDensePart)) {
#pragma unroll
      for (int i = 0; i < kF32BlockKeys / 2; ++i) {
        const int bit = i / 4 * 2 + i % 2;
        if ((bits[i / 2 % 2] >> bit & 1) == 0) scores_[i] = core::NegativeInfinity();
      }
    }
    float offset[2];
    bool is_extreme = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float value = MaxKeepNan(scores_[2 * r], scores_[2 * r + 1]);
#pragma unroll
      for (int t = 1; t < kScoreTiles; ++t) {
        value = MaxKeepNan(value, MaxKeepNan(scores_[4 * t + 2 * r], scores_[4 * t + 2 * r + 1]));
      }
      value = MaxKeepNan(value, __shfl_xor_sync(~0u, value, 1));
      value = MaxKeepNan(value, __shfl_xor_sync(~0u, value, 2));
      const float raised = MaxKeepNan(maximum_[r], value);
      factor_[r] = core::SoftmaxRescale(maximum_[r] * params_.scale, raised * params_.scale);
      maximum_[r] = raised;
      offset[r] = core::SoftmaxReference(raised) * params_.scale;
      is_extreme = is_extreme || IsExtreme(raised, offset[r]);
    }
    if (__any_sync(~0u, is_extreme)) {
#pragma unroll
      for (int i = 0; i < kF32BlockKeys / 2; ++i) {
        const int r = i / 2 % 2;
        const float natural = core::SoftmaxReference(maximum_[r] * params_.scale);
        const float usual = fmaf(scores_[i], params_.scale, -offset[r]);
        const float careful = CarefulExponent(scores_[i], params_.scale, natural);
        scores_[i] = expf(IsExtreme(maximum_[r], offset[r]) ? careful : usual);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kF32BlockKeys / 2; ++i) {
        scores_[i] = expf(fmaf(scores_[i], params_.scale, -offset[i / 2 % 2]));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part = 0.0f;
#pragma unroll
      for (int t = 0; t < kScoreTiles; ++t) {
        part += scores_[4 * t + 2 * r] + scores_[4 * t + 2 * r + 1];
      }
      sum_[r] = fmaf(sum_[r], factor_[r], part);
    }
#pragma unroll
    for (int t = 0; t < kScoreTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t part[kF32Planes];
        SplitPair<DType::kBF16>(scores_[4 * t + 2 * r], scores_[4 * t + 2 * r + 1], part);
#pragma unroll
        for (int plane = 0; plane < kF32Planes; ++plane) {
          probabilities_[t / 2][plane][t % 2 * 2 + r] = part[plane];
        }
      }
    }
  }

  // The pairs of a tile that this lane's rows see.
  __device__ __forceinline__ void FindBits(const F32Tile& tile, uint32_t (&bits)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bits[r] = kAllBits;
      if (tile.Has(F32Tile::kDensePart)) {
        // In units of the 16 bits that a lane reads of a word.
        const int64_t word = problem_.mask.dense.word_stride * tile.Index() * 4;
        bits[r] = __ldg(reinterpret_cast<const uint16_t*>(words_[r]) + word + (lane_ & 3));
      }
      if (tile.Has(F32Tile::kStructuredPart)) {
        bits[r] &= BitsBefore(end_[r], tile.FirstKey()) & ~BitsBefore(begin_[r], tile.FirstKey());
      } else if (first_lane_row_ + 8 * r >= item_->existing_rows) {
        bits[r] = 0;
      }
    }
  }
  // Bits of the keys that are before local key `end`.
  __device__ __forceinline__ uint32_t BitsBefore(int end, int first_key) const {
    const int columns = core::Clamp(end - first_key - 2 * (lane_ & 3), 0, kF32BlockKeys);
    return (1u << ((columns >> 3) * 2 + core::Min(columns & 7, 2))) - 1;
  }

  // ---- what the planes cannot serve ----

  // Scores of visible pairs whose row or key overflows the split, in plain f32.
  __device__ __forceinline__ void ReplaceOverflowing(const F32Tile& tile,
                                                     const uint32_t (&bits)[2]) {
    const F32Item& item = *item_;
    const Sequence& s = item.sequence;
    const int64_t kv_head = item.head / problem_.group;
    const uint64_t key_flags =
        params_.key_flags[FlagIndex(problem_, s.batch, kv_head) + tile.Index()];
    const float sign = problem_.scale < 0.0f ? -1.0f : 1.0f;
#pragma unroll 1
    for (int i = 0; i < kF32BlockKeys / 2; ++i) {
      const int r = i / 2 % 2;
      const int key = i / 4 * 8 + 2 * (lane_ & 3) + i % 2;
      const bool is_visible = ((r == 0 ? bits[0] : bits[1]) >> (i / 4 * 2 + i % 2) & 1) != 0;
      if (!is_visible || ((key_flags >> key | query_flags_ >> r) & 1) == 0) continue;
      const float* q =
          static_cast<const float*>(problem_.q.data) +
          core::QueryOffset(problem_.q, s, item.head, item.first_row + first_lane_row_ + 8 * r);
      const float* k = static_cast<const float*>(problem_.k.data) +
                       core::KeyOffset(problem_.k, s, kv_head, tile.FirstKey() + key);
      float product = 0.0f;
#pragma unroll 1
      for (int64_t d = 0; d < problem_.qk_dim; ++d) {
        product = fmaf(q[d * problem_.q.column_stride], k[d * problem_.k.column_stride], product);
      }
      product *= sign;
#pragma unroll
      for (int n = 0; n < kF32BlockKeys / 2; ++n) {
        if (n == i) scores_[n] = product;
      }
    }
  }

  // What the values of a tile add that were taken out of its planes.
  __device__ __forceinline__ void AddTakenOutValues(const F32Tile& tile) {
    const F32Item& item = *item_;
    const Sequence& s = item.sequence;
    const int64_t kv_head = item.head / problem_.group;
    uint32_t bits[2];
    FindBits(tile, bits);
    uint64_t left = params_.value_flags[FlagIndex(problem_, s.batch, kv_head) + tile.Index()];
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const int key = __ffsll(static_cast<long long>(left)) - 1;
      // This row's probability of the key is held by one of its four lanes.
      const int owner = (lane_ & ~3) | (key >> 1 & 3);
      float probability[2];
      bool is_visible[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float mine = 0.0f;
#pragma unroll
        for (int plane = kF32Planes - 1; plane >= 0; --plane) {
          uint32_t pair = 0;
#pragma unroll
          for (int t = 0; t < kScoreTiles; ++t) {
            if (t == key >> 3) pair = probabilities_[t / 2][plane][t % 2 * 2 + r];
            // Opaque, so that this does not become an array in local memory.
            asm volatile("" : "+r"(pair));
          }
          mine += (key & 1) != 0 ? UnpackHigh<DType::kBF16>(pair) : UnpackLow<DType::kBF16>(pair);
        }
        probability[r] = __shfl_sync(~0u, mine, owner);
        is_visible[r] = (__shfl_sync(~0u, bits[r], owner) >> ((key >> 3) * 2 + (key & 1)) & 1) != 0;
      }
      const int64_t row = core::KeyOffset(problem_.v, s, kv_head, tile.FirstKey() + key);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const int column = i / 2 * 8 + 2 * (lane_ & 3) + i % 2;
        if (column >= problem_.v_dim) continue;
        const float value =
            static_cast<const float*>(problem_.v.data)[row + column * problem_.v.column_stride];
        if (!IsExceptionalValue<DType::kF32>(value)) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (is_visible[r]) products_[i / 2 * 4 + 2 * r + i % 2] += probability[r] * value;
        }
      }
    }
  }

  // ---- results ----

  __device__ __forceinline__ void Write() {
    const F32Item& item = *item_;
    const Sequence& s = item.sequence;
    const int quad = lane_ & ~3;
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = sum_[r] + __shfl_xor_sync(~0u, sum_[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
    // Of the lanes that share two rows, the even ones finish the first and the odd ones the second.
    const bool is_odd = (lane_ & 1) != 0;
    const int my_row = first_lane_row_ + (is_odd ? 8 : 0);
    const RowEnd my_end =
        FinishRow(problem_, my_row < item.existing_rows, item.head,
                  (is_odd ? maximum_[1] : maximum_[0]) * params_.scale, is_odd ? sum[1] : sum[0]);
    if ((lane_ & 2) == 0 && my_row >= item.first_written_row && my_row < item.rows) {
      StoreLse(problem_, s, item.head, item.first_row + my_row, my_end.Lse());
    }
    const core::Array4& out = problem_.out;
    const uint32_t are_empty = __ballot_sync(~0u, my_end.is_empty) >> quad;  // bits r
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = __shfl_sync(~0u, my_end.factor, quad | r);
      const bool is_empty = (are_empty >> r & 1) != 0;
      const int row = first_lane_row_ + 8 * r;
      if (row < item.first_written_row || row >= item.rows) continue;
      float* const to = static_cast<float*>(out.data) +
                        core::QueryOffset(out, s, item.head, item.first_row + row);
      const bool has_pairs = out.column_stride == 1 && problem_.v_dim % 2 == 0 &&
                             reinterpret_cast<uintptr_t>(to) % 8 == 0;
#pragma unroll
      for (int t = 0; t < kOutputTiles; ++t) {
        const int column = 8 * t + 2 * (lane_ & 3);
        const float low = is_empty ? 0.0f : output_[4 * t + 2 * r] * factor;
        const float high = is_empty ? 0.0f : output_[4 * t + 2 * r + 1] * factor;
        if (has_pairs) {
          if (column < problem_.v_dim) *reinterpret_cast<float2*>(to + column) = {low, high};
        } else {
          if (column < problem_.v_dim) to[column * out.column_stride] = low;
          if (column + 1 < problem_.v_dim) to[(column + 1) * out.column_stride] = high;
        }
      }
    }
  }

  // ---- synchronisation ----

  __device__ __forceinline__ void Sync() const { SyncThreads(1 + warpgroup_, kWarpgroupThreads); }
  // This warp has read what the barrier guards.
  __device__ __forceinline__ void Release(const uint64_t& barrier) {
    __syncwarp();
    if (lane_ == 0) Arrive(SharedAddress(&barrier));
  }

  const F32Params& params_;
  const Problem& problem_;
  State& state_;
  char* const query_;     // of this warpgroup's rows
  const uint32_t slots_;  // a shared address
  const int warpgroup_;
  const int lane_;
  const int first_lane_row_;  // in the row block
  const F32Item* item_;
  uint32_t planes_ = 0;   // that this warpgroup has done with
  uint32_t query_flags_;  // bits r
  bool has_query_flags_;  // of a row of the warp
  int begin_[2];          // the keys that rows see, but for a dense term
  int end_[2];
  const uint64_t* words_[2];  // dense bits of key 0 on

  float scores_[kF32BlockKeys / 2];
  uint32_t probabilities_[kF32BlockKeys / 16][kF32Planes][4];
  float products_[kHeadDim / 2];  // of the tile at work
  float output_[kHeadDim / 2];
  float factor_[2];   // of the output when those are added
  float maximum_[2];  // of products; -inf: nothing visible yet
  float sum_[2];      // of this lane's columns
};

template <int kHeadDim>
__global__ void __launch_bounds__(kF32Threads, 1)
    F32ForwardKernel(const __grid_constant__ F32Params params) {
  using State = F32State<kHeadDim>;
  extern __shared__ __align__(1024) char shared[];
  State& state = *reinterpret_cast<State*>(shared + State::kOffset);
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kF32Warpgroups;
    for (int item = 0; item < kF32Items; ++item) {
      InitBarrier(SharedAddress(&state.item_full[item]), 1);
      InitBarrier(SharedAddress(&state.item_empty[item]), kReaders);
    }
    for (int slot = 0; slot < State::kSlots; ++slot) {
      InitBarrier(SharedAddress(&state.plane_full[slot]), 1);
      InitBarrier(SharedAddress(&state.plane_empty[slot]), kReaders);
    }
    PublishBarriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<40>();
    if (threadIdx.x < kWarpSize) {
      F32LoadingWarp<kHeadDim>(params, SharedAddress(shared), state).Run();
    }
  } else {
    TakeRegisters<232>();
    F32Warpgroup<kHeadDim>(params, shared, state, warpgroup - 1).Run();
  }
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_F32_KERNEL_CUH_
