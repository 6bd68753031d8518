// Named wrappers of the sm_90a instructions that CUDA C++ does not spell: barriers in shared
// memory, copies by the tensor memory accelerator (TMA) and matrix products of a warpgroup (wgmma).
// Shared addresses are 32 bits wide, as the instructions take them.
//
// Operands of wgmma m64nNk16. Accumulators and A, of warp w of the warpgroup and lane = 4 * g + c,
// are those of tensor_core.cuh for rows 16 w + g and 16 w + g + 8: element 4 t + 2 r + e of an
// accumulator is row 16 w + 8 r + g, column 8 t + 2 c + e. B lies in shared memory in tiles of 64
// columns of 16 bits, 128 bytes a row, whose 16-byte chunks are permuted by the low bits of the row
// (TMA's 128-byte swizzle); such a tile begins at a multiple of 1024 bytes.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_INSTRUCTIONS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_INSTRUCTIONS_CUH_

#include <cuda.h>

#include "core/element.h"

namespace tandem::cuda::hopper {

using core::DType;

// ---- barriers ----

__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the barriers of this thread's InitBarrier known to the TMA.
__device__ __forceinline__ void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same by one lane of a warp that is together here.
__device__ __forceinline__ void ArriveOnce(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred is_elected;\n"
      "elect.sync _|is_elected, 0xffffffff;\n"
      "@is_elected mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(barrier)
      : "memory");
}
// Arrives, and lets the phase wait for `bytes` of copies as well.
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void Wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void ArriveAndWait(uint32_t barrier, uint32_t parity) {
  Arrive(barrier);
  Wait(barrier, parity);
}
// A barrier of `threads` threads of the block; 0 is __syncthreads.
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts for such a barrier without waiting at it.
__device__ __forceinline__ void ArriveThreads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- registers ----

template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- copies ----

