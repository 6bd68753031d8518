// The forward kernel of sm_90a: two warps load tiles by the tensor memory accelerator, two or three
// warpgroups of 64 query rows each multiply them (wgmma) and keep scores, probabilities and output
// in registers. As many blocks as multiprocessors walk over all row blocks.
//
// The softmax measures from a reference instead of the running maximum: the maximum of the first
// tile in which a row sees something. Later tiles need no maximum and no rescaling; where the
// exponentials of a row grow beyond a bound, the tile is done again for that row, with its maximum
// as the new reference. The reference cancels in the result. Every row decides for itself, from its
// own scores.
//
// NaN and infinity in V at hidden pairs would reach the output as 0 * NaN. As in the portable
// kernel that is not looked for in advance: a warp whose output has a non-finite element leaves a
// flag, and a second launch (Variant::kCareful) serves the flagged row blocks again, with such
// elements taken out of V and put where they are visible. Every row whose output is finite then has
// the bits that it would have had without them. The others are done once more from the true maximum
// (is_strict): large probabilities may have met large values.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FORWARD_KERNEL_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FORWARD_KERNEL_CUH_

#include "backend_cuda/hopper/forward_addends.cuh"
#include "backend_cuda/hopper/forward_dense.cuh"
#include "backend_cuda/hopper/forward_loading.cuh"
#include "backend_cuda/hopper/forward_non_finite.cuh"
#include "backend_cuda/hopper/forward_output.cuh"
#include "backend_cuda/hopper/forward_steps.cuh"
#include "backend_cuda/hopper/forward_terms.cuh"
#include "backend_cuda/hopper/forward_words.cuh"
#include "backend_cuda/row_output.cuh"

namespace tandem::cuda::hopper {

// A warpgroup of 64 rows. This lane has rows 16 w + g and 16 w + g + 8 of them, r = 0 and 1; bit
// 2 t + e of a row's bits stands for its score [4 t + 2 r + e], key 8 t + 2 c + e of the tile.
template <DType kDType, int kHeadDim, Variant kVariant>
class Warpgroup : WarpgroupSteps<kHeadDim, kVariant> {
  using Base = WarpgroupSteps<kHeadDim, kVariant>;

 public:
  using Base::kPolicy;
  using typename Base::State;

  __device__ Warpgroup(const Params& params, uint32_t shared, State& state, int warpgroup)
      : Base(state, warpgroup),
        params_(params),
        problem_(params.problem),
        query_(shared),
        keys_(shared + State::kKeyOffset),
        addends_(params, state, shared, PlaceOf().row - lane_ / 4) {}

  // The first product of an item runs while the one before is written.
  __device__ void Run() {
    if (warpgroup_ == kPolicy.warpgroups - 1) GiveTurn();
    if (!kIsCareful && lane_ == 0) {
      params_.any_flags[blockIdx.x].warps[PlaceOf().row / 16] = 0;
    }
    const Item* next = Fetch(0);
    // No output goes to its place before the next Q has been there.
    if constexpr (kHasStagedOutput && kPolicy.query_stages == 1) Release(state_.query_empty[0]);
    StartFirstScores(*next);
    WaitProducts<0>(scores_);
    for (uint32_t n = 1; next->is_end == 0; ++n) {
      item_ = next;
      views_ = &state_.views[(n - 1) % kItems][0];
      if (item_->has_tiles != 0 && IsIdle(*item_)) PassTiles();
      Reset();
      const bool has_work = HasWork(*item_);
      if (has_work) VisitTiles();
      if (!has_work || !kHasOverlap) ReleaseQuery();
      const Ends ends = FinishRows();
      if constexpr (kHasOverlap) {
        next = Fetch(n);
        StartFirstScores(*next);
        WaitProducts<1>(output_);
        if (has_work) ReleaseLastValues();
        Write(n - 1, ends);
      } else {
        Write(n - 1, ends);
        next = Fetch(n);
        StartFirstScores(*next);
      }
      WaitProducts<0>(scores_);
      if constexpr (kHasStagedOutput) {
        if (lane_ == 0) WaitBoxesRead();
        Release(state_.query_empty[(n - 1) % kPolicy.query_stages]);
      }
    }
  }

 private:
  using Base::GiveTurn, Base::HasWork, Base::IsIdle, Base::kHasOverlap, Base::kIsCareful,
      Base::kMaySkip, Base::kSignBarrier, Base::kStages, Base::lane_, Base::PassTiles,
      Base::PassValues, Base::PlaceOf, Base::Release, Base::ReleaseLastValues, Base::skipped_,
      Base::SkipTiles, Base::state_, Base::steps_, Base::TakeTurn, Base::TileOf, Base::UniformStage,
      Base::UniformValueStage, Base::WaitForKeys, Base::WaitForNext, Base::WaitForValues,
      Base::warpgroup_;
  using typename Base::Place;
  using typename Base::Tile;

