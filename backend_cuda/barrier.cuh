// Barriers in shared memory (mbarrier), as sm_80 has them. A barrier's phases end when all of its
// arrivals have come; the n-th phase has parity n % 2.
#ifndef TANDEM_BACKEND_CUDA_BARRIER_CUH_
#define TANDEM_BACKEND_CUDA_BARRIER_CUH_

#include <cuda.h>

#include <cstdint>

namespace tandem::cuda {

__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n"
      "}\n" ::"r"(barrier)
      : "memory");
}

// Arrives once all asynchronous copies that this thread has begun are there. Nothing waits here.
__device__ __forceinline__ void ArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Lets the phase wait for `bytes` of copies as well.
__device__ __forceinline__ void ExpectBytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended. Before the first phase ends, the one "before" it,
// of parity 1, counts as ended.
__device__ __forceinline__ void WaitBarrier(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kHasTry = true;  // it sleeps while it waits
#else
  constexpr bool kHasTry = false;
#endif
  if constexpr (kHasTry) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }
}

// Starts the copy of the box of a tensor [batch, head, row, column] that begins there; what lies
// outside the tensor becomes zeros. Its lines are the first to leave the L2.
__device__ __forceinline__ void CopyBoxOnce(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, int column, int row, int head,
                                            int batch) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to such copies.
__device__ __forceinline__ void PublishSharedWrites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A barrier of `threads` threads of the block; 0 is __syncthreads.
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts for such a barrier without waiting at it.
__device__ __forceinline__ void ArriveThreads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BARRIER_CUH_