// Starts the copy of the box of a tensor [batch, head, row, column] that begins there; what lies
// outside the tensor becomes zeros.
__device__ __forceinline__ void CopyBox(uint32_t target, const CUtensorMap* map, uint32_t barrier,
                                        int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// Has the map at hand when its first box is copied.
__device__ __forceinline__ void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Starts a copy of eight bytes to shared memory.
__device__ __forceinline__ void CopyWord(uint32_t target, const uint64_t* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(source) : "memory");
}
// Arrives when the copies that this thread has started so are done.
__device__ __forceinline__ void ArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Starts the copy of a box from shared memory; what lies outside the tensor is not written. Copies
// of a thread belong to a group once they are committed.
__device__ __forceinline__ void StoreBox(uint32_t source, const CUtensorMap* map, int column,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::
          "r"(source),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void CommitBoxes() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until this thread's boxes have been read from shared memory.
__device__ __forceinline__ void WaitBoxesRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Four 8 x 8 matrices of 16-bit elements, as fragments of accumulators; lanes 8 m to 8 m + 7 give
// the addresses of the rows of matrix m.
__device__ __forceinline__ void StoreMatrices(uint32_t address, uint32_t x0, uint32_t x1,
                                              uint32_t x2, uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to the TMA and to wgmma.
__device__ __forceinline__ void PublishSharedWrites() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products of a warpgroup ----

// Before the first product after registers of one were written.
__device__ __forceinline__ void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Operands: four, 16, 32 and 64 accumulators, updated ("+f") or only written ("=f").
#define TANDEM_F4(c, d, i) c((d)[i]), c((d)[(i) + 1]), c((d)[(i) + 2]), c((d)[(i) + 3])
#define TANDEM_F16(c, d, i) \
  TANDEM_F4(c, d, i), TANDEM_F4(c, d, (i) + 4), TANDEM_F4(c, d, (i) + 8), TANDEM_F4(c, d, (i) + 12)
#define TANDEM_F32(c, d) TANDEM_F16(c, d, 0), TANDEM_F16(c, d, 16)
#define TANDEM_F64(c, d) TANDEM_F32(c, d), TANDEM_F16(c, d, 32), TANDEM_F16(c, d, 48)
#define TANDEM_F96(c, d) TANDEM_F64(c, d), TANDEM_F16(c, d, 64), TANDEM_F16(c, d, 80)
#define TANDEM_F128(c, d) TANDEM_F96(c, d), TANDEM_F16(c, d, 96), TANDEM_F16(c, d, 112)
#define TANDEM_UPDATED(x) "+f"(x)
#define TANDEM_WRITTEN(x) "=f"(x)

// Keeps the compiler from moving an accumulator across this place.
__device__ __forceinline__ void Pin(float (&d)[16]) {
  asm volatile("" : TANDEM_F16(TANDEM_UPDATED, d, 0)::"memory");
}
__device__ __forceinline__ void Pin(float (&d)[32]) {
  asm volatile("" : TANDEM_F32(TANDEM_UPDATED, d)::"memory");
}
__device__ __forceinline__ void Pin(float (&d)[64]) {
  asm volatile("" : TANDEM_F64(TANDEM_UPDATED, d)::"memory");
}
__device__ __forceinline__ void Pin(float (&d)[96]) {
  asm volatile("" : TANDEM_F96(TANDEM_UPDATED, d)::"memory");
}
__device__ __forceinline__ void Pin(float (&d)[128]) {
  asm volatile("" : TANDEM_F128(TANDEM_UPDATED, d)::"memory");
}

// Waits until at most kPending groups are under way; `d` belongs to one that has ended.
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[16]) {
  asm volatile("wgmma.wait_group.sync.aligned %16;"
               : TANDEM_F16(TANDEM_UPDATED, d, 0)
               : "n"(kPending)
               : "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;"
               : TANDEM_F32(TANDEM_UPDATED, d)
               : "n"(kPending)
               : "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;"
               : TANDEM_F64(TANDEM_UPDATED, d)
               : "n"(kPending)
               : "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[96]) {
  asm volatile("wgmma.wait_group.sync.aligned %96;"
               : TANDEM_F96(TANDEM_UPDATED, d)
               : "n"(kPending)
               : "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;"
               : TANDEM_F128(TANDEM_UPDATED, d)
               : "n"(kPending)
               : "memory");
}

// The same where the groups under way go on with the accumulators of those before.
template <int kPending>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define TANDEM_LIST16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define TANDEM_LIST32                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define TANDEM_LIST64                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"
#define TANDEM_LIST96                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "  \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "  \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95}"
#define TANDEM_LIST128                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "  \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "  \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "    \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "   \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
// The upper half of B's descriptor: 128-byte swizzle, 1024 bytes from 8 rows to the next. `keep`: 1
// to add to the accumulators, 0 to begin them.
#define TANDEM_WGMMA(shape, type, list, a0, a1, a2, a3, b, keep, transposed)                    \
  "{\n"                                                                                         \
  ".reg .pred keep;\n"                                                                          \
  ".reg .b64 tile;\n"                                                                           \
  "setp.ne.b32 keep, " keep                                                                     \
  ", 0;\n"                                                                                      \
  "mov.b64 tile, {" b                                                                           \
  ", 1073741888};\n"                                                                            \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " list ", {" a0 ", " a1 ", " a2 \
  ", " a3 "}, tile, keep, 1, 1, " transposed                                                    \
  ";\n"                                                                                         \
  "}\n"
// The same with A in shared memory, as B; a: the low half of its descriptor.
#define TANDEM_MULTIPLY_SHARED(shape, type, list, outputs, a_operand, b_operand, keep) \
  asm volatile(                                                                        \
      "{\n"                                                                            \
      ".reg .pred keep;\n"                                                             \
      ".reg .b64 rows, tile;\n"                                                        \
      "setp.ne.b32 keep, " keep                                                        \
      ", 0;\n"                                                                         \
      "mov.b64 rows, {" a_operand                                                      \
      ", 1073741888};\n"                                                               \
      "mov.b64 tile, {" b_operand                                                      \
      ", 1073741888};\n"                                                               \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " list             \
      ", rows, tile, keep, 1, 1, 0, 0;\n"                                              \
      "}\n"                                                                            \
      : outputs                                                                        \
      : "r"(a), "r"(tile))
#define TANDEM_MULTIPLY32_SHARED(type, access, keep)                                               \
  TANDEM_MULTIPLY_SHARED("m64n32k16", type, TANDEM_LIST16, TANDEM_F16(access, d, 0), "%16", "%17", \
                         keep)
#define TANDEM_MULTIPLY64_SHARED(type, access, keep)                                            \
  TANDEM_MULTIPLY_SHARED("m64n64k16", type, TANDEM_LIST32, TANDEM_F32(access, d), "%32", "%33", \
                         keep)
#define TANDEM_MULTIPLY128_SHARED(type, access, keep)                                            \
  TANDEM_MULTIPLY_SHARED("m64n128k16", type, TANDEM_LIST64, TANDEM_F64(access, d), "%64", "%65", \
                         keep)
#define TANDEM_MULTIPLY(shape, type, list, outputs, a0, a1, a2, a3, b, keep, transposed) \
  asm volatile(TANDEM_WGMMA(shape, type, list, a0, a1, a2, a3, b, keep, transposed)      \
               : outputs                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tile))