  static constexpr bool kHasStagedOutput = State::kHasStagedOutput;
  // Q's only place is given back before the last product with V.
  static constexpr bool kReleasesEarly =
      kPolicy.query_stages == 1 && !kPolicy.has_query_in_registers;
  // There are no registers for all rounded output beside that which it is made from.
  static constexpr bool kRoundsAgain = kHeadDim > 128;
  static constexpr bool kHasAddends = HasAddends(kVariant);
  static constexpr bool kHasTerms = HasScoreTerms(kVariant);
  // A bias is there before the values are.
  static constexpr bool kBeginsEarly = HasBias(kVariant) && kHeadDim == 128;
  // What is added may be lower than exp2 can take in whole tiles of a row (-inf, the lowest finite
  // value): rows of such references take steps of their own.
  static constexpr bool kMayBeSlow = kHasAddends && !kHasTerms;
  // Rows without a reference that exp2 can take have an offset of -inf, with which all that they
  // see becomes infinite: that takes no more than the look at the sums.
  static constexpr bool kTripsByOffset = !kMayBeSlow && !kIsCareful;
  // Sums of a lane's exponentials beyond which a row gets a new reference; in f16 each exponential
  // must stay below 65504.
  static constexpr float kBound = kDType == DType::kF16 ? 32768.0f : 1.152921504606847e18f;
  static constexpr int kBlockKeys = kPolicy.block_keys;
  static constexpr int kScoreTiles = kBlockKeys / 8;
  static constexpr int kOutputTiles = kHeadDim / 8;
  static constexpr uint32_t kAllBits = ~uint32_t{0} >> (32 - 2 * kScoreTiles);
  // What this lane's rows see of a tile.
  struct Bits {
    uint32_t row[2];
  };

  // ---- an item ----

  // The n-th item, with its Q at hand.
  __device__ __forceinline__ const Item* Fetch(uint32_t n) {
    const int stage = n % kPolicy.query_stages;
    if (!kHasStagedOutput && !kPolicy.has_query_in_registers && !kReleasesEarly && n != 0) {
      Release(state_.query_empty[(n - 1) % kPolicy.query_stages]);
    }
    Wait(Barrier(state_.query_full[stage]), n / kPolicy.query_stages & 1);
    query_stage_ = query_ + stage * kPolicy.query_bytes;
    if (problem_.scale < 0.0f) NegateQuery();
    if constexpr (kPolicy.has_query_in_registers) {
      const Place place = PlaceOf();
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        LoadQuery(place, step, query_fragments_[step]);
      }
      if constexpr (!kHasStagedOutput) Release(state_.query_empty[stage]);
    }
    return &state_.items[n % kItems];
  }

  // This warp has multiplied what it will by the item's Q.
  __device__ __forceinline__ void ReleaseQuery() {
    if constexpr (kReleasesEarly) Release(state_.query_empty[0]);
  }

  // Where there is no work, the product is of whatever there is, and nobody reads it.
  __device__ __forceinline__ void StartFirstScores(const Item& item) {
    skipped_ = 0;
    if (HasWork(item)) {
      WaitForKeys(steps_);
      if constexpr (kMaySkip) SkipTiles(item.ends[warpgroup_]);
    }
    StartScores(UniformStage());
  }

