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

template <core::DType kType>
constexpr KernelRecord FlashAvx512(const char* name) {
  return {name,
          kFeatureAvx512,
          "AVX-512 F, BW, DQ, VL and CD",
          DeclineFlash<kType, F32Products::kFma>,
          FlashWorkspaceAvx512,
          FlashRunAvx512};
}

template <core::DType kType>
constexpr KernelRecord FlashAvx2(const char* name) {
  return {name,
          kFeatureAvx2,
          "AVX2, FMA and F16C",
          DeclineFlash<kType, F32Products::kFma>,
          FlashWorkspaceAvx2,
          FlashRunAvx2};
}

constexpr uint64_t kAmxFeatures = kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmxBf16;
constexpr char kAmxNeeds[] =
    "AVX-512 F, BW, DQ, VL, CD and BF16, AMX with BF16, and the operating system's permission to "
    "use its tiles";

template <core::DType kType>
constexpr KernelRecord TilesAmx(const char* name) {
  return {name,           kAmxFeatures, kAmxNeeds, DeclineFlash<kType, F32Products::kSplit>,
          TilesWorkspace, TilesRunAmx};
}

// The algorithm of the kernels on AMX where there is none. Behind every kernel that serves the same
// problems, so that it runs only when asked for.
template <core::DType kType>
constexpr KernelRecord TilesEmulated(const char* name) {
  return {name,
          kFeatureAvx2,
          "AVX2, FMA and F16C",
          DeclineFlash<kType, F32Products::kSplit>,
          TilesWorkspace,
          TilesRunEmulated};
}

template <core::DType kType, F32Products kProducts>
bool DeclineBackward(const core::Problem& problem, core::Text* reason) {
  return BackwardDecline(kType, problem, reason) || DeclineProducts<kType, kProducts>(reason);
}

template <core::DType kType>
constexpr KernelRecord BackwardAmx(const char* name) {
  return {name,
          kAmxFeatures,
          kAmxNeeds,
          DeclineBackward<kType, F32Products::kSplit>,
          BackwardWorkspaceTiles,
          BackwardRunAmx};
}

// Behind the others, as TilesEmulated.
template <core::DType kType>
constexpr KernelRecord BackwardEmulated(const char* name) {
  return {name,
          kFeatureAvx2,
          "AVX2, FMA and F16C",
          DeclineBackward<kType, F32Products::kSplit>,
          BackwardWorkspaceTiles,
          BackwardRunEmulated};
}

template <core::DType kType>
constexpr KernelRecord BackwardAvx512(const char* name) {
  return {name,
          kFeatureAvx512,
          "AVX-512 F, BW, DQ, VL and CD",
          DeclineBackward<kType, F32Products::kFma>,
          BackwardWorkspaceAvx512,
          BackwardRunAvx512};
}

template <core::DType kType>
constexpr KernelRecord BackwardAvx2(const char* name) {
  return {name,
          kFeatureAvx2,
          "AVX2, FMA and F16C",
          DeclineBackward<kType, F32Products::kFma>,
          BackwardWorkspaceAvx2,
          BackwardRunAvx2};
}

// Best first, as measured (docs/benchmarks.md). To add a kernel, add its line.
constexpr KernelRecord kKernels[] = {
    TilesAmx<core::DType::kBF16>("flash_cpu.amx.bf16"),
    TilesAmx<core::DType::kF16>("flash_cpu.amx.f16"),
    TilesAmx<core::DType::kF32>("flash_cpu.amx.f32"),
    FlashAvx512<core::DType::kF32>("flash_cpu.avx512.f32"),
    FlashAvx512<core::DType::kBF16>("flash_cpu.avx512.bf16"),
    FlashAvx512<core::DType::kF16>("flash_cpu.avx512.f16"),
    FlashAvx2<core::DType::kF32>("flash_cpu.avx2.f32"),
    FlashAvx2<core::DType::kBF16>("flash_cpu.avx2.bf16"),
    FlashAvx2<core::DType::kF16>("flash_cpu.avx2.f16"),
    TilesEmulated<core::DType::kF32>("flash_cpu.avx2_tiles.f32"),
    TilesEmulated<core::DType::kBF16>("flash_cpu.avx2_tiles.bf16"),
    TilesEmulated<core::DType::kF16>("flash_cpu.avx2_tiles.f16"),
    BackwardAmx<core::DType::kBF16>("flash_cpu_backward.amx.bf16"),
    BackwardAmx<core::DType::kF16>("flash_cpu_backward.amx.f16"),
    BackwardAvx512<core::DType::kF32>("flash_cpu_backward.avx512.f32"),
    BackwardAmx<core::DType::kF32>("flash_cpu_backward.amx.f32"),
    BackwardAvx512<core::DType::kBF16>("flash_cpu_backward.avx512.bf16"),
    BackwardAvx512<core::DType::kF16>("flash_cpu_backward.avx512.f16"),
    BackwardAvx2<core::DType::kF32>("flash_cpu_backward.avx2.f32"),
    BackwardAvx2<core::DType::kBF16>("flash_cpu_backward.avx2.bf16"),
    BackwardAvx2<core::DType::kF16>("flash_cpu_backward.avx2.f16"),
    BackwardEmulated<core::DType::kF32>("flash_cpu_backward.avx2_tiles.f32"),
    BackwardEmulated<core::DType::kBF16>("flash_cpu_backward.avx2_tiles.bf16"),
    BackwardEmulated<core::DType::kF16>("flash_cpu_backward.avx2_tiles.f16"),
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