#define TANDEM_MULTIPLY64(type, access, keep, transposed)                                       \
  TANDEM_MULTIPLY("m64n64k16", type, TANDEM_LIST32, TANDEM_F32(access, d), "%32", "%33", "%34", \
                  "%35", "%36", keep, transposed)
#define TANDEM_MULTIPLY128(type, access, keep, transposed)                                       \
  TANDEM_MULTIPLY("m64n128k16", type, TANDEM_LIST64, TANDEM_F64(access, d), "%64", "%65", "%66", \
                  "%67", "%68", keep, transposed)
#define TANDEM_MULTIPLY192(type, access, keep, transposed)                                       \
  TANDEM_MULTIPLY("m64n192k16", type, TANDEM_LIST96, TANDEM_F96(access, d), "%96", "%97", "%98", \
                  "%99", "%100", keep, transposed)
#define TANDEM_MULTIPLY256(type, access, keep, transposed)                                    \
  TANDEM_MULTIPLY("m64n256k16", type, TANDEM_LIST128, TANDEM_F128(access, d), "%128", "%129", \
                  "%130", "%131", "%132", keep, transposed)

// Products of 64 rows of the warpgroup, 16 columns of A and 16 rows or columns of a tile in shared
// memory, begun. tile: the low half of a descriptor (KeyTile, ValueTile).