  __device__ __forceinline__ void PassSkipped() {
    if constexpr (kMaySkip) {
      for (; skipped_ != 0; --skipped_) {
        const uint32_t step = steps_ - skipped_;
        if constexpr (kIsCareful) {
          WaitForValues(step);
          TakeOutNonFinite(step);
        }
        PassValues(step, true);
      }
    }
  }

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = core::NegativeInfinity();
      offset_[r] = 0.0f;
      sum_[r] = 0.0f;
    }
    classic_rows_ = 3;
    is_strict_ = kIsCareful && item_->is_strict != 0;
    if constexpr (kHasAddends) addends_.BeginItem(problem_, *item_);
  }

  // The scale's sign goes into Q.
  __device__ __forceinline__ void NegateQuery() const {
    constexpr int kPartWords = 64 * 128 / 4;  // of this warpgroup's rows and 64 columns
    for (int i = threadIdx.x % kWarpgroupThreads; i < kHeadDim / 64 * kPartWords;
         i += kWarpgroupThreads) {
      const uint32_t address = query_stage_ + i / kPartWords * (kPolicy.block_rows * 128) +
                               warpgroup_ * (64 * 128) + i % kPartWords * 4;
      uint32_t pair;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(address) : "memory");
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pair ^ 0x80008000u) : "memory");
    }
    PublishSharedWrites();
    SyncThreads(kSignBarrier + warpgroup_, kWarpgroupThreads);
  }

  // Sixteen columns of Q.
  __device__ __forceinline__ void LoadQuery(const Place& place, int step,
                                            uint32_t (&columns)[4]) const {
    const int row = place.row - place.lane / 4 + (place.lane & 15);
    const int chunk = step % 4 * 2 + (place.lane >> 4);
    LoadMatrices(columns, query_stage_ + step / 4 * (kPolicy.block_rows * 128) + row * 128 +
                              ((chunk ^ (row & 7)) << 4));
  }

  // Ends with the last product with V under way (kHasOverlap), or done and released.
  __device__ __forceinline__ void VisitTiles() {
    Tile tile = TileOf(steps_);
    bits_ = Join(LoadBits(tile, steps_));
    FirstSoftmax(tile);
    PassSkipped();
    if constexpr (kHasOverlap) {
      Tile next = WaitForNext(tile);
      while (!tile.IsLast()) {
        ++steps_;
        tile = next;
        const uint32_t stage = UniformStage();
        TakeTurn();
        Pin(output_);
        StartScores(stage);
        if (kBeginsEarly) BeginAddends(tile);
        WaitForValues(steps_ - 1);
        Pin(output_);
        FenceProducts();
        StartOutput(UniformValueStage(1));
        GiveTurn();
        const Halves halves = LoadBits(tile, steps_);
        if (!kBeginsEarly) BeginAddends(tile);
        WaitProducts<1>(scores_);
        bits_ = Join(halves);
        Exponentials(tile);
        // The loop in this wait keeps the next one behind the exponentials.
        next = WaitForNext(tile);
        WaitProducts<0>(output_);
        ReleaseLastValues();
        FinishSoftmax();
      }
      ReleaseQuery();
      WaitForValues(steps_);
      Pin(output_);
      FenceProducts();
      StartOutput(UniformValueStage(0));
      ++steps_;
    } else {
      for (;;) {
        WaitForValues(steps_);
        if constexpr (kIsCareful) TakeOutNonFinite(steps_);
        Pin(output_);
        FenceProducts();
        StartOutput(UniformValueStage(0));
        WaitProducts<0>(output_);
        if constexpr (kIsCareful) MarkNonFinite(tile);
        ++steps_;
        ReleaseLastValues();
        if (tile.IsLast()) break;
        WaitForKeys(steps_);
        tile = TileOf(steps_);
        StartScores(UniformStage());
        const Halves halves = LoadBits(tile, steps_);
        BeginAddends(tile);
        WaitProducts<0>(scores_);
        bits_ = Join(halves);
        Exponentials(tile);
        FinishSoftmax();
      }
    }
  }
  // ---- products ----

  __device__ __forceinline__ void StartScores(uint32_t stage) {
    const uint32_t tile = KeyTile(keys_) + stage * (kPolicy.tile_bytes >> 4);
    FenceProducts();
    BeginScores<kDType>(scores_, QueryOperand(0), tile);
#pragma unroll
    for (int step = 1; step < kHeadDim / 16; ++step) {
      AddScores<kDType>(scores_, QueryOperand(step),
                        tile + step / 4 * (kBlockKeys * 128 >> 4) + step % 4 * 2);
    }
    CommitProducts();
  }
  __device__ __forceinline__ decltype(auto) QueryOperand(int step) const {
    if constexpr (kPolicy.has_query_in_registers) {
      return (query_fragments_[step]);
    } else {
      return KeyTile(__shfl_sync(~0u, query_stage_, 0) + warpgroup_ * (64 * 128)) +
             step / 4 * (kPolicy.block_rows * 128 >> 4) + step % 4 * 2;
    }
  }
  __device__ __forceinline__ void StartOutput(uint32_t stage) {
    const uint32_t tile = ValueTile(keys_ + kStages * kPolicy.tile_bytes, kBlockKeys) +
                          stage * (kPolicy.tile_bytes >> 4);
#pragma unroll
    for (int k = 0; k < kBlockKeys / 16; ++k) {
      AddValues<kDType>(output_, probabilities_[k], tile + k * (16 * 128 >> 4));
    }
    CommitProducts();
  }

  // ---- masks ----

  // Loads of a tile's bits by dense terms, and those by words; FinishBits makes the others.
  __device__ __forceinline__ Halves LoadBits(const Tile& tile, uint32_t step) const {
    Halves halves = {{kAllBits, kAllBits}, {kAllBits, kAllBits}, {kAllBits, kAllBits}};
    if constexpr (MayHaveWords(kVariant)) {
      if (!tile.HasBits()) return halves;
      if (tile.HasWords()) {
        const uint4* const words = &state_.words[step % kStages][PlaceOf().row];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          halves.words[r] = reinterpret_cast<const uint32_t*>(words + 8 * r)[lane_ & 3];
        }
      }
    }
    if (!MayHaveDense(kVariant) || !tile.HasDensePart()) return halves;
    if constexpr (HasDenseRows(kVariant)) {
      ReadDense(&state_.dense[step % kStages][PlaceOf().row], lane_, halves);
    } else {
      LoadDense(problem_.mask.dense, *item_, views_ + PlaceOf().row, tile, lane_, halves);
    }
    return halves;
  }
  // Volatile, so that the loads are not waited for where they begin.
  static __device__ __forceinline__ Bits Join(const Halves& halves) {
    Bits bits = {{kAllBits, kAllBits}};
#pragma unroll
    for (int r = 0; r < 2 && MayHaveDense(kVariant); ++r) {
      asm volatile("prmt.b32 %0, %1, %2, 0x5410;"
                   : "=r"(bits.row[r])
                   : "r"(halves.low[r]), "r"(halves.high[r]));
      if constexpr (MayHaveWords(kVariant)) bits.row[r] &= halves.words[r];
    }
    return bits;
  }
  __device__ __forceinline__ void FinishBits(const Tile& tile) {
    if (!tile.HasStructuredPart()) return;
    const RowView* const views = views_ + PlaceOf().row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowView& view = views[8 * r];
      bits_.row[r] &=
          BitsBefore(view.end, tile.FirstKey()) & ~BitsBefore(view.begin, tile.FirstKey());
    }
  }

  // Bits of the keys that are before local key `end`.
  __device__ __forceinline__ uint32_t BitsBefore(int end, int first_key) const {
    const int columns = end - first_key - 2 * (lane_ & 3);
    const int bits = (columns >> 3) * 2 + core::Min(columns & 7, 2);
    // All where there are as many or more, none where there are 0 or fewer.
    constexpr int kBits = 2 * kScoreTiles;
    return __funnelshift_rc(~0u, 0u, 32u - static_cast<uint32_t>(core::Clamp(bits, 0, kBits)));
  }

  // ---- softmax ----

  // Exponentials of a tile that is not the first, from the rows' references; what they add to the
  // sums waits in parts_ until FinishSoftmax.
  __device__ __forceinline__ void Exponentials(const Tile& tile) {
    // One branch where a tile is as usual: between the products each takes 1 % of the time.
    const bool is_partial = kVariant != Variant::kPlain && tile.IsPartial();
    bool trips = false;
    if constexpr (kMayBeSlow) {
      if (!kIsCareful && !is_partial && slow_lanes_ == 0) {
        AddendExponentials<false, false>();
      } else {
        if (is_partial) FinishBits(tile);
        if (!kIsCareful && slow_lanes_ == 0) {
          AddendExponentials<true, false>();
        } else {
          addends_.Hide(steps_, bits_.row);
          AddendExponentials<true, true>();
          trips = SeesWithoutReference();
        }
      }
    } else if (HasSoftcap()) {
      if (is_partial) FinishBits(tile);
      is_partial ? AddendExponentials<true, false>() : AddendExponentials<false, false>();
    } else if (is_partial) {
      FinishBits(tile);
      Exponentials<true>();
    } else {
      Exponentials<false>();
    }
    if constexpr (!kTripsByOffset && !kMayBeSlow) trips = SeesWithoutReference();
    trips |= !(MaxKeepNan(parts_[0], parts_[1]) <= kBound);
    has_tripped_ = __any_sync(~0u, trips);
    if (!has_tripped_) ReleaseKeys();
  }
  // Whether a row without a reference sees something. Other warps than those with slow lanes have
  // references for all rows (kMayBeSlow).
  __device__ __forceinline__ bool SeesWithoutReference() const {
    return ((BitsAtWork(0) & 0u - (classic_rows_ & 1)) |
            (BitsAtWork(1) & 0u - (classic_rows_ >> 1))) != 0;
  }
  template <bool kIsPartial>
  __device__ __forceinline__ void Exponentials() {
    const float unit = params_.score_scale.log2_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = 0.0f;
      float odd = 0.0f;
      // In chunks, so that what hides a score stands beside its exponential: other units of the
      // multiprocessor do that.
#pragma unroll
      for (int first = 0; first < kScoreTiles; first += 4) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int t = first + n / 2;
          float& score = scores_[4 * t + 2 * r + n % 2];
          if constexpr (kIsPartial) {
            const bool is_visible = (bits_.row[r] & 1u << (2 * t + n % 2)) != 0;
            float x = fmaf(score, unit, -offset_[r]);
            x = is_visible ? x : core::NegativeInfinity();
            // Volatile, so that this stays apart from the code of full tiles.
            asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(score) : "f"(x));
          } else {
            score = Exp2Approximate(fmaf(score, unit, -offset_[r]));
          }
        }
