#include "tests/support/kernels.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <sstream>

namespace tandem::test {
namespace {

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// The element type in a kernel's name; UNSET: any.
tandem_dtype NamedType(const std::string& name) {
  if (name.ends_with(".f32")) return TANDEM_DTYPE_F32;
  if (name.ends_with(".f16")) return TANDEM_DTYPE_F16;
  if (name.ends_with(".bf16")) return TANDEM_DTYPE_BF16;
  return TANDEM_DTYPE_UNSET;
}

bool IsDefault(const Strides& strides) {
  return strides.order.empty() && strides.padding.empty() && strides.negative == 0 &&
         strides.broadcast == 0;
}

// efficient_cuda.sm90: scaled products, and a bias of their type or softcap and dropout; tensors
// that the tensor memory accelerator can copy.
bool MustAcceptOnHopper(const CaseSpec& spec) {
  const int64_t widest = std::max(spec.qk_dim, spec.v_dim);
  const auto is_served = [&](const TermSpec& term) {
    return (term.kind != TANDEM_MASK_DENSE || spec.kv_offset % 64 == 0) &&
           (term.kind != TANDEM_MASK_BLOCK_SPARSE ||
            (widest > 64 && term.q_block % 128 == 0 &&
             term.kv_block % (widest > 128 ? 64 : 128) == 0));
  };
  const bool has_terms = spec.softcap != 0.0f || spec.dropout_rate != 0.0f;
  const bool are_terms_served =
      !has_terms || (spec.bias.dtype == TANDEM_DTYPE_UNSET &&
                     (spec.dropout_rate == 0.0f || spec.kv_offset % 4 == 0));
  return widest <= 256 && spec.qk_dim % 8 == 0 && spec.v_dim % 8 == 0 && are_terms_served &&
         spec.alibi_rank == 0 && IsBiasOnHopper(spec) && IsDefault(spec.q_strides) &&
         IsDefault(spec.k_strides) && IsDefault(spec.v_strides) &&
         std::all_of(spec.terms.begin(), spec.terms.end(), is_served);
}

// efficient_cuda.sm90.f32: scores that are nothing but scaled products, and rows that see one
// interval of keys beside dense masks.
bool MustAcceptF32OnHopper(const CaseSpec& spec) {
  const auto is_served = [&](const TermSpec& term) {
    switch (term.kind) {
      case TANDEM_MASK_LENGTHS:
        return true;
      case TANDEM_MASK_BAND:
        return !term.prefix || (term.left < 0 && !term.widths_per_head);
      case TANDEM_MASK_DENSE:
        return spec.kv_offset % 64 == 0;
      default:
        return false;
    }
  };
  return std::max(spec.qk_dim, spec.v_dim) <= 128 && spec.softcap == 0.0f &&
         spec.bias.dtype == TANDEM_DTYPE_UNSET && spec.alibi_rank == 0 &&
         spec.dropout_rate == 0.0f && std::all_of(spec.terms.begin(), spec.terms.end(), is_served);
}

// TANDEM_CUDA_ARCH leaves Hopper's kernels out when it is set to anything but sm90.
bool IsCapped(const Kernel& kernel) {
  const char* cap = std::getenv("TANDEM_CUDA_ARCH");
  return cap != nullptr && *cap != '\0' && std::string(cap) != "sm90" &&
         Contains(kernel.name, ".sm90");
}

}  // namespace

bool IsBiasOnHopper(const CaseSpec& spec) {
  const BiasSpec& bias = spec.bias;
  int64_t keys = spec.global_kv_len != 0 ? spec.global_kv_len : spec.kv_rows;
  if (spec.layout == TANDEM_LAYOUT_THD) {
    keys = *std::max_element(spec.kv_lens.begin(), spec.kv_lens.end());
  }
  return bias.dtype == TANDEM_DTYPE_UNSET ||
         (bias.dtype == spec.dtype && bias.per_key && keys % 8 == 0 && IsDefault(bias.strides));
}

std::ostream& operator<<(std::ostream& stream, const Kernel& kernel) {
  return stream << kernel.name;
}

std::vector<Kernel> RegisteredKernels() {
  std::vector<Kernel> kernels;
  for (int32_t n = 0; n < tandem_kernel_count(); ++n) {
    const char* reason = tandem_kernel_unavailable_reason(n);
    kernels.push_back(
        {tandem_kernel_name(n), tandem_kernel_device(n), reason == nullptr ? "" : reason});
  }
  return kernels;
}

std::vector<Kernel> AvailableKernels() {
  std::vector<Kernel> kernels = RegisteredKernels();
  std::erase_if(kernels, [](const Kernel& kernel) { return !kernel.Available(); });
  return kernels;
}

std::vector<Kernel> ForwardKernels() {
  std::vector<Kernel> kernels = AvailableKernels();
  std::erase_if(kernels, [](const Kernel& kernel) { return Contains(kernel.name, "_backward."); });
  return kernels;
}

bool IsOrdered(const Kernel& kernel) { return kernel.name.find("_fused.") == std::string::npos; }

std::string TestName(const std::string& text) {
  std::string name = text;
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return name;
}

tandem_status RunKernel(const Kernel& kernel, const tandem_problem& problem,
                        const tandem_outputs& outputs, const RunSettings& settings) {
  tandem_options options = TANDEM_OPTIONS_INIT;
  options.device_type = kernel.device;
  options.kernel = kernel.name.c_str();
  options.threads = settings.threads;
  options.executor = settings.executor;
  return tandem_attention(&problem, &outputs, &options);
}

tandem_status RunKernel(const Kernel& kernel, const Case& problem, const RunSettings& settings) {
  return RunKernel(kernel, problem.problem(), problem.outputs(), settings);
}

oracle::Arithmetic ArithmeticOf(const Kernel& kernel, const CaseSpec& spec) {
  return oracle::ArithmeticFor(spec.dtype, kernel.device == TANDEM_DEVICE_CUDA);
}

bool MustAccept(const Kernel& kernel, const CaseSpec& spec) {
  const tandem_dtype named = NamedType(kernel.name);
  if (named != TANDEM_DTYPE_UNSET && named != spec.dtype) return false;
  const int64_t widest = std::max(spec.qk_dim, spec.v_dim);
  if (kernel.name == "reference.cpu" || kernel.name == "fake_cuda.reference") return true;
  if (kernel.name.starts_with("flash_cpu.")) return widest <= 512;
  if (kernel.name == "efficient_cuda.sm90.f32") return MustAcceptF32OnHopper(spec);
  if (kernel.name.starts_with("efficient_cuda.sm90.")) return MustAcceptOnHopper(spec);
  if (kernel.name.starts_with("efficient_cuda.")) return widest <= 256;
  return false;
}

bool IsRequired(const std::string& hardware) {
  const char* list = std::getenv("TANDEM_REQUIRE");
  std::stringstream stream(list == nullptr ? "" : list);
  for (std::string item; std::getline(stream, item, ',');) {
    if (item == hardware) return true;
  }
  return false;
}

bool IsRequired(const Kernel& kernel) {
  return (kernel.device == TANDEM_DEVICE_CUDA && IsRequired("cuda") && !IsCapped(kernel)) ||
         (Contains(kernel.name, "amx") && IsRequired("amx")) ||
         (Contains(kernel.name, "avx512") && IsRequired("avx512")) ||
         (Contains(kernel.name, "avx2") && IsRequired("avx2"));
}

}  // namespace tandem::test
