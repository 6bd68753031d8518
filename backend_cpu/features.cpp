#include "backend_cpu/features.h"

#include <cpuid.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

namespace tandem::cpu {
namespace {

constexpr uint32_t Bit(int index) { return uint32_t{1} << index; }

bool HasAll(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

constexpr uint32_t kLeaf1EcxFma = Bit(12);
constexpr uint32_t kLeaf1EcxOsxsave = Bit(27);
constexpr uint32_t kLeaf1EcxAvx = Bit(28);
constexpr uint32_t kLeaf1EcxF16c = Bit(29);
constexpr uint32_t kLeaf7EbxAvx2 = Bit(5);
constexpr uint32_t kLeaf7EbxAvx512 =
    Bit(16) | Bit(17) | Bit(28) | Bit(30) | Bit(31);  // F, DQ, CD, BW, VL
constexpr uint32_t kLeaf7EdxAmxBf16 = Bit(22);
constexpr uint32_t kLeaf7EdxAvx512Fp16 = Bit(23);
constexpr uint32_t kLeaf7EdxAmxTile = Bit(24);
constexpr uint32_t kLeaf7Subleaf1EaxAvx512Bf16 = Bit(5);

constexpr uint64_t kXcr0Ymm = 0x6;              // XMM, YMM
constexpr uint64_t kXcr0Zmm = kXcr0Ymm | 0xe0;  // opmask, upper halves, ZMM16 to ZMM31
constexpr uint64_t kXcr0Tiles = 0x60000;        // TILECFG, TILEDATA

// Asks for the tile registers, for all threads of the process. Refused where an alternate signal
// stack in use is too small for them.
bool AskForTiles() {
  constexpr long kRequestComponentPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestComponentPermission, kTileData) == 0;
}

CpuidRegisters ReadRegisters(IsaCap cap) {
  CpuidRegisters registers = {};
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return registers;
  registers.leaf1_ecx = ecx;
  if (ecx & kLeaf1EcxOsxsave) {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    registers.xcr0 = (uint64_t{high} << 32) | low;
  }
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
    registers.leaf7_ebx = ebx;
    registers.leaf7_edx = edx;
    if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) {
      registers.leaf7_1_eax = eax;
    }
  }
  if (cap >= IsaCap::kAmx && HasAll(registers.leaf7_edx, kLeaf7EdxAmxTile) &&
      HasAll(registers.xcr0, kXcr0Tiles)) {
    registers.amx_permitted = AskForTiles();
  }
  return registers;
}

// The processor's name without padding; "x86-64" where it has none.
void ReadBrand(char (&brand)[49]) {
  std::memset(brand, 0, sizeof(brand));
  for (uint32_t leaf = 0; leaf < 3; ++leaf) {
    uint32_t words[4] = {};
    if (__get_cpuid(0x80000002u + leaf, &words[0], &words[1], &words[2], &words[3]) == 0) break;
    std::memcpy(brand + 16 * leaf, words, 16);
  }
  size_t length = std::strlen(brand);
  while (length > 0 && brand[length - 1] == ' ') brand[--length] = '\0';
  const size_t leading = std::strspn(brand, " ");
  std::memmove(brand, brand + leading, length - leading + 1);
  if (brand[0] == '\0') std::strcpy(brand, "x86-64");
}

constexpr size_t kSettingSize = 32;  // of an environment variable's value, as far as it is shown

struct Cpu {
  uint64_t features;
  IsaCap cap;
  bool cap_is_set;
  bool cap_is_known;
  char cap_value[kSettingSize];
  F32Products f32_products;
  bool f32_is_known;
  char f32_value[kSettingSize];
  char brand[49];
};

const Cpu& ThisCpu() {
  static const Cpu cpu = [] {
    Cpu result = {};
    const char* value = std::getenv("TANDEM_CPU_ISA");
    result.cap = ParseIsaCap(value, &result.cap_is_known);
    result.cap_is_set = value != nullptr && *value != '\0';
    if (value != nullptr) std::strncpy(result.cap_value, value, kSettingSize - 1);
    value = std::getenv("TANDEM_CPU_F32");
    result.f32_products = ParseF32Products(value, &result.f32_is_known);
    if (value != nullptr) std::strncpy(result.f32_value, value, kSettingSize - 1);
    result.features = DetectFeatures(ReadRegisters(result.cap), result.cap);
    ReadBrand(result.brand);
    return result;
  }();
  return cpu;
}

}  // namespace