#pragma unroll
        for (int t = first; t < first + 4; ++t) {
          even += scores_[4 * t + 2 * r];
          odd += scores_[4 * t + 2 * r + 1];
        }
      }
      parts_[r] = even + odd;
    }
  }
  __device__ __forceinline__ bool HasSoftcap() const {
    if constexpr (kHasTerms) return addends_.HasSoftcap();
    return false;
  }
  // The same with something added.
  template <bool kIsPartial, bool kIsSlow>
  __device__ __forceinline__ void AddendExponentials() {
    if constexpr (kHasAddends) {
      Origin origins[2] = {OriginOf(0), OriginOf(1)};
      for (int r = 0; r < 2; ++r) origins[r].offset = offset_[r];
      hopper::AddendExponentials<kIsPartial, kIsSlow>(addends_, first_addends_, steps_,
                                                      params_.score_scale, origins, bits_.row,
                                                      scores_, parts_);
    }
  }
  // What is added to the first scores of a tile, while they are under way.
  __device__ __forceinline__ void BeginAddends(const Tile& tile) {
    if constexpr (kHasAddends) {
      addends_.BeginTile(tile.FirstKey());
      addends_.WaitFor(steps_, 0);
      addends_.Load(steps_, 0, first_addends_);
    }
  }
  // Whether this lane's part of row r needs a new reference. True also for NaN.
  __device__ __forceinline__ bool Trips(int r) const {
    const bool is_beyond = !(parts_[r] <= kBound);
    if constexpr (kTripsByOffset) return is_beyond;
    return is_beyond || ((classic_rows_ >> r & 1) != 0 && BitsAtWork(r) != 0);
  }

  __device__ __forceinline__ uint32_t BitsAtWork(int r) const {
    return kVariant == Variant::kPlain ? kAllBits : bits_.row[r];
  }

  // Packs the probabilities, once those of the step before are no longer read.
  __device__ __forceinline__ void FinishSoftmax() {
    Pack();
    if (!has_tripped_) {
      sum_[0] += parts_[0];
      sum_[1] += parts_[1];
    } else {
      DoAgain();
      ReleaseKeys();
    }
  }

  // The first tile gives every row that sees something its reference.
  __device__ __forceinline__ void FirstSoftmax(const Tile& tile) {
    if constexpr (kVariant == Variant::kPlain) {
      const int end = static_cast<int>(core::LocalKeys(item_->sequence));
      bits_.row[0] = bits_.row[1] = !tile.IsPartial() ? kAllBits : BitsBefore(end, tile.FirstKey());
    } else {
      FinishBits(tile);
    }
    if constexpr (kHasAddends) {
      addends_.BeginTile(tile.FirstKey());
      addends_.Hide(steps_, bits_.row);
#pragma unroll
      for (int n = 0; n < kBlockKeys / 16; ++n) {
        typename Addends::Pairs pairs;
        addends_.Load(steps_, n, pairs);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = scores_[8 * n + i];
          score = addends_.Score(params_.score_scale, score, pairs, i / 2, i % 2);
        }
      }
    }
    if (kHasAddends || tile.IsPartial()) {
#pragma unroll
      for (int i = 0; i < kBlockKeys / 2; ++i) {
        const int bit = i / 4 * 2 + i % 2;
        if ((bits_.row[i / 2 % 2] >> bit & 1) == 0) scores_[i] = core::NegativeInfinity();
      }
    }
    float value[2] = {core::NegativeInfinity(), core::NegativeInfinity()};
