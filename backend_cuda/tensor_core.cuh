// Named wrappers of the sm_80 instructions that CUDA C++ does not spell: matrix products of one
// warp, fragment loads and asynchronous copies.
//
// Fragments of m16n8k16, for lane = 4 * g + t: an accumulator holds rows g and g + 8, columns 2 t
// and 2 t + 1 as {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
#ifndef TANDEM_BACKEND_CUDA_TENSOR_CORE_CUH_
#define TANDEM_BACKEND_CUDA_TENSOR_CORE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/element.h"

namespace tandem::cuda {

using core::DType;

// accumulator += a * b. kMathType: kF16 or kBF16.
template <DType kMathType>
__device__ __forceinline__ void MultiplyAccumulate(float (&accumulator)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  if constexpr (kMathType == DType::kF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8x8 matrices of 16-bit elements; each lane gives the address of one row.
__device__ __forceinline__ void LoadMatrices(uint32_t (&fragment)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&fragment)[4],
                                                       uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address)
               : "memory");
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void CopyAsync16(uint32_t shared_address, const void* source,
                                            int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(source),
               "r"(bytes)
               : "memory");
}
// Copies 16 bytes.
__device__ __forceinline__ void CopyAsync16(uint32_t shared_address, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address), "l"(source)
               : "memory");
}
// Copies 8 bytes, or fills them with zeros where `bytes` is 0.
__device__ __forceinline__ void CopyAsync8(uint32_t shared_address, const void* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch, on Hopper: lets the next kernel of the stream begin once every
// block of this one has come here, and waits in that kernel for all that this one wrote. launch.h
// says which launches ask for it; without that, and on other GPUs, they do nothing.
__device__ __forceinline__ void AllowDependentLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void WaitForEarlierLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// max that keeps NaN from either side (core::MaxKeepNan in one instruction).
__device__ __forceinline__ float MaxKeepNan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// min that keeps NaN.
__device__ __forceinline__ float MinKeepNan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Whether exponents against a finite reference need care: the reference in units of the exponential
// is not finite, or so large that its rounding alone could be more than the exponential takes.
__device__ __forceinline__ bool IsExtreme(float reference, float in_units) {
  return core::IsFinite(reference) && !(fabsf(in_units) < 0x1p24f);
}
// score * scale - natural, natural being such a product rounded. Neither is fused: the score that
// natural is of gives 0.
__device__ __forceinline__ float CarefulExponent(float score, float scale, float natural) {
  return __fsub_rn(__fmul_rn(score, scale), natural);
}

// 2^x to 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float Exp2Approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two floats rounded to nearest even into one register, `low` in the lower half.
template <DType kType>
__device__ __forceinline__ uint32_t PackPair(float low, float high) {
  uint32_t packed;
  if constexpr (kType == DType::kF16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// a * b + c of both halves.
template <DType kType>
__device__ __forceinline__ uint32_t MultiplyAddPair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if constexpr (kType == DType::kF16) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

template <DType kType>
__device__ __forceinline__ float UnpackLow(uint32_t packed) {
  if constexpr (kType == DType::kBF16) return core::BitsToFloat(packed << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
}
template <DType kType>
__device__ __forceinline__ float UnpackHigh(uint32_t packed) {
  if constexpr (kType == DType::kBF16) return core::BitsToFloat(packed & 0xffff0000u);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}

// Elements of device memory by the hardware's conversions; the values of core::LoadFloat and
// core::StoreFloat.
__device__ __forceinline__ float LoadElement(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kF16 ? __half2float(__ushort_as_half(bits)) : core::Bf16ToFloat(bits);
}
__device__ __forceinline__ void StoreElement(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = dtype == DType::kF16
                                              ? __half_as_ushort(__float2half_rn(value))
                                              : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_TENSOR_CORE_CUH_
