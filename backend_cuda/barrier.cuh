// Barriers in shared memory (mbarrier), as sm_80 has them. A barrier's phases end when all of its
// arrivals have come; the n-th phase has parity n % 2.
#ifndef TANDEM_BACKEND_CUDA_BARRIER_CUH_
#define TANDEM_BACKEND_CUDA_BARRIER_CUH_

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

// A barrier of `threads` threads of the block; 0 is __syncthreads.
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BARRIER_CUH_