uint64_t DetectFeatures(const CpuidRegisters& registers, IsaCap cap) {
  uint64_t features = 0;
  const bool avx2 =
      HasAll(registers.leaf1_ecx, kLeaf1EcxOsxsave | kLeaf1EcxAvx | kLeaf1EcxFma | kLeaf1EcxF16c) &&
      HasAll(registers.leaf7_ebx, kLeaf7EbxAvx2) && HasAll(registers.xcr0, kXcr0Ymm);
  if (cap < IsaCap::kAvx2 || !avx2) return features;
  features |= kFeatureAvx2;
  const bool avx512 =
      HasAll(registers.leaf7_ebx, kLeaf7EbxAvx512) && HasAll(registers.xcr0, kXcr0Zmm);
  if (cap < IsaCap::kAvx512 || !avx512) return features;
  features |= kFeatureAvx512;
  if (HasAll(registers.leaf7_1_eax, kLeaf7Subleaf1EaxAvx512Bf16)) features |= kFeatureAvx512Bf16;
  if (HasAll(registers.leaf7_edx, kLeaf7EdxAvx512Fp16)) features |= kFeatureAvx512Fp16;
  const bool amx = HasAll(registers.leaf7_edx, kLeaf7EdxAmxTile | kLeaf7EdxAmxBf16) &&
                   HasAll(registers.xcr0, kXcr0Tiles) && registers.amx_permitted;
  if (cap >= IsaCap::kAmx && amx) features |= kFeatureAmxBf16;
  return features;
}

IsaCap ParseIsaCap(const char* value, bool* known) {
  *known = true;
  if (value == nullptr || *value == '\0') return IsaCap::kAmx;
  const std::string_view name(value);
  if (name == "baseline") return IsaCap::kBaseline;
  if (name == "avx2") return IsaCap::kAvx2;
  if (name == "avx512") return IsaCap::kAvx512;
  if (name == "amx") return IsaCap::kAmx;
  *known = false;
  return IsaCap::kBaseline;
}

F32Products ParseF32Products(const char* value, bool* known) {
  *known = true;
  if (value == nullptr || *value == '\0') return F32Products::kAny;
  const std::string_view name(value);
  if (name == "fma") return F32Products::kFma;
  if (name == "split") return F32Products::kSplit;
  *known = false;
  return F32Products::kAny;
}

F32Products WantedF32Products() { return ThisCpu().f32_products; }

uint64_t CpuFeatures() { return ThisCpu().features; }

void DescribeCpu(core::Text* description) {
  const Cpu& cpu = ThisCpu();
  const auto has = [&cpu](uint64_t feature) { return HasAll(cpu.features, feature); };
  core::Text cap = {};
  if (!cpu.cap_is_known) {
    core::Format(&cap,
                 "; TANDEM_CPU_ISA is \"%s\", not baseline, avx2, avx512 or amx, and is taken as "
                 "baseline",
                 cpu.cap_value);
  } else if (cpu.cap_is_set) {
    core::Format(&cap, "; TANDEM_CPU_ISA caps it at %s", cpu.cap_value);
  }
  core::Text f32 = {};
  if (!cpu.f32_is_known) {
    core::Format(&f32, "; TANDEM_CPU_F32 is \"%s\", not fma or split, and is ignored",
                 cpu.f32_value);
  } else if (cpu.f32_products != F32Products::kAny) {
    core::Format(&f32, "; TANDEM_CPU_F32 is %s", cpu.f32_value);
  }
  const int threads = omp_get_max_threads();
  core::Format(description, "%s:%s%s%s%s%s; %d thread%s%.200s%.100s", cpu.brand,
               has(kFeatureAvx2) ? " avx2 fma f16c" : " baseline x86-64",
               has(kFeatureAvx512) ? " avx512" : "", has(kFeatureAvx512Bf16) ? " avx512_bf16" : "",
               has(kFeatureAvx512Fp16) ? " avx512_fp16" : "",
               has(kFeatureAmxBf16) ? " amx_bf16" : "", threads, threads == 1 ? "" : "s", cap.data,
               f32.data);
}

}  // namespace tandem::cpu
