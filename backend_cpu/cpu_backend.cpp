#include "backend_cpu/cpu_backend.h"

#include <cstring>
#include <iterator>

#include "backend_cpu/backward/backward.h"
#include "backend_cpu/features.h"
#include "backend_cpu/flash/flash.h"
#include "backend_cpu/mask_scan.h"
#if defined(TANDEM_HAS_ONEDNN)
#include "backend_cpu/onednn/onednn_kernel.h"
#endif
#include "backend_cpu/parallel.h"
#include "backend_cpu/reference.h"
#include "backend_cpu/tiles/tiles.h"

namespace tandem::cpu {
namespace {

using core::DType;
using core::KernelRecord;

// Whether TANDEM_CPU_F32 is against a kernel of kType that multiplies f32 by kProducts.
template <core::DType kType, F32Products kProducts>
bool DeclineProducts(core::Text* reason) {
  const F32Products wanted = WantedF32Products();
  if (kType != core::DType::kF32 || wanted == F32Products::kAny || wanted == kProducts) {
    return false;
  }
  if (kProducts == F32Products::kFma) {
    core::Format(reason, "it multiplies in f32, and TANDEM_CPU_F32 is split");
  } else {
    core::Format(reason, "it multiplies f32 as bf16 parts, and TANDEM_CPU_F32 is fma");
  }
  return true;
}

template <core::DType kType, F32Products kProducts>
bool DeclineFlash(const core::Problem& problem, core::Text* reason) {
  return FlashDecline(kType, problem, reason) || DeclineProducts<kType, kProducts>(reason);
}

template <core::DType kType, F32Products kProducts>
bool DeclineBackward(const core::Problem& problem, core::Text* reason) {
  return BackwardDecline(kType, problem, reason) || DeclineProducts<kType, kProducts>(reason);
}

// What the kernels of one algorithm and instruction set share.
struct Family {
  uint64_t features;
  const char* needs;
  decltype(KernelRecord::workspace_size) workspace_size;
  decltype(KernelRecord::run) run;
};

constexpr char kAvx2Needs[] = "AVX2, FMA and F16C";
constexpr char kAvx512Needs[] = "AVX-512 F, BW, DQ, VL and CD";
constexpr uint64_t kAmxFeatures = kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmxBf16;
constexpr char kAmxNeeds[] =
    "AVX-512 F, BW, DQ, VL, CD and BF16, AMX with BF16, and the operating system's permission to "
    "use its tiles";

constexpr Family kFlashAvx2 = {kFeatureAvx2, kAvx2Needs, FlashWorkspaceAvx2, FlashRunAvx2};
constexpr Family kFlashAvx512 = {kFeatureAvx512, kAvx512Needs, FlashWorkspaceAvx512,
                                 FlashRunAvx512};
constexpr Family kTilesAmx = {kAmxFeatures, kAmxNeeds, TilesWorkspace, TilesRunAmx};
// The algorithm of the kernels on AMX where there is none. Behind every kernel that serves the same
// problems, so that it runs only when asked for.
constexpr Family kTilesEmulated = {kFeatureAvx2, kAvx2Needs, TilesWorkspace, TilesRunEmulated};
constexpr Family kBackwardAvx2 = {kFeatureAvx2, kAvx2Needs, BackwardWorkspaceAvx2, BackwardRunAvx2};
constexpr Family kBackwardAvx512 = {kFeatureAvx512, kAvx512Needs, BackwardWorkspaceAvx512,
                                    BackwardRunAvx512};
constexpr Family kBackwardAmx = {kAmxFeatures, kAmxNeeds, BackwardWorkspaceTiles, BackwardRunAmx};
constexpr Family kBackwardEmulated = {kFeatureAvx2, kAvx2Needs, BackwardWorkspaceTiles,
                                      BackwardRunEmulated};

template <core::DType kType, F32Products kProducts>
constexpr KernelRecord Forward(const char* name, const Family& family) {
  return {name,
          family.features,
          family.needs,
          DeclineFlash<kType, kProducts>,
          family.workspace_size,
          family.run};
}

template <core::DType kType, F32Products kProducts>
constexpr KernelRecord Backward(const char* name, const Family& family) {
  return {name,
          family.features,
          family.needs,
          DeclineBackward<kType, kProducts>,
          family.workspace_size,
          family.run};
}

// Best first, as measured (docs/benchmarks.md). To add a kernel, add its line.
constexpr KernelRecord kKernels[] = {
    Forward<DType::kBF16, F32Products::kSplit>("flash_cpu.amx.bf16", kTilesAmx),
    Forward<DType::kF16, F32Products::kSplit>("flash_cpu.amx.f16", kTilesAmx),
    Forward<DType::kF32, F32Products::kSplit>("flash_cpu.amx.f32", kTilesAmx),
    Forward<DType::kF32, F32Products::kFma>("flash_cpu.avx512.f32", kFlashAvx512),
    Forward<DType::kBF16, F32Products::kFma>("flash_cpu.avx512.bf16", kFlashAvx512),
    Forward<DType::kF16, F32Products::kFma>("flash_cpu.avx512.f16", kFlashAvx512),
    Forward<DType::kF32, F32Products::kFma>("flash_cpu.avx2.f32", kFlashAvx2),
    Forward<DType::kBF16, F32Products::kFma>("flash_cpu.avx2.bf16", kFlashAvx2),
    Forward<DType::kF16, F32Products::kFma>("flash_cpu.avx2.f16", kFlashAvx2),
    Forward<DType::kF32, F32Products::kSplit>("flash_cpu.avx2_tiles.f32", kTilesEmulated),
    Forward<DType::kBF16, F32Products::kSplit>("flash_cpu.avx2_tiles.bf16", kTilesEmulated),
    Forward<DType::kF16, F32Products::kSplit>("flash_cpu.avx2_tiles.f16", kTilesEmulated),
    Backward<DType::kBF16, F32Products::kSplit>("flash_cpu_backward.amx.bf16", kBackwardAmx),
    Backward<DType::kF16, F32Products::kSplit>("flash_cpu_backward.amx.f16", kBackwardAmx),
    Backward<DType::kF32, F32Products::kFma>("flash_cpu_backward.avx512.f32", kBackwardAvx512),
    Backward<DType::kF32, F32Products::kSplit>("flash_cpu_backward.amx.f32", kBackwardAmx),
    Backward<DType::kBF16, F32Products::kFma>("flash_cpu_backward.avx512.bf16", kBackwardAvx512),
    Backward<DType::kF16, F32Products::kFma>("flash_cpu_backward.avx512.f16", kBackwardAvx512),
    Backward<DType::kF32, F32Products::kFma>("flash_cpu_backward.avx2.f32", kBackwardAvx2),
    Backward<DType::kBF16, F32Products::kFma>("flash_cpu_backward.avx2.bf16", kBackwardAvx2),
    Backward<DType::kF16, F32Products::kFma>("flash_cpu_backward.avx2.f16", kBackwardAvx2),
    Backward<DType::kF32, F32Products::kSplit>("flash_cpu_backward.avx2_tiles.f32",
                                               kBackwardEmulated),
    Backward<DType::kBF16, F32Products::kSplit>("flash_cpu_backward.avx2_tiles.bf16",
                                                kBackwardEmulated),
    Backward<DType::kF16, F32Products::kSplit>("flash_cpu_backward.avx2_tiles.f16",
                                               kBackwardEmulated),
#if defined(TANDEM_HAS_ONEDNN)
    {"onednn.cpu", 0, "x86-64", OnednnDecline, OnednnWorkspace, OnednnRun},
#endif
    {"reference.cpu", 0, "x86-64", ReferenceDecline, ReferenceWorkspace, ReferenceRun},
};

int32_t DeviceCount(core::Text*) { return 1; }

tandem_status GetDeviceInfo(int32_t index, core::DeviceInfo* info, core::Text* error) {
  if (index != 0) {
    core::Format(error, "device_index is %d; the CPU is device 0 only", index);
    return TANDEM_STATUS_INVALID_ARGUMENT;
  }
  info->features = CpuFeatures();
  DescribeCpu(&info->description);
  return TANDEM_STATUS_OK;
}

// Copies one innermost row of an array.
void CopyRow(const core::ArrayCopy& copy, const char* source, char* destination) {
  const int32_t last = copy.rank - 1;
  const int64_t count = copy.shape[last];
  const int64_t source_stride = copy.source_strides[last];
  const int64_t destination_stride = copy.destination_strides[last];
  const int64_t size = copy.element_size;
  if (source_stride == 1 && destination_stride == 1) {
    std::memcpy(destination, source, static_cast<size_t>(count * size));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(destination + i * destination_stride * size, source + i * source_stride * size,
                static_cast<size_t>(size));
  }
}

tandem_status CopyArray(const core::ArrayCopy& copy, const core::Context& context) {
  const char* source = static_cast<const char*>(copy.source);
  char* destination = static_cast<char*>(copy.destination);
  if (copy.rank == 0) {
    std::memcpy(destination, source, static_cast<size_t>(copy.element_size));
    return TANDEM_STATUS_OK;
  }
  int64_t rows = 1;
  for (int32_t d = 0; d + 1 < copy.rank; ++d) rows *= copy.shape[d];
  if (copy.shape[copy.rank - 1] == 0) return TANDEM_STATUS_OK;
  constexpr int64_t kRowsPerTask = 256;
  auto task = [&](int64_t index, int) {
    const int64_t end = core::Min((index + 1) * kRowsPerTask, rows);
    for (int64_t row = index * kRowsPerTask; row < end; ++row) {
      int64_t source_offset = 0, destination_offset = 0, rest = row;
      for (int32_t d = copy.rank - 2; d >= 0; --d) {
        source_offset += rest % copy.shape[d] * copy.source_strides[d];
        destination_offset += rest % copy.shape[d] * copy.destination_strides[d];
        rest /= copy.shape[d];
      }
      CopyRow(copy, source + source_offset * copy.element_size,
              destination + destination_offset * copy.element_size);
    }
  };
  ParallelForEach(context, core::CeilDiv(rows, kRowsPerTask), task);
  return TANDEM_STATUS_OK;
}

}  // namespace

const core::Backend* CpuBackend() {
  static constexpr core::Backend kBackend = {
      .abi_version = core::kBackendAbiVersion,
      .backend_size = sizeof(core::Backend),
      .problem_size = sizeof(core::Problem),
      .device_type = TANDEM_DEVICE_CPU,
      .version = TANDEM_VERSION_STRING,
      .name = "cpu",
      .device_count = DeviceCount,
      .device_info = GetDeviceInfo,
      .kernels = kKernels,
      .kernel_count = static_cast<int32_t>(std::size(kKernels)),
      .reserved = 0,
      .prepare_mask = PrepareMask,
      .copy_array = CopyArray,
      .allocate = nullptr,
      .release = nullptr,
      .copy_to_device = nullptr,
      .copy_to_host = nullptr,
      .synchronize = nullptr,
  };
  return &kBackend;
}

}  // namespace tandem::cpu
