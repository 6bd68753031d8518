// What some units need besides products and softmax: scores with terms beyond the scale, elements
// that the parts cannot stand for, dropout, moved references.
#ifndef TANDEM_BACKEND_CPU_TILES_UNIT_PASSES_H_
#define TANDEM_BACKEND_CPU_TILES_UNIT_PASSES_H_

#include "backend_cpu/tiles/tile_softmax.h"

namespace tandem::cpu {
namespace {

// The product of q and k in f32, for the pairs where the parts cannot stand for an element of
// either.
TANDEM_HD void RedoScores(const core::Problem& p, const core::Sequence& s, const Unit& unit) {
  const RowPairs& rows = unit.block->rows;
  const uint64_t careful_keys = unit.tile.notes->careful_keys;
  if (unit.block->careful_rows == 0 && careful_keys == 0) return;
  const int64_t count = core::Min<int64_t>(core::kTile, core::LocalKeys(s) - unit.first_key);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t i = PairRow(p, rows, r);
    if (!core::RowExists(s, i)) continue;
    const bool is_careful_row = ((unit.block->careful_rows >> r) & 1u) != 0;
    const int64_t q = core::QueryOffset(p.q, s, PairHead(p, rows, r), i);
    float* scores = unit.scores + ScoreRow(r);
    for (int64_t j = 0; j < count; ++j) {
      if (!is_careful_row && ((careful_keys >> j) & 1u) == 0) continue;
      const int64_t k = core::KeyRowOffset(p, p.k, s, rows.kv_head, unit.first_key + j);
      float sum = 0.0f;
      for (int64_t d = 0; d < p.qk_dim; ++d) {
        sum += core::LoadFloat(p.q.data, p.dtype, q + d * p.q.column_stride) *
               core::LoadFloat(p.k.data, p.dtype, k + d * p.k.column_stride);
      }
      scores[j / 16 * kScoreGroupStride + j % 16] = sum;
    }
  }
}

// Products to scores, -inf where invisible, where the scale alone is not enough.
template <class Arch>
__attribute__((noinline)) void FinishUnitScores(const core::Problem& p, const core::Sequence& s,
                                                Unit* unit) {
  for (int64_t r = 0; r < unit->block->rows.count; ++r) {
    unit->words[r] = FinishUnitRow<Arch>(p, s, *unit, r, unit->words[r]);
  }
}

// Dropped pairs lose their probability, and count as invisible from then on.
TANDEM_HD void DropProbabilities(const core::Problem& p, const core::Sequence& s, int parts,
                                 Unit* unit) {
  const RowPairs& rows = unit->block->rows;
  for (int64_t r = 0; r < rows.count; ++r) {
    const uint64_t keep = KeepWord(p.dropout, s.batch * p.q_heads + PairHead(p, rows, r),
                                   s.q_offset + PairRow(p, rows, r), s.kv_offset + unit->first_key);
    unit->words[r] &= keep;
    uint16_t* row = unit->p + ProbabilityRow(r);
    for (int64_t j = 0; j < core::kTile; ++j) {
      if ((keep >> j) & 1u) continue;
      for (int part = 0; part < parts; ++part) {
        row[j / 32 * ProbabilityStepStride(parts) + part * kProbabilityPartStride + j % 32] = 0;
      }
    }
  }
}

// Adds what packing left out of flagged tiles: p v for each such element, for the pairs that are
// visible and kept.
TANDEM_HD void AddLeftOutValues(const core::Problem& p, const core::Sequence& s, int parts,
                                const Unit& unit) {
  const uint64_t left_out = unit.tile.notes->left_out;
  if (left_out == 0) return;
  const SubBlock& block = *unit.block;
  const PartRange range = ValueRange(p.dtype);
  for (int64_t j = 0; j < core::kTile; ++j) {
    if (((left_out >> j) & 1u) == 0) continue;
    const int64_t v = core::KeyRowOffset(p, p.v, s, block.rows.kv_head, unit.first_key + j);
    for (int64_t c = 0; c < p.v_dim; ++c) {
      const float value = core::LoadFloat(p.v.data, p.dtype, v + c * p.v.column_stride);
      if (IsInRange(range, value)) continue;
      for (int64_t r = 0; r < block.rows.count; ++r) {
        if (((unit.words[r] >> j) & 1u) == 0) continue;
        const uint16_t* row =
            unit.p + ProbabilityRow(r) + j / 32 * ProbabilityStepStride(parts) + j % 32;
        float probability = 0.0f;
        for (int part = parts - 1; part >= 0; --part) {
          probability += core::Bf16ToFloat(row[part * kProbabilityPartStride]);
        }
        block.o[OutputRow(r) + c / 16 * kOutputGroupStride + c % 16] += probability * value;
      }
    }
  }
}

// O of the rows whose reference moved.
template <class Arch>
__attribute__((noinline)) void RescaleRows(const TileShape& shape, const SubBlock& block) {
  using V = Vector<Arch>;
  RowState* state = block.state;
  for (int64_t r = 0; r < block.rows.count; ++r) {
    if (state->rescale[r] == 1.0f) continue;
    float* o = block.o + OutputRow(r);
    for (int64_t g = 0; g < 2 * shape.column_pairs; ++g) {
      for (int64_t c = 0; c < 16; c += kLanes<Arch>) {
        float* x = o + g * kOutputGroupStride + c;
        (V::load_aligned(x) * V(state->rescale[r])).store_aligned(x);
      }
    }
    state->rescale[r] = 1.0f;
  }
  state->any_rescale = false;
}

}  // namespace
}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_TILES_UNIT_PASSES_H_