// d = a * tile^T.
template <DType kMathType>
__device__ __forceinline__ void BeginScores(float (&d)[64], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128("f16", TANDEM_WRITTEN, "0", "0");
  } else {
    TANDEM_MULTIPLY128("bf16", TANDEM_WRITTEN, "0", "0");
  }
}
// d += a * tile^T.
template <DType kMathType>
__device__ __forceinline__ void AddScores(float (&d)[64], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128("f16", TANDEM_UPDATED, "1", "0");
  } else {
    TANDEM_MULTIPLY128("bf16", TANDEM_UPDATED, "1", "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void BeginScores(float (&d)[32], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64("f16", TANDEM_WRITTEN, "0", "0");
  } else {
    TANDEM_MULTIPLY64("bf16", TANDEM_WRITTEN, "0", "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddScores(float (&d)[32], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64("f16", TANDEM_UPDATED, "1", "0");
  } else {
    TANDEM_MULTIPLY64("bf16", TANDEM_UPDATED, "1", "0");
  }
}
// The same with the rows in shared memory, `a` as KeyTile gives it for them.
template <DType kMathType>
__device__ __forceinline__ void BeginScores(float (&d)[64], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128_SHARED("f16", TANDEM_WRITTEN, "0");
  } else {
    TANDEM_MULTIPLY128_SHARED("bf16", TANDEM_WRITTEN, "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddScores(float (&d)[64], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128_SHARED("f16", TANDEM_UPDATED, "1");
  } else {
    TANDEM_MULTIPLY128_SHARED("bf16", TANDEM_UPDATED, "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void BeginScores(float (&d)[32], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64_SHARED("f16", TANDEM_WRITTEN, "0");
  } else {
    TANDEM_MULTIPLY64_SHARED("bf16", TANDEM_WRITTEN, "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddScores(float (&d)[32], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64_SHARED("f16", TANDEM_UPDATED, "1");
  } else {
    TANDEM_MULTIPLY64_SHARED("bf16", TANDEM_UPDATED, "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void BeginScores(float (&d)[16], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY32_SHARED("f16", TANDEM_WRITTEN, "0");
  } else {
    TANDEM_MULTIPLY32_SHARED("bf16", TANDEM_WRITTEN, "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddScores(float (&d)[16], uint32_t a, uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY32_SHARED("f16", TANDEM_UPDATED, "1");
  } else {
    TANDEM_MULTIPLY32_SHARED("bf16", TANDEM_UPDATED, "1");
  }
}
// d = a * tile.
template <DType kMathType>
__device__ __forceinline__ void BeginValues(float (&d)[32], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64("f16", TANDEM_WRITTEN, "0", "1");
  } else {
    TANDEM_MULTIPLY64("bf16", TANDEM_WRITTEN, "0", "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void BeginValues(float (&d)[64], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128("f16", TANDEM_WRITTEN, "0", "1");
  } else {
    TANDEM_MULTIPLY128("bf16", TANDEM_WRITTEN, "0", "1");
  }
}
// d += a * tile.
template <DType kMathType>
__device__ __forceinline__ void AddValues(float (&d)[32], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY64("f16", TANDEM_UPDATED, "1", "1");
  } else {
    TANDEM_MULTIPLY64("bf16", TANDEM_UPDATED, "1", "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddValues(float (&d)[64], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY128("f16", TANDEM_UPDATED, "1", "1");
  } else {
    TANDEM_MULTIPLY128("bf16", TANDEM_UPDATED, "1", "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddValues(float (&d)[96], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY192("f16", TANDEM_UPDATED, "1", "1");
  } else {
    TANDEM_MULTIPLY192("bf16", TANDEM_UPDATED, "1", "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddValues(float (&d)[128], const uint32_t (&a)[4], uint32_t tile) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_MULTIPLY256("f16", TANDEM_UPDATED, "1", "1");
  } else {
    TANDEM_MULTIPLY256("bf16", TANDEM_UPDATED, "1", "1");
  }
}

#undef TANDEM_MULTIPLY256
#undef TANDEM_MULTIPLY192
#undef TANDEM_MULTIPLY128
#undef TANDEM_MULTIPLY128_SHARED
#undef TANDEM_MULTIPLY64_SHARED
#undef TANDEM_MULTIPLY32_SHARED
#undef TANDEM_MULTIPLY_SHARED
#undef TANDEM_MULTIPLY64
#undef TANDEM_MULTIPLY
#undef TANDEM_WGMMA
#undef TANDEM_LIST128
#undef TANDEM_LIST96
#undef TANDEM_LIST64
#undef TANDEM_LIST32
#undef TANDEM_LIST16
#undef TANDEM_WRITTEN
#undef TANDEM_UPDATED
#undef TANDEM_F128
#undef TANDEM_F96
#undef TANDEM_F64
#undef TANDEM_F32
#undef TANDEM_F16
#undef TANDEM_F4

// The low half of the descriptor of 16 columns of keys, at `address`; `rows` keys follow each
// other, then the next 64 columns.
__device__ __forceinline__ uint32_t KeyTile(uint32_t address) { return address >> 4 | 1u << 16; }
// That of 16 rows of values.
__device__ __forceinline__ uint32_t ValueTile(uint32_t address, int rows) {
  return address >> 4 | static_cast<uint32_t>(rows * 128 >> 4) << 16;
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_INSTRUCTIONS_CUH_
