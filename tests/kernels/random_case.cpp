#include <algorithm>
#include <sstream>

#include "tests/kernels/case_table.h"

namespace tandem::test {
namespace {

// Pairs times dimensions of a case: a tenth of a second in the oracle.
constexpr int64_t kMostWork = 20'000'000;

Strides RandomStrides(Random& random, int rank, bool input) {
  Strides strides;
  if (random.Chance(0.5)) return strides;
  for (int d = 0; d < rank; ++d) strides.order.push_back(d);
  for (int d = rank - 1; d > 0; --d)
    std::swap(strides.order[d], strides.order[random.Below(d + 1)]);
  for (int d = 0; d < rank; ++d) strides.padding.push_back(random.Below(4));
  strides.negative = static_cast<uint32_t>(random.Below(1 << rank));
  if (input && random.Chance(0.3)) {
    strides.broadcast = 1u << random.Below(rank);
  }
  return strides;
}

void RandomSequences(Random& random, CaseSpec* spec) {
  const auto rows = [&] {
    return random.Pick<int64_t>({0, 1, 17, 63, 64, 65, 127, 129, random.Below(260)});
  };
  spec->q_rows = std::max<int64_t>(rows(), 1);
  spec->kv_rows = rows();
  spec->batch = random.Range(1, 3);
  switch (random.Below(4)) {
    case 0:
      spec->layout = TANDEM_LAYOUT_THD;
      spec->cu_dtype = random.Pick({TANDEM_DTYPE_I32, TANDEM_DTYPE_I64});
      for (int64_t b = random.Range(1, 4); b > 0; --b) {
        spec->q_lens.push_back(rows());
        spec->kv_lens.push_back(rows());
      }
      spec->packed_lead = random.Below(3);
      spec->packed_tail = random.Below(3);
      break;
    case 1:
      spec->global_q_len = spec->q_rows + random.Below(90);
      spec->global_kv_len = spec->kv_rows + 1 + random.Below(90);
      spec->q_offset = random.Below(spec->global_q_len - spec->q_rows + 1);
      spec->kv_offset = random.Below(spec->global_kv_len - spec->kv_rows + 1);
      break;
    default:
      spec->layout = random.Pick({TANDEM_LAYOUT_BHSD, TANDEM_LAYOUT_BSHD});
      break;
  }
}

void RandomScores(Random& random, CaseSpec* spec) {
  if (random.Chance(0.5)) spec->scale = random.Pick({0.0f, 1.0f, -0.2f, 0.125f, 30.0f, 1e-10f});
  if (random.Chance(0.2)) spec->softcap = random.Pick({0.5f, 10.0f, 50.0f});
  if (random.Chance(0.3)) {
    spec->bias.dtype = random.Pick({TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16});
    spec->bias.rank = static_cast<int>(random.Range(2, 4));
    spec->bias.per_batch = random.Chance(0.5);
    spec->bias.per_head = random.Chance(0.5);
    spec->bias.per_row = random.Chance(0.8);
    spec->bias.per_key = random.Chance(0.9);
    spec->bias.hidden = random.Chance(0.5) ? 0.3 : 0.0;
    spec->bias.hidden_rows = random.Chance(0.5) ? 0.2 : 0.0;
    spec->bias.lowest_rows = random.Chance(0.3) ? 0.2 : 0.0;
    spec->bias.strides = RandomStrides(random, spec->bias.rank, true);
  }
  spec->alibi_rank = random.Chance(0.2) ? static_cast<int>(random.Range(1, 2)) : 0;
  spec->alibi_alignment = random.Pick({TANDEM_ALIGN_TOP_LEFT, TANDEM_ALIGN_BOTTOM_RIGHT});
  spec->sink = random.Chance(0.2);
  spec->dropout_rate = random.Chance(0.2) ? random.Pick({0.1f, 0.5f, 0.9f}) : 0.0f;
  spec->magnitude = random.Pick({0.1, 1.0, 1.0, 3.0});
}

}  // namespace

CaseSpec RandomCase(uint64_t seed) {
  Random random(seed ^ 0xABCDEF0123456789u);
  CaseSpec spec;
  spec.name = "random_" + std::to_string(seed);
  spec.seed = seed + 1000;
  spec.dtype = random.Pick({TANDEM_DTYPE_F32, TANDEM_DTYPE_F16, TANDEM_DTYPE_BF16});
  RandomSequences(random, &spec);
  spec.kv_heads = random.Range(1, 2);
  spec.q_heads = spec.kv_heads * random.Pick<int64_t>({1, 1, 2, 3, 4, 8});
  const auto dim = [&] {
    return random.Pick<int64_t>({1, 3, 8, 16, 40, 64, 64, 64, 80, 96, 128, 160, 256, 512});
  };
  spec.qk_dim = dim();
  spec.v_dim = random.Chance(0.6) ? spec.qk_dim : dim();
  RandomScores(random, &spec);
  int counts[8] = {};
  for (int64_t n = random.Below(4); n > 0; --n) {
    const TermSpec term = RandomTerm(random);
    if (++counts[term.kind] <= 2) spec.terms.push_back(term);  // as many as a problem may have
  }
  if (random.Chance(0.3)) spec.terms.push_back(Lengths(random.Chance(0.5), true));
  spec.lse = random.Chance(0.8);
  spec.out_f32 = random.Chance(0.3);
  const int rank = spec.layout == TANDEM_LAYOUT_THD ? 3 : 4;
  for (Strides* strides : {&spec.q_strides, &spec.k_strides, &spec.v_strides}) {
    *strides = RandomStrides(random, rank, true);
  }
  spec.out_strides = RandomStrides(random, rank, false);
  spec.lse_strides = RandomStrides(random, rank - 1, false);
  spec.placement = random.Pick({Placement::kAligned, Placement::kMisaligned,
                                Placement::kGuardBefore, Placement::kGuardAfter});
  int64_t pairs = spec.q_rows * spec.kv_rows * spec.batch;
  for (size_t b = 0; b < spec.q_lens.size(); ++b) {
    pairs = std::max(pairs, spec.q_lens[b] * spec.kv_lens[b] * int64_t(spec.q_lens.size()));
  }
  while (pairs * spec.q_heads * std::max(spec.qk_dim, spec.v_dim) > kMostWork) {
    if (spec.q_heads > spec.kv_heads) {
      spec.q_heads = spec.kv_heads;
    } else {
      spec.qk_dim = (spec.qk_dim + 1) / 2;
      spec.v_dim = (spec.v_dim + 1) / 2;
    }
  }
  return spec;
}

std::string Summary(const CaseSpec& spec) {
  std::ostringstream text;
  text << spec.name << ": dtype " << spec.dtype << " layout " << spec.layout << " B " << spec.batch
       << " heads " << spec.q_heads << "/" << spec.kv_heads << " rows " << spec.q_rows << "x"
       << spec.kv_rows << " dims " << spec.qk_dim << "/" << spec.v_dim;
  for (size_t b = 0; b < spec.q_lens.size(); ++b) {
    text << (b == 0 ? " sequences" : "") << " " << spec.q_lens[b] << "x" << spec.kv_lens[b];
  }
  if (spec.scale) text << " scale " << *spec.scale;
  if (spec.softcap > 0) text << " softcap " << spec.softcap;
  for (const TermSpec& term : spec.terms) text << " " << Describe(term);
  if (spec.bias.dtype != TANDEM_DTYPE_UNSET) {
    text << " bias dtype " << spec.bias.dtype << " rank " << spec.bias.rank;
  }
  if (spec.alibi_rank != 0) text << " alibi" << spec.alibi_rank;
  if (spec.sink) text << " sink";
  if (spec.dropout_rate > 0) text << " dropout " << spec.dropout_rate;
  if (spec.global_q_len != 0) {
    text << " shard q " << spec.q_offset << "/" << spec.global_q_len << " kv " << spec.kv_offset
         << "/" << spec.global_kv_len;
  }
  text << " out_f32 " << spec.out_f32 << " lse " << spec.lse << " placement "
       << static_cast<int>(spec.placement);
  return text.str();
}

}  // namespace tandem::test
