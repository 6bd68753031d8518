// Short sequences (decoding): attention split over the keys.
//
// Each split of kSplitKeys keys is one work item: scores of all rows with its keys, softmax,
// product with its values, without packing. It leaves O, m and l; whoever completes the last split
// of a sequence and head merges them in their order. The splits are a fixed grid over the
// sequence's own keys, so that a row's bits depend on nothing else.
#ifndef TANDEM_BACKEND_CPU_SPLIT_SPLIT_FORWARD_H_
#define TANDEM_BACKEND_CPU_SPLIT_SPLIT_FORWARD_H_

#include <cstring>
#include <type_traits>

#include "backend_cpu/flash/finish_row.h"
#include "backend_cpu/flash/flash.h"
#include "backend_cpu/flash/softmax_rows.h"
#include "backend_cpu/mask_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/split/split_layout.h"
#include "backend_cpu/split/split_products.h"

namespace tandem::cpu {
namespace {

inline constexpr int64_t kSplitTiles = kSplitKeys / core::kTile;
static_assert(kSplitTiles == kGroupTiles, "a split is one group of the softmax");
static_assert(kSplitScoreStride == kSplitKeys + 16);
static_assert(kSplitQueryStride >= kFlashMaxHeadDim);

// Memory is asked for this many bytes before it is needed: four rows of the largest dims or more.
inline constexpr int64_t kAheadBytes = 8192;

struct SplitCall {
  const core::Problem* problem;
  void* workspace;
  SplitWorkspace layout;
  SplitGroup* groups;
  int64_t* group_of_split;
  int32_t out_of_memory;
};

// What a thread works in.
struct SplitScratch {
  float* q;         // [pairs][kSplitQueryStride], columns in the order of ToPairOrder
  float* scores;    // [pairs][kSplitScoreStride]
  float* elements;  // a tile of K or V, as f32 where it has to be converted, not read in place
};

// The elements of q, k and v, rounded up to whole vectors of either instruction set.
TANDEM_HD int64_t PaddedDepth(const core::Problem& p) {
  return core::RoundUp<int64_t>(p.qk_dim, 16);
}

TANDEM_HD int64_t SplitScratchFloats(const core::Problem& p) {
  return kShortPairs * (kSplitQueryStride + kSplitScoreStride) +
         core::kTile * core::Max(PaddedDepth(p), PartialColumns(p));
}

// Whether rows of an array are whole vectors, and need no conversion.
template <class Arch>
TANDEM_ISA_INLINE bool HasWholeRows(const core::Array4& array, int64_t dim) {
  return array.column_stride == 1 && dim % kLanes<Arch> == 0;
}

// Whether a tile of them lies at one stride as well, and is read where it is.
template <class Arch>
TANDEM_ISA_INLINE bool IsInPlace(const core::Problem& p, const core::Array4& array, int64_t dim) {
  return HasWholeRows<Arch>(array, dim) &&
         (!p.has_block_table || p.page_table.page_size % core::kTile == 0);
}

// Keys [first, first + count) of a tile of an array, in place or copied.
template <class Arch>
TANDEM_ISA_INLINE TileRowsView ViewRows(const core::Problem& p, const core::Array4& array,
                                        const core::Sequence& s, int64_t head, int64_t first,
                                        int64_t count, int64_t dim, int64_t padded,
                                        float* elements) {
  const int64_t size = core::ElementSize(array.dtype);
  if (IsInPlace<Arch>(p, array, dim)) {
    return {
        static_cast<const char*>(array.data) + core::KeyRowOffset(p, array, s, head, first) * size,
        array.row_stride * size, dim * size, core::CeilDiv<int64_t>(kAheadBytes, dim * size)};
  }
  if (HasWholeRows<Arch>(array, dim)) {
    char* rows = reinterpret_cast<char*>(elements);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t offset = core::KeyRowOffset(p, array, s, head, first + j);
      std::memcpy(rows + j * dim * size, static_cast<const char*>(array.data) + offset * size,
                  static_cast<size_t>(dim * size));
    }
    return {rows, dim * size, dim * size, 0};
  }
  for (int64_t j = 0; j < count; ++j) {
    float* row = elements + j * padded;
    LoadRow<Arch>(array.data, array.dtype, core::KeyRowOffset(p, array, s, head, first + j),
                  array.column_stride, dim, row);
    for (int64_t d = dim; d < padded; ++d) row[d] = 0.0f;
  }
  return {reinterpret_cast<const char*>(elements), padded * 4, padded * 4, 0};
}

// The type of what ViewRows gives.
template <class Arch>
TANDEM_ISA_INLINE core::DType ViewType(const core::Array4& array, int64_t dim) {
  return HasWholeRows<Arch>(array, dim) ? array.dtype : core::DType::kF32;
}

// Calls body with the type as a constant.
template <class Body>
TANDEM_ISA_INLINE void WithType(core::DType type, Body body) {
  if (type == core::DType::kF32) {
    body(std::integral_constant<core::DType, core::DType::kF32>());
  } else if (type == core::DType::kF16) {
    body(std::integral_constant<core::DType, core::DType::kF16>());
  } else {
    body(std::integral_constant<core::DType, core::DType::kBF16>());
  }
}

// One split of a short sequence at work.
struct Split {
  const core::Problem* p;
  core::Sequence s;
  RowPairs rows;
  SplitScratch scratch;
  Row state[kShortPairs];
  uint64_t words[kSplitTiles][kShortPairs];
  RowTiles tiles;  // those that some row sees, numbered from the split's beginning
};

template <class Arch>
TANDEM_ISA_INLINE void LoadQueries(Split* split) {
  const core::Problem& p = *split->p;
  const core::DType type = ViewType<Arch>(p.k, p.qk_dim);
  const int64_t columns = core::RoundUp<int64_t>(p.qk_dim, kLanes<Arch>);
  alignas(64) float natural[kFlashMaxHeadDim];
  for (int64_t r = 0; r < split->rows.count; ++r) {
    Row& row = split->state[r];
    row = {PairRow(p, split->rows, r), PairHead(p, split->rows, r), core::NegativeInfinity(), 0.0f,
           1.0f};
    float* q = split->scratch.q + r * kSplitQueryStride;
    for (int64_t d = 0; d < columns; ++d) natural[d] = 0.0f;
    if (core::RowExists(split->s, row.i)) {
      LoadRow<Arch>(p.q.data, p.q.dtype, core::QueryOffset(p.q, split->s, row.head, row.i),
                    p.q.column_stride, p.qk_dim, natural);
    }
    ToPairOrder<Arch>(type, columns, natural, q);
  }
}

// Scores with the keys of each tile that some row sees.
template <class Arch>
TANDEM_ISA_INLINE void ScoreSplit(int64_t first_tile, Split* split) {
  const core::Problem& p = *split->p;
  const int64_t keys = core::LocalKeys(split->s);
  const core::Interval hull = HullForRows(p, split->s, split->rows);
  for (int64_t t = 0; t < kSplitTiles; ++t) {
    const int64_t first = (first_tile + t) * core::kTile;
    if (first >= hull.end || first + core::kTile <= hull.begin) continue;
    const core::TileClass tile_class = ClassifyForRows(p, split->s, split->rows, first_tile + t);
    if (tile_class == core::TileClass::kEmpty) continue;
    uint64_t* words = split->words[t];
    if (tile_class == core::TileClass::kFull) {
      for (int64_t r = 0; r < split->rows.count; ++r) words[r] = ~uint64_t{0};
    } else if (FillWords(p, split->s, split->rows, first_tile + t, words) == 0) {
      continue;
    }
    const int n = split->tiles.count++;
    split->tiles.tile[n] = static_cast<int>(t);
    split->tiles.first_key[n] = first;
    split->tiles.all_visible[n] = tile_class == core::TileClass::kFull;
    const int64_t count = core::Min<int64_t>(core::kTile, keys - first);
    const TileRowsView k = ViewRows<Arch>(p, p.k, split->s, split->rows.kv_head, first, count,
                                          p.qk_dim, PaddedDepth(p), split->scratch.elements);
    WithType(
        ViewType<Arch>(p.k, p.qk_dim), [&](auto type) __attribute__((always_inline)) {
          ScoreTile<Arch, type.value>(split->scratch.q, split->rows.count, k, count,
                                      core::RoundUp<int64_t>(p.qk_dim, kLanes<Arch>),
                                      split->scratch.scores + t * core::kTile);
        });
  }
}

// Asks for a part of the first tile of values: memory works during the softmax of row r.
template <class Arch>
TANDEM_ISA_INLINE void AskForValues(const Split& split, int64_t r) {
  const core::Problem& p = *split.p;
  if (!IsInPlace<Arch>(p, p.v, p.v_dim)) return;
  const int64_t count =
      core::Min<int64_t>(core::kTile, core::LocalKeys(split.s) - split.tiles.first_key[0]);
  const TileRowsView v = ViewRows<Arch>(p, p.v, split.s, split.rows.kv_head,
                                        split.tiles.first_key[0], count, p.v_dim, 1, nullptr);
  const int64_t end = core::Min(count, (r + 1) * v.rows_ahead);
  for (int64_t j = r * v.rows_ahead; j < end; ++j) {
    for (int64_t n = 0; n < v.row_bytes; n += 64) {
      _mm_prefetch(v.data + j * v.stride + n, _MM_HINT_T1);
    }
  }
}

// Rows that see different keys of a tile are worked on one by one, so that none meets a value that
// it cannot see (0 times NaN is NaN). The order of a row's sum is the same either way.
template <class Arch>
TANDEM_ISA_INLINE void AddSplitValues(Split* split, float* o, int64_t o_stride) {
  const core::Problem& p = *split->p;
  const int64_t rows = split->rows.count;
  const int64_t columns = core::RoundUp<int64_t>(p.v_dim, kLanes<Arch>);
  for (int n = 0; n < split->tiles.count; ++n) {
    const int64_t first = split->tiles.first_key[n];
    const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(split->s) - first);
    const uint64_t* words = split->words[split->tiles.tile[n]];
    const float* probabilities = split->scratch.scores + split->tiles.tile[n] * core::kTile;
    bool rows_agree = true;
    for (int64_t r = 1; r < rows; ++r) rows_agree = rows_agree && words[r] == words[0];
    const TileRowsView v = ViewRows<Arch>(p, p.v, split->s, split->rows.kv_head, first, count,
                                          p.v_dim, PartialColumns(p), split->scratch.elements);
    WithType(
        ViewType<Arch>(p.v, p.v_dim), [&](auto type) __attribute__((always_inline)) {
          const int64_t together = rows_agree ? rows : 1;
          for (int64_t r = 0; r < rows; r += together) {
            AddTileValues<Arch, type.value>(probabilities + r * kSplitScoreStride, together, v,
                                            words[r], columns, o + r * o_stride, o_stride);
          }
        });
  }
}

