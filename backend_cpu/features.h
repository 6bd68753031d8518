// What this processor and its operating system offer, and how much of it may be used.
#ifndef TANDEM_BACKEND_CPU_FEATURES_H_
#define TANDEM_BACKEND_CPU_FEATURES_H_

#include <cstdint>

#include "core/text.h"

namespace tandem::cpu {

// Bits of core::KernelRecord::required_features.
inline constexpr uint64_t kFeatureAvx2 = 1u << 0;    // AVX2, FMA and F16C
inline constexpr uint64_t kFeatureAvx512 = 1u << 1;  // AVX-512 F, BW, DQ, VL and CD
inline constexpr uint64_t kFeatureAvx512Bf16 = 1u << 2;
inline constexpr uint64_t kFeatureAvx512Fp16 = 1u << 3;  // reported, but required by no kernel yet
inline constexpr uint64_t kFeatureAmxBf16 = 1u << 4;     // and this process may use the tiles

// TANDEM_CPU_ISA: the newest instruction set that may be used. Each includes those before it.
enum class IsaCap : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The registers that detection reads; 0 where the processor has no such leaf.
struct CpuidRegisters {
  uint32_t leaf1_ecx;
  uint32_t leaf7_ebx;
  uint32_t leaf7_edx;
  uint32_t leaf7_1_eax;
  uint64_t xcr0;       // register state that the operating system saves; 0 without OSXSAVE
  bool amx_permitted;  // the operating system gave this process the tile registers
};

// Feature bits, from anything. Pure.
uint64_t DetectFeatures(const CpuidRegisters& registers, IsaCap cap);

// The cap that TANDEM_CPU_ISA's value names: baseline, avx2, avx512 or amx; null or empty: amx (no
// cap). Any other value gives baseline and *known = false: a misspelt cap must not silently lift
// it.
IsaCap ParseIsaCap(const char* value, bool* known);

// TANDEM_CPU_F32: how f32 tensors are multiplied. fma: in f32; split: as products of bf16 parts, on
// tiles. Unset: what is fastest here; both keep f32's accuracy.
enum class F32Products : int32_t { kAny = 0, kFma = 1, kSplit = 2 };

// What TANDEM_CPU_F32's value names; null or empty: kAny. Any other value gives kAny and *known =
// false.
F32Products ParseF32Products(const char* value, bool* known);

// The same for this process, read once.
F32Products WantedF32Products();

// This machine's features under TANDEM_CPU_ISA, read once per process. Where the processor has
// tiles and the cap allows them, this asks the operating system for them, once and for good.
uint64_t CpuFeatures();

// One line: "AMD EPYC: avx2 fma f16c; 2 threads", and what TANDEM_CPU_ISA and TANDEM_CPU_F32 do
// where they are set.
void DescribeCpu(core::Text* description);

}  // namespace tandem::cpu

#endif  // TANDEM_BACKEND_CPU_FEATURES_H_
