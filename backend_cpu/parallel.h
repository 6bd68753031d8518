// Threads of the CPU backend: OpenMP, or the caller's own pool. Both hand out indices one at a time
// in any order, so a task may depend on nothing but its index.
#ifndef TANDEM_BACKEND_CPU_PARALLEL_H_
#define TANDEM_BACKEND_CPU_PARALLEL_H_

#include <cstdint>

#include "core/backend.h"

namespace tandem::cpu {

// How many workers ParallelFor uses at most for `count` indices: at least 1.
int WorkerCount(const core::Context& context, int64_t count);

// Calls task(argument, index, worker) once for each index in [0, count) and returns when all are
// done. No two calls with the same worker run at once; workers are in [0, WorkerCount). Serial
// inside a caller's OpenMP parallel region, whose threads are busy already. The task must not
// throw.
void ParallelFor(const core::Context& context, int64_t count,
                 void (*task)(void* argument, int64_t index, int worker), void* argument);

// The same, where what neighbouring indices touch is shared: worker w begins with the indices
// [first[w], first[w + 1]), and takes over what others have left when it is done with them. `first`
// has WorkerCount(context, count) + 1 entries, from 0 to count.
void ParallelForNear(const core::Context& context, int64_t count, const int64_t* first,
                     void (*task)(void* argument, int64_t index, int worker), void* argument);

// As many workers as ParallelForNear may have.
inline constexpr int kMaxWorkers = 1024;

// The same with a body(index, worker). Static, so that a file of a newer instruction set exports no
// copy of it.
template <typename Body>
static void ParallelForEach(const core::Context& context, int64_t count, Body& body) {
  ParallelFor(
      context, count,
      [](void* argument, int64_t index, int worker) {
        (*static_cast<Body*>(argument))(index, worker);
      },
      &body);
}

// Scratch memory of the calling thread: at least `bytes`, 64-byte aligned, contents undefined. Null
// when out of memory. It is kept for the thread's next call, which may move it: a task asks once.
void* WorkerScratch(int64_t bytes);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_PARALLEL_H_
