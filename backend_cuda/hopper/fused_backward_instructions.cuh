// Wrappers of sm_90a instructions (instructions.cuh) that only the fused backward kernel uses:
// products whose both operands are transposed, and sums in global memory.
#ifndef TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_INSTRUCTIONS_CUH_
#define TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_INSTRUCTIONS_CUH_

#include "backend_cuda/hopper/instructions.cuh"

namespace tandem::cuda::hopper {

// ---- products ----

#define TANDEM_F4(c, d, i) c((d)[i]), c((d)[(i) + 1]), c((d)[(i) + 2]), c((d)[(i) + 3])
#define TANDEM_F16(c, d, i) \
  TANDEM_F4(c, d, i), TANDEM_F4(c, d, (i) + 4), TANDEM_F4(c, d, (i) + 8), TANDEM_F4(c, d, (i) + 12)
#define TANDEM_UPDATED(x) "+f"(x)
#define TANDEM_WRITTEN(x) "=f"(x)

#define TANDEM_MULTIPLY_TRANSPOSED(shape, type, list, outputs, a_operand, b_operand, keep) \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred keep;\n"                                                                 \
      ".reg .b64 rows, tile;\n"                                                            \
      "setp.ne.b32 keep, " keep                                                            \
      ", 0;\n"                                                                             \
      "mov.b64 rows, {" a_operand                                                          \
      ", 1073741888};\n"                                                                   \
      "mov.b64 tile, {" b_operand                                                          \
      ", 1073741888};\n"                                                                   \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list                \
      "}, rows, tile, keep, 1, 1, 1, 1;\n"                                                 \
      "}\n"                                                                                \
      : outputs                                                                            \
      : "r"(a), "r"(b))
#define TANDEM_LIST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TANDEM_LIST32 \
  TANDEM_LIST16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TANDEM_OUT32(access) TANDEM_F16(access, d, 0), TANDEM_F16(access, d, 16)
#define TANDEM_TRANSPOSED32(type, access, keep)                                                 \
  TANDEM_MULTIPLY_TRANSPOSED("m64n32k16", type, TANDEM_LIST16, TANDEM_F16(access, d, 0), "%16", \
                             "%17", keep)
#define TANDEM_TRANSPOSED64(type, access, keep)                                                    \
  TANDEM_MULTIPLY_TRANSPOSED("m64n64k16", type, TANDEM_LIST32, TANDEM_OUT32(access), "%32", "%33", \
                             keep)

// d = a^T b, begun: both have 16 rows in shared memory, a with 64 columns, b with as many as d;
// the low halves of their descriptors are ValueTile's.
template <DType kMathType>
__device__ __forceinline__ void BeginTransposed(float (&d)[16], uint32_t a, uint32_t b) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_TRANSPOSED32("f16", TANDEM_WRITTEN, "0");
  } else {
    TANDEM_TRANSPOSED32("bf16", TANDEM_WRITTEN, "0");
  }
}
// d += a^T b.
template <DType kMathType>
__device__ __forceinline__ void AddTransposed(float (&d)[16], uint32_t a, uint32_t b) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_TRANSPOSED32("f16", TANDEM_UPDATED, "1");
  } else {
    TANDEM_TRANSPOSED32("bf16", TANDEM_UPDATED, "1");
  }
}
template <DType kMathType>
__device__ __forceinline__ void BeginTransposed(float (&d)[32], uint32_t a, uint32_t b) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_TRANSPOSED64("f16", TANDEM_WRITTEN, "0");
  } else {
    TANDEM_TRANSPOSED64("bf16", TANDEM_WRITTEN, "0");
  }
}
template <DType kMathType>
__device__ __forceinline__ void AddTransposed(float (&d)[32], uint32_t a, uint32_t b) {
  if constexpr (kMathType == DType::kF16) {
    TANDEM_TRANSPOSED64("f16", TANDEM_UPDATED, "1");
  } else {
    TANDEM_TRANSPOSED64("bf16", TANDEM_UPDATED, "1");
  }
}

#undef TANDEM_TRANSPOSED64
#undef TANDEM_TRANSPOSED32
#undef TANDEM_OUT32
#undef TANDEM_LIST32
#undef TANDEM_LIST16
#undef TANDEM_MULTIPLY_TRANSPOSED
#undef TANDEM_WRITTEN
#undef TANDEM_UPDATED
#undef TANDEM_F16
#undef TANDEM_F4

// ---- shared memory ----

// Four 8 x 8 tiles of a warp's fragment to shared memory; lane 8 n + i gives the address of row i
// of tile n.
__device__ __forceinline__ void StoreMatrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}
__device__ __forceinline__ void LoadShared(uint32_t address, float* x) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address));
}

// ---- sums in global memory ----

// Starts adding `bytes` of f32 in shared memory to those at `target`, in no order among blocks.
__device__ __forceinline__ void StartReduction(float* target, uint32_t source, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(target),
      "r"(source), "r"(bytes)
      : "memory");
}
// Until this thread's reductions have read their source.
__device__ __forceinline__ void WaitReductionSources() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until they are done.
__device__ __forceinline__ void WaitReductions() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace tandem::cuda::hopper

#endif  // TANDEM_BACKEND_CUDA_HOPPER_FUSED_BACKWARD_INSTRUCTIONS_CUH_