#pragma unroll
    for (int i = 0; i < kBlockKeys / 2; i += 2) {
      float& row = value[i / 2 % 2];
      row = MaxKeepNan(row, MaxKeepNan(scores_[i], scores_[i + 1]));
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        value[r] = MaxKeepNan(value[r], __shfl_xor_sync(~0u, value[r], bit));
      }
    }
    SetReference(0, value[0]);
    SetReference(1, value[1]);
    FindSlowRows();
    const Origin origins[2] = {OriginOf(0), OriginOf(1)};
    // Sums and fragments are made in both branches, beside the exponentials: other units do that.
    const auto finish = [&](const auto& exponential) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float even = 0.0f;
        float odd = 0.0f;
#pragma unroll
        for (int t = 0; t < kScoreTiles; ++t) {
          float& low = scores_[4 * t + 2 * r];
          float& high = scores_[4 * t + 2 * r + 1];
          low = exponential(low, origins[r]);
          high = exponential(high, origins[r]);
          even += low;
          odd += high;
          if constexpr (!kHasTerms) Pack<false>(t, r);
        }
        sum_[r] = even + odd;
      }
    };
    if (__any_sync(~0u, origins[0].is_extreme || origins[1].is_extreme)) {
      finish([&](float score, const Origin& origin) { return Exponential(score, origin); });
    } else {
      finish([&](float score, const Origin& origin) {
        return Exp2Approximate(fmaf(score, RowScale().log2_scale, -origin.offset));
      });
    }
    if constexpr (kHasTerms) Pack();
    ReleaseKeys();
  }

  // The tile at work for the rows that tripped, from the keys, which are still there: 16 keys at a
  // time by products of one warp, once for the maximum and once for the probabilities.
  __device__ __forceinline__ void DoAgain() {
    if constexpr (kHasAddends) addends_.Hide(steps_, bits_.row);
    bool is_again[2];
    float value[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t quad = __ballot_sync(~0u, Trips(r)) >> (lane_ & ~3) & 0xfu;
      is_again[r] = quad != 0 || is_strict_;
      if (!is_again[r]) sum_[r] += parts_[r];
      value[r] = core::NegativeInfinity();
    }
#pragma unroll 1
    for (int step = 0; step < kBlockKeys / 16; ++step) {
      float scores[2][4];
      MultiplyAgain(step, scores);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& row = value[i / 2 % 2];
        row = MaxKeepNan(row, scores[i / 4][i % 4]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      value[r] = OfQuad(value[r]);
      if (!is_again[r]) continue;
      const float factor = SetReference(r, value[r]);
      sum_[r] *= factor;
#pragma unroll
      for (int t = 0; t < kOutputTiles; ++t) {
        output_[4 * t + 2 * r] *= factor;
        output_[4 * t + 2 * r + 1] *= factor;
      }
    }
    const Origin origins[2] = {OriginOf(0), OriginOf(1)};
#pragma unroll
    for (int step = 0; step < kBlockKeys / 16; ++step) {
      float scores[2][4];
      MultiplyAgain(step, scores);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = Exponential(scores[t][2 * r], origins[r]);
          const float high = Exponential(scores[t][2 * r + 1], origins[r]);
          if (!is_again[r]) continue;
          sum_[r] += low + high;
          const int bit = 4 * step + 2 * t;
          probabilities_[step][2 * t + r] =
              PackPair<kDType>(Kept(low, r, bit), Kept(high, r, bit + 1));
        }
      }
    }
    FindSlowRows();
  }

  // Scores of 16 keys of the tile at work; those of hidden pairs are -inf. The sums of a row depend
  // on that row alone.
  __device__ __forceinline__ void MultiplyAgain(int step, float (&scores)[2][4]) {
    const uint32_t tile = keys_ + steps_ % kStages * kPolicy.tile_bytes;
    const Place place = PlaceOf();
    const int key = 16 * step + (lane_ & 7) + (lane_ >> 4) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0.0f;
    const auto multiply = [&](int k, const uint32_t(&a)[4]) {
      const int chunk = k % 4 * 2 + (lane_ >> 3 & 1);
      uint32_t b[4];
      LoadMatrices(b, tile + k / 4 * (kBlockKeys * 128) + key * 128 + ((chunk ^ (key & 7)) << 4));
      MultiplyAccumulate<kDType>(scores[0], a, b[0], b[1]);
      MultiplyAccumulate<kDType>(scores[1], a, b[2], b[3]);
    };
    if constexpr (kPolicy.has_query_in_registers) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) multiply(k, query_fragments_[k]);
    } else {
#pragma unroll 2
      for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t a[4];
        LoadQuery(place, k, a);
        multiply(k, a);
      }
    }
    if constexpr (kHasAddends) {
      typename Addends::Pairs pairs;
      addends_.Load(steps_, step, pairs);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[i / 4][i % 4];
        score = addends_.Score(params_.score_scale, score, pairs, i / 2, i % 2);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int bit = 4 * step + i / 4 * 2 + i % 2;
      if ((BitsAtWork(i / 2 % 2) >> bit & 1) == 0) scores[i / 4][i % 4] = core::NegativeInfinity();
    }
  }

  // Of references, which are those of products, or of scores where something is added.
  __device__ __forceinline__ ScoreScale RowScale() const {
    if constexpr (kHasAddends) return ScaleBy(1.0f);
    return params_.score_scale;
  }
  __device__ __forceinline__ void FindSlowRows() {
    if constexpr (kMayBeSlow) {
      const bool is_slow =
          classic_rows_ != 0 || IsExtreme(reference_[0]) || IsExtreme(reference_[1]);
      // The shuffle lets it be in a uniform register.
      slow_lanes_ = __shfl_sync(~0u, __ballot_sync(~0u, is_slow), 0);
    }
  }

  __device__ __forceinline__ Origin OriginOf(int r) const {
    const ScoreScale& scale = RowScale();
    const float reference = core::SoftmaxReference(reference_[r]);
    return {kTripsByOffset ? reference * scale.log2_scale : offset_[r], reference * scale.scale,
            IsExtreme(reference_[r])};
  }
  __device__ __forceinline__ bool IsExtreme(float reference) const {
    return cuda::IsExtreme(reference, reference * RowScale().log2_scale);
  }
  __device__ __forceinline__ float Exponential(float score, const Origin& origin) const {
    const ScoreScale& scale = RowScale();
    const float usual = fmaf(score, scale.log2_scale, -origin.offset);
    const float careful = CarefulExponent(score, scale.scale, origin.natural) * core::kLog2e;
    return Exp2Approximate(origin.is_extreme ? careful : usual);
  }

  // Raises the reference of row r to `value`, the maximum of a tile; the factor of what was summed.
  __device__ __forceinline__ float SetReference(int r, float value) {
    const float scale = RowScale().scale;
    const float raised = MaxKeepNan(reference_[r], value);
    const float factor = core::SoftmaxRescale(reference_[r] * scale, raised * scale);
    reference_[r] = raised;
    offset_[r] = core::SoftmaxReference(raised) * RowScale().log2_scale;
    const bool stays_classic =
        (raised == core::NegativeInfinity()) | (!kMayBeSlow & IsExtreme(raised)) | is_strict_;
    if constexpr (kTripsByOffset) {
      if (stays_classic) offset_[r] = core::NegativeInfinity();
    }
    classic_rows_ = (classic_rows_ & ~(1u << r)) | (stays_classic ? 1u << r : 0u);
    return factor;
  }
  static __device__ __forceinline__ float OfQuad(float value) {
    value = MaxKeepNan(value, __shfl_xor_sync(~0u, value, 1));
    return MaxKeepNan(value, __shfl_xor_sync(~0u, value, 2));
  }

  // A probability as it meets a value; bit: of the lane's bits of row r.
  template <bool kIsDrawn = true>
  __device__ __forceinline__ float Kept(float probability, int r, int bit) const {
    if constexpr (kHasTerms && kIsDrawn) return addends_.Kept(probability, r, bit);
    return probability;
  }
  // Probabilities as fragments of the product with V.
  __device__ __forceinline__ void Pack() {
    if constexpr (kHasTerms) {
      addends_.HasDropout() ? Pack<true>() : Pack<false>();
    } else {
      Pack<false>();
    }
  }
  template <bool kIsDrawn>
  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int t = 0; t < kScoreTiles; ++t) {
      Pack<kIsDrawn>(t, 0);
      Pack<kIsDrawn>(t, 1);
    }
  }
  template <bool kIsDrawn>
  __device__ __forceinline__ void Pack(int t, int r) {
    probabilities_[t / 2][t % 2 * 2 + r] =
        PackPair<kDType>(Kept<kIsDrawn>(scores_[4 * t + 2 * r], r, 2 * t),
                         Kept<kIsDrawn>(scores_[4 * t + 2 * r + 1], r, 2 * t + 1));
  }

  // ---- non-finite values (kCareful) ----

  // Of the V tile at work, by all warpgroups together.
  __device__ __forceinline__ void TakeOutNonFinite(uint32_t step) {
    hopper::TakeOutNonFinite<kDType, kPolicy.warpgroups * kWarpgroupThreads, kPolicy.tile_bytes>(
        state_.non_finite_keys,
        keys_ + (kStages + step % kPolicy.value_stages) * kPolicy.tile_bytes,
        warpgroup_ * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads,
        [&] { ArriveAndWait(Barrier(state_.values_known), meetings_++ & 1); });
  }
  __device__ __forceinline__ void MarkNonFinite(const Tile& tile) {
    if constexpr (kHasTerms) {
      bits_.row[0] &= addends_.KeptBits(0);
      bits_.row[1] &= addends_.KeptBits(1);
    }
    hopper::MarkNonFinite<kDType>(problem_, *item_, tile.FirstKey(), state_.non_finite_keys,
                                  bits_.row, lane_, output_);
  }

  // ---- results ----

  // What becomes of this lane's rows, bits r.
  struct Ends {
    float factor[2];   // of the output
    uint32_t written;  // rows that are this kernel's
    uint32_t empty_rows;
    uint32_t finite_sums;
    bool are_ordinary;  // all rows of the warp are written, and none is empty
  };

  // Takes the sums, which are known before the last product with V.
  __device__ __forceinline__ Ends FinishRows() {
    const Item& item = *item_;
    const Place place = PlaceOf();
    const int quad = place.lane & ~3;
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = sum_[r] + __shfl_xor_sync(~0u, sum_[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
    // Of the lanes that share two rows, the even ones finish the first and the odd ones the second.
    const bool is_odd = (place.lane & 1) != 0;
    const int my_row = place.row + (is_odd ? 8 : 0);
    const RowEnd my_end = FinishRow(problem_, my_row < item.existing_rows, item.head,
                                    (is_odd ? reference_[1] : reference_[0]) * RowScale().scale,
                                    is_odd ? sum[1] : sum[0]);
    Ends ends;
    ends.factor[0] = __shfl_sync(~0u, my_end.factor, quad);
    ends.factor[1] = __shfl_sync(~0u, my_end.factor, quad | 1);
    ends.empty_rows = __ballot_sync(~0u, my_end.is_empty) >> quad;
    ends.written = 0;
    ends.finite_sums = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = place.row + 8 * r;
      if (row >= item.first_written_row && row < item.rows) ends.written |= 1u << r;
      if (core::IsFinite(sum[r])) ends.finite_sums |= 1u << r;
    }
    ends.are_ordinary = __all_sync(~0u, ends.written == 3 && !my_end.is_empty);
    // Values have no part in it, so what the first launch wrote stays.
    if (!kIsCareful && (place.lane & 2) == 0 && item.lse != nullptr &&
        (ends.written >> (place.lane & 1) & 1) != 0) {
      item.lse[my_row * problem_.lse.row_stride] = my_end.Lse();
    }
    return ends;
  }

  // n: which item it is.
  __device__ __forceinline__ void Write(uint32_t n, const Ends& ends) {
    const Item& item = *item_;
    const Place place = PlaceOf();
    const int quad = place.lane & ~3;
    const float(&factor)[2] = ends.factor;
    const uint32_t empty_rows = ends.empty_rows;
    uint32_t written = ends.written;

    // Rounded for the output, unless that is f32.
    [[maybe_unused]] uint32_t words[2][kRoundsAgain ? 1 : kOutputTiles];
#pragma unroll
    for (int t = 0; t < (kRoundsAgain ? 0 : kOutputTiles); ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        words[r][t] = PackPair<kDType>(output_[4 * t + 2 * r] * factor[r],
                                       output_[4 * t + 2 * r + 1] * factor[r]);
      }
    }
    bool is_staged = false;
    if constexpr (kHasStagedOutput) {
      is_staged = params_.has_out_map != 0 && ends.are_ordinary;
      if (is_staged) {
        // By way of the place of the item's Q.
        const int first_row = place.row - place.lane / 4;
        const uint32_t target = query_ + n % kPolicy.query_stages * kPolicy.query_bytes;
        StoreThroughShared<kPolicy.block_rows>(target + first_row * 128, place.lane, words,
                                               &params_.out, item, first_row);
      }
    }
    bool are_finite[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      are_finite[r] = (ends.finite_sums >> r & 1) != 0;
      if constexpr (kRoundsAgain) {
        are_finite[r] &= AreFinite<kDType>(output_, r, factor[r]);
      } else {
        are_finite[r] &= AreFinite<kDType>(words[r]);
      }
    }
    bool has_non_finite = is_staged && !(are_finite[0] & are_finite[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (is_staged) continue;
      const bool is_row_finite = (__ballot_sync(~0u, !are_finite[r]) >> quad & 0xfu) == 0;
      const uint32_t bit = 1u << r;
      has_non_finite = has_non_finite || ((written & bit) != 0 && !is_row_finite &&
                                          place.row + 8 * r < item.existing_rows);
      if constexpr (kIsCareful) {
        // Finite rows by the first attempt, the others by the strict one.
        if (!is_strict_) finite_rows_ = (finite_rows_ & ~bit) | (is_row_finite ? bit : 0);
        if (is_strict_ != ((finite_rows_ & bit) == 0)) written &= ~bit;
      }
    }
    if constexpr (!kIsCareful) {
      has_non_finite = __any_sync(~0u, has_non_finite);
      if (place.lane == 0) {
        item.flags->warps[place.row / 16] = has_non_finite;
        if (has_non_finite) params_.any_flags[blockIdx.x].warps[place.row / 16] = 1;
      }
    }
    if (is_staged) return;
    if constexpr (kRoundsAgain) {
      StoreWideRows<kDType>(problem_, item, place.lane, place.row, written, empty_rows, factor,
                            output_);
    } else {
      const core::Array4& out = problem_.out;
      if (out.dtype != DType::kF32 && out.column_stride == 1 && problem_.v_dim % 8 == 0 &&
          out.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(item.out) % 16 == 0) {
        StoreChunks(static_cast<uint16_t*>(item.out) + place.row * out.row_stride, out.row_stride,
                    problem_.v_dim, place.lane, written, empty_rows, words);
        return;
      }
      // Of unknown factors, so that the products are not those from above, kept until here.
      float again[2] = {factor[0], factor[1]};
      asm volatile("" : "+f"(again[0]), "+f"(again[1]));
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        const int r = i / 2 % 2;
        const int column = 8 * (i / 4) + 2 * (place.lane & 3) + i % 2;
        const float value = (empty_rows >> r & 1) != 0 ? 0.0f : output_[i] * again[r];
        if ((written >> r & 1) != 0 && column < problem_.v_dim) {
          StoreElement(item.out, out.dtype,
                       (place.row + 8 * r) * out.row_stride + column * out.column_stride, value);
        }
      }
    }
  }

  // This warp has done with K of the tile, and with what came with it.
  __device__ __forceinline__ void ReleaseKeys() {
    Release(state_.key_empty[steps_ % kStages]);
    if constexpr (HasBias(kVariant)) {
      if (lane_ == 0) addends_.Release(steps_);
    }
  }
  const Params& params_;
  const Problem& problem_;
  const uint32_t query_;  // shared addresses
  const uint32_t keys_;   // of the stages of K; those of V follow
  using Addends = std::conditional_t<
      HasBias(kVariant), BiasRows<kDType, kHeadDim, kVariant>,
      std::conditional_t<HasAlibi(kVariant), AlibiRows,
                         std::conditional_t<kHasTerms, ScoreTerms<kBlockKeys>, NoAddends>>>;
  Addends addends_;
  typename Addends::Pairs first_addends_;  // of a tile that is not the first
  const Item* item_;
  const RowView* views_;  // of the rows of the block; not kept up in kPlain

  uint32_t query_stage_;  // the shared address of the item's Q
  uint32_t query_fragments_[kHeadDim / 16][4];
  float scores_[kBlockKeys / 2];
  uint32_t probabilities_[kBlockKeys / 16][4];
  float output_[kHeadDim / 2];
  float offset_[2];        // from the reference, in units of base 2
  float reference_[2];     // of products; -inf: nothing visible yet
  float sum_[2];           // of this lane's columns
  float parts_[2];         // of the tile at work
  Bits bits_;              // of the tile at work; not kept up where every tile is full (kPlain)
  uint32_t classic_rows_;  // bits r: no reference yet, or one that exp2 cannot take
  uint32_t finite_rows_ = 0;
  uint32_t meetings_ = 0;  // phases of values_known
  bool has_tripped_;
  bool is_strict_;
  uint32_t slow_lanes_ = 0;  // of this warp (kMayBeSlow)
};

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FORWARD_KERNEL_CUH_
