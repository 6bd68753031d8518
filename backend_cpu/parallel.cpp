#include "backend_cpu/parallel.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>

#include "core/macros.h"

namespace tandem::cpu {
namespace {

// More threads than any machine has; a caller's larger number would only make the runtime fail.
constexpr int64_t kMaxThreads = kMaxWorkers;

struct Loop {
  std::atomic<int64_t> next;
  int64_t count;
  void (*task)(void* argument, int64_t index, int worker);
  void* argument;
};

void Drain(Loop* loop, int worker) {
  for (;;) {
    const int64_t index = loop->next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop->count) return;
    loop->task(loop->argument, index, worker);
  }
}

// One queue of indices for each worker.
struct NearLoop {
  std::atomic<int64_t> next[kMaxWorkers];
  const int64_t* first;
  int workers;
  void (*task)(void* argument, int64_t index, int worker);
  void* argument;
};

void Drain(NearLoop* loop, int worker) {
  for (int n = 0; n < loop->workers; ++n) {
    const int queue = (worker + n) % loop->workers;
    for (;;) {
      const int64_t index = loop->next[queue].fetch_add(1, std::memory_order_relaxed);
      if (index >= loop->first[queue + 1]) break;
      loop->task(loop->argument, index, worker);
    }
  }
}

// Each of the executor's tasks is one worker that drains the common counter: indices are handed out
// dynamically whatever the pool's own policy is, and worker ids are distinct by construction.
template <typename AnyLoop>
void RunOnExecutor(const tandem_executor& executor, int workers, AnyLoop* loop) {
  try {
    executor.parallel_for(
        executor.context, workers,
        [](void* argument, int64_t index) {
          Drain(static_cast<AnyLoop*>(argument), static_cast<int>(index));
        },
        loop);
  } catch (...) {
    // A pool that throws has started too few workers at worst; what is left is done below.
  }
  Drain(loop, 0);
}

struct Scratch {
  void* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;

}  // namespace

int WorkerCount(const core::Context& context, int64_t count) {
  int64_t workers = context.threads > 0 ? context.threads : omp_get_max_threads();
  if (context.executor != nullptr) {
    workers = context.executor->concurrency;
  } else if (omp_in_parallel()) {
    workers = 1;
  }
  return static_cast<int>(core::Max<int64_t>(1, core::Min(core::Min(workers, count), kMaxThreads)));
}

void ParallelFor(const core::Context& context, int64_t count,
                 void (*task)(void* argument, int64_t index, int worker), void* argument) {
  const int workers = WorkerCount(context, count);
  if (workers == 1) {
    for (int64_t index = 0; index < count; ++index) task(argument, index, 0);
    return;
  }
  if (context.executor != nullptr) {
    Loop loop = {{0}, count, task, argument};
    RunOnExecutor(*context.executor, workers, &loop);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
  for (int64_t index = 0; index < count; ++index) {
    task(argument, index, omp_get_thread_num());
  }
}

void ParallelForNear(const core::Context& context, int64_t count, const int64_t* first,
                     void (*task)(void* argument, int64_t index, int worker), void* argument) {
  const int workers = WorkerCount(context, count);
  if (workers == 1) {
    for (int64_t index = 0; index < count; ++index) task(argument, index, 0);
    return;
  }
  NearLoop loop = {{}, first, workers, task, argument};
  for (int w = 0; w < workers; ++w) loop.next[w].store(first[w], std::memory_order_relaxed);
  if (context.executor != nullptr) {
    RunOnExecutor(*context.executor, workers, &loop);
    return;
  }
#pragma omp parallel num_threads(workers)
  Drain(&loop, omp_get_thread_num());
}

void* WorkerScratch(int64_t bytes) {
  if (bytes <= scratch.size && scratch.memory != nullptr) return scratch.memory;
  std::free(scratch.memory);
  scratch.memory = nullptr;
  scratch.size = 0;
  if (bytes > INT64_MAX - 64) return nullptr;
  const int64_t size = core::RoundUp<int64_t>(core::Max<int64_t>(bytes, 1), 64);
  scratch.memory = std::aligned_alloc(64, static_cast<size_t>(size));
  if (scratch.memory != nullptr) scratch.size = size;
  return scratch.memory;
}

}  // namespace tandem::cpu
