// What a mask plan keeps: a problem whose mask terms all point into the plan's own memory.
#ifndef TANDEM_CORE_MASK_PLAN_H_
#define TANDEM_CORE_MASK_PLAN_H_

#include "core/problem.h"

struct tandem_mask_plan {
  // Only the fields about the mask, the sequences and the shapes they were made for are meaningful.
  tandem::core::Problem problem;
};

namespace tandem::core {

// Takes the mask and the sequences of `plan` into `problem`.
inline void AdoptMask(const Problem& plan, Problem* problem) {
  problem->mask = plan.mask;
  problem->mask_is_prepared = 1;
  problem->cu_seqlens_q = plan.cu_seqlens_q;
  problem->cu_seqlens_k = plan.cu_seqlens_k;
  problem->q_lengths = plan.q_lengths;
  problem->kv_lengths = plan.kv_lengths;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MASK_PLAN_H_