template <class Arch>
__attribute__((flatten, noinline)) void ComputeSplit(SplitCall* call, int64_t index) {
  const core::Problem& p = *call->problem;
  float* memory = static_cast<float*>(WorkerScratch(4 * SplitScratchFloats(p)));
  if (memory == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const SplitGroup& group = call->groups[call->group_of_split[index]];
  int32_t status = 0;
  Split split;
  split.p = &p;
  split.s = core::ResolveSequence(p, group.batch, &status);
  split.rows = MakeRowPairs(p, group.kv_head, 0, split.s.q_rows * p.group);
  split.scratch.q = memory;
  split.scratch.scores = memory + kShortPairs * kSplitQueryStride;
  split.scratch.elements = split.scratch.scores + kShortPairs * kSplitScoreStride;
  split.tiles.count = 0;
  LoadQueries<Arch>(&split);
  ScoreSplit<Arch>((group.first_split + index - group.first_item) * kSplitTiles, &split);

  float* o = PartialAt(p, call->layout, call->workspace, index, 0);
  for (int64_t r = 0; r < split.rows.count; ++r) {
    for (int64_t c = 0; c < PartialColumns(p); ++c) o[r * PartialRow(p) + c] = 0.0f;
    if (split.tiles.count > 0) {
      AskForValues<Arch>(split, r);
      SoftmaxRow<Arch>(p, split.s, split.tiles, &split.state[r],
                       split.scratch.scores + r * kSplitScoreStride, &split.words[0][r],
                       kShortPairs);
    }
    o[r * PartialRow(p) + PartialColumns(p)] = split.state[r].m;
    o[r * PartialRow(p) + PartialColumns(p) + 1] = split.state[r].l;
  }
  AddSplitValues<Arch>(&split, o, PartialRow(p));
}

// Merges the splits of a group and writes its rows.
template <class Arch>
__attribute__((flatten, noinline)) void MergeSplits(SplitCall* call, int64_t index) {
  using V = Vector<Arch>;
  const core::Problem& p = *call->problem;
  const int64_t columns = PartialColumns(p);
  const core::DType type = ViewType<Arch>(p.v, p.v_dim);
  const int64_t paired = core::RoundUp<int64_t>(p.v_dim, kLanes<Arch>);
  float* sum = static_cast<float*>(WorkerScratch(8 * columns));
  if (sum == nullptr) {
    __atomic_store_n(&call->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const SplitGroup& group = call->groups[index];
  int32_t status = 0;
  const core::Sequence s = core::ResolveSequence(p, group.batch, &status);
  const RowPairs rows = MakeRowPairs(p, group.kv_head, 0, s.q_rows * p.group);
  for (int64_t r = 0; r < rows.count; ++r) {
    float m = core::NegativeInfinity();
    for (int64_t n = 0; n < group.split_count; ++n) {
      m = core::MaxKeepNan(
          m, PartialAt(p, call->layout, call->workspace, group.first_item + n, r)[columns]);
    }
    float l = 0.0f;
    for (int64_t c = 0; c < columns; ++c) sum[c] = 0.0f;
    for (int64_t n = 0; n < group.split_count; ++n) {
      const float* o = PartialAt(p, call->layout, call->workspace, group.first_item + n, r);
      // Empty splits, also with NaN: O and l say so.
      const float factor = o[columns] == m ? 1.0f : core::SoftmaxRescale(o[columns], m);
      l += o[columns + 1] * factor;
      for (int64_t c = 0; c < columns; c += kLanes<Arch>) {
        Fma(V::load_aligned(o + c), V(factor), V::load_aligned(sum + c)).store_aligned(sum + c);
      }
    }
    float* natural = sum + columns;
    for (int64_t c = paired; c < columns; ++c) natural[c] = 0.0f;
    FromPairOrder<Arch>(type, paired, sum, natural);
    FinishRow<Arch>(p, s, PairRow(p, rows, r), PairHead(p, rows, r), m, l, natural, columns);
  }
}

template <class Arch>
void RunSplit(SplitCall* call, int64_t index) {
  ComputeSplit<Arch>(call, index);
  if (__atomic_load_n(&call->out_of_memory, __ATOMIC_RELAXED) != 0) return;
  const int64_t group = call->group_of_split[index];
  const int64_t done = __atomic_add_fetch(&call->groups[group].done, 1, __ATOMIC_ACQ_REL);
  if (done == call->groups[group].split_count) MergeSplits<Arch>(call, group);
}

// All short sequences of a problem. workspace: LayOutSplits(p).size bytes. False when out of
// memory.
template <class Arch>
bool RunShortSequences(const core::Problem& p, void* workspace, const core::Context& context) {
  if (SplitGroupCapacity(p) == 0) return true;
  char* base = static_cast<char*>(workspace);
  SplitCall call = {&p, workspace, LayOutSplits(p), nullptr, nullptr, 0};
  call.groups = reinterpret_cast<SplitGroup*>(base + call.layout.group_offset);
  call.group_of_split = reinterpret_cast<int64_t*>(base + call.layout.index_offset);
  int64_t split_count = 0;
  const int64_t group_count = ListSplits(p, call.groups, call.group_of_split, &split_count);
  // Each worker begins with splits that follow each other in memory.
  int64_t first[kMaxWorkers + 1];
  const int64_t workers = WorkerCount(context, split_count);
  for (int64_t w = 0; w <= workers; ++w) first[w] = w * split_count / workers;
  ParallelForNear(
      context, split_count, first,
      [](void* argument, int64_t index, int) {
        RunSplit<Arch>(static_cast<SplitCall*>(argument), index);
      },
      &call);
  // Those that see nothing.
  for (int64_t group = 0; group < group_count; ++group) {
    if (call.groups[group].split_count == 0) MergeSplits<Arch>(&call, group);
  }
  return call.out_of_memory == 0;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_SPLIT_SPLIT_FORWARD_H_
