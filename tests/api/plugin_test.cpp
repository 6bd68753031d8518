// Loading of the CUDA plugin. CTest runs this program once per directory of tests/plugins, with
// TANDEM_PLUGIN_DIR and, in TANDEM_TEST_PLUGIN, what is there.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "core/backend.h"
#include "tests/api/call.h"
#include "tests/support/kernels.h"

namespace tandem::test {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

TEST(Plugin, AbsenceHasItsReason) {
  const std::map<std::string, std::vector<std::string>> reasons = {
      {"missing", {"missing", "libtandem_cuda.so"}},
      {"relative", {"TANDEM_PLUGIN_DIR", "absolute"}},
      {"no_library", {"cannot be loaded", "libtandem_cuda.so"}},
      {"no_entry", {"tandem_backend_v1"}},
      {"kNullRecord", {"no backend record"}},
      {"kOtherAbi",
       {"ABI version " + std::to_string(core::kBackendAbiVersion + 1),
        "needs " + std::to_string(core::kBackendAbiVersion)}},
      {"kOtherSize", {"structures"}},
      {"kOtherVersion", {"0.0.1-made-up", TANDEM_VERSION_STRING}},
      {"kNoDriver", {"no NVIDIA driver"}},
      {"kBrokenDevice", {"the device is broken"}},
  };
  const auto found = reasons.find(Environment("TANDEM_TEST_PLUGIN"));
  if (found == reasons.end()) GTEST_SKIP() << "no absent plugin in TANDEM_TEST_PLUGIN";
  EXPECT_EQ(tandem_device_count(TANDEM_DEVICE_CUDA), 0);
  const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  ASSERT_NE(reason, nullptr);
  for (const std::string& part : found->second) {
    EXPECT_NE(std::string(reason).find(part), std::string::npos) << reason;
  }
  // Asking for it fails with that reason; the CPU is not harmed, and AUTO takes it.
  Call call(FullSpec());
  call.options.device_type = TANDEM_DEVICE_CUDA;
  call.ExpectRefused(TANDEM_STATUS_DEVICE_UNAVAILABLE, {"cuda", reason});
  call.options.device_type = TANDEM_DEVICE_AUTO;
  EXPECT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  for (const Kernel& kernel : RegisteredKernels()) {
    if (kernel.device == TANDEM_DEVICE_CUDA) {
      EXPECT_EQ(kernel.unavailable, reason);
    }
  }
  // The explanation carries it too.
  tandem_explanation* explanation = nullptr;
  ASSERT_EQ(tandem_explain(&call.problem, &call.outputs, nullptr, nullptr, &explanation),
            TANDEM_STATUS_OK);
  int32_t told = 0;
  for (int32_t n = 0; n < tandem_explanation_count(explanation); ++n) {
    if (tandem_explanation_device(explanation, n) != TANDEM_DEVICE_CUDA) continue;
    told += std::string(tandem_explanation_reason(explanation, n)) == reason ||
            std::string(tandem_explanation_reason(explanation, n)) == "device cpu was asked for";
  }
  EXPECT_GE(told, 1);
  tandem_explanation_destroy(explanation);
}

int64_t BlockCount() {
  const std::string path = Environment("TANDEM_PLUGIN_DIR") + "/libtandem_cuda.so";
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return -1;
  const auto count = reinterpret_cast<int64_t (*)()>(dlsym(handle, "tandem_fake_block_count"));
  const int64_t blocks = count();
  dlclose(handle);
  return blocks;
}

TEST(Plugin, GoodOneServes) {
  if (Environment("TANDEM_TEST_PLUGIN") != "kGood") GTEST_SKIP() << "not the good plugin";
  ASSERT_EQ(tandem_device_count(TANDEM_DEVICE_CUDA), 1)
      << tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  EXPECT_EQ(tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA), nullptr);
  EXPECT_STREQ(tandem_device_description(TANDEM_DEVICE_CUDA, 0), "a made-up device");
  std::map<std::string, std::string> kernels;
  for (const Kernel& kernel : RegisteredKernels()) {
    if (kernel.device == TANDEM_DEVICE_CUDA) kernels[kernel.name] = kernel.unavailable;
  }
  EXPECT_EQ(kernels["fake_cuda.reference"], "");
  EXPECT_NE(kernels["fake_cuda.unfit"].find("lacks"), std::string::npos);
  // The same bits as the CPU's reference, through staging, by name, by device and by AUTO.
  for (const CaseSpec& spec : {FullSpec(), PackedSpec()}) {
    Call call(spec);
    call.options.kernel = "reference.cpu";
    ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
    const std::vector<uint8_t> expected = call.valid().OutputBytes();
    for (const tandem_device_type device : {TANDEM_DEVICE_CUDA, TANDEM_DEVICE_AUTO}) {
      call.valid().PrefillOutputs();
      call.options.device_type = device;
      call.options.kernel = device == TANDEM_DEVICE_CUDA ? "fake_cuda.reference" : nullptr;
      ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
      EXPECT_EQ(call.valid().OutputBytes(), expected);
      EXPECT_EQ(BlockCount(), 0) << "device memory leaks";
    }
  }
  Call call(FullSpec());
  call.options.device_type = TANDEM_DEVICE_CUDA;
  call.options.device_index = 1;
  call.ExpectRefused(TANDEM_STATUS_DEVICE_UNAVAILABLE, {"device_index", "1"});
  call.options.device_index = 0;
  call.options.kernel = "reference.cpu";  // of the other device
  call.ExpectRefused(TANDEM_STATUS_UNSUPPORTED, {"reference.cpu"});
  call.options.kernel = "fake_cuda.unfit";
  call.ExpectRefused(TANDEM_STATUS_UNSUPPORTED, {"fake_cuda.unfit", "lacks"});
  EXPECT_EQ(BlockCount(), 0) << "device memory leaks";
}

TEST(Plugin, FailureOnTheDeviceIsReported) {
  const struct {
    const char* kind;
    tandem_status status;
    const char* part;
  } failures[] = {
      {"kOutOfMemory", TANDEM_STATUS_OUT_OF_MEMORY, "device memory is exhausted"},
      {"kRunFails", TANDEM_STATUS_DEVICE_ERROR, "the launch failed"},
      {"kCopyFails", TANDEM_STATUS_DEVICE_ERROR, "the copy failed"},
  };
  for (const auto& failure : failures) {
    if (Environment("TANDEM_TEST_PLUGIN") != failure.kind) continue;
    Call call(FullSpec());
    call.options.device_type = TANDEM_DEVICE_CUDA;
    call.ExpectRefused(failure.status, {failure.part});
    EXPECT_EQ(BlockCount(), 0) << "device memory leaks";
    call.options.device_type = TANDEM_DEVICE_CPU;
    EXPECT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
    return;
  }
  GTEST_SKIP() << "no failing plugin in TANDEM_TEST_PLUGIN";
}

}  // namespace
}  // namespace tandem::test
