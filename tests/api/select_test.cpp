// Selection with made-up kernels and features, and the acceptance of plugins' records: pure
// functions.
#include "dispatch/select.h"

#include <gtest/gtest.h>

#include "dispatch/plugin.h"

namespace tandem::dispatch {
namespace {

using core::KernelRecord;
using core::Problem;

bool Accepts(const Problem&, core::Text*) { return false; }
bool OnlyF16(const Problem& problem, core::Text* reason) {
  if (problem.dtype == core::DType::kF16) return false;
  core::Format(reason, "it takes f16 only");
  return true;
}
bool Declines(const Problem&, core::Text* reason) {
  core::Format(reason, "it takes nothing");
  return true;
}
int64_t NoWorkspace(const Problem&) { return 0; }
tandem_status NoRun(const Problem&, void*, const core::Context&) { return TANDEM_STATUS_INTERNAL; }

const KernelRecord kKernels[] = {
    {"made_up.new", 0b11, "NEW and OLD", Accepts, NoWorkspace, NoRun},
    {"made_up.f16", 0b01, "OLD", OnlyF16, NoWorkspace, NoRun},
    {"made_up.never", 0, "", Declines, NoWorkspace, NoRun},
    {"made_up.last", 0, "", Accepts, NoWorkspace, NoRun},
};

Selection Choose(uint64_t features, core::DType dtype, const char* wanted = nullptr) {
  Problem problem = {};
  problem.dtype = dtype;
  return Select(problem, kKernels, 4, features, wanted);
}

TEST(SelectSmall, TheFirstThatServesIsChosen) {
  EXPECT_EQ(Choose(0b11, core::DType::kF32).chosen, 0);
  EXPECT_EQ(Choose(0b111, core::DType::kF16).chosen, 0);
  EXPECT_EQ(Choose(0b01, core::DType::kF16).chosen, 1);
  EXPECT_EQ(Choose(0b01, core::DType::kF32).chosen, 3);
  EXPECT_EQ(Choose(0b10, core::DType::kF16).chosen, 3);
  EXPECT_EQ(Choose(0, core::DType::kF16).chosen, 3);
}

TEST(SelectSmall, EveryRefusalIsASentence) {
  const Selection selection = Choose(0b01, core::DType::kF32);
  ASSERT_EQ(selection.verdicts.size(), 4u);
  EXPECT_NE(selection.verdicts[0].reason.find("NEW and OLD"), std::string::npos);
  EXPECT_EQ(selection.verdicts[1].reason, "it takes f16 only");
  EXPECT_EQ(selection.verdicts[2].reason, "it takes nothing");
  EXPECT_EQ(selection.verdicts[3].reason, "");
  const std::string joined = JoinReasons(selection);
  EXPECT_NE(joined.find("made_up.f16: it takes f16 only"), std::string::npos);
  EXPECT_NE(joined.find("made_up.never: it takes nothing"), std::string::npos);
}

TEST(SelectSmall, TheKernelAskedForOrNone) {
  EXPECT_EQ(Choose(0b11, core::DType::kF16, "made_up.f16").chosen, 1);
  EXPECT_EQ(Choose(0b11, core::DType::kF16, "made_up.last").chosen, 3);
  const Selection refused = Choose(0b11, core::DType::kF32, "made_up.f16");
  EXPECT_EQ(refused.chosen, -1);
  EXPECT_EQ(refused.verdicts[1].reason, "it takes f16 only");
  EXPECT_NE(refused.verdicts[3].reason.find("made_up.f16"), std::string::npos);
  EXPECT_EQ(Choose(0, core::DType::kF16, "made_up.new").chosen, -1);
  EXPECT_EQ(Choose(0b11, core::DType::kF16, "made_up").chosen, -1) << "a prefix is no name";
}

TEST(SelectSmall, NothingFromNothing) {
  const Selection selection = Select(Problem{}, nullptr, 0, ~uint64_t{0}, nullptr);
  EXPECT_EQ(selection.chosen, -1);
  EXPECT_TRUE(selection.verdicts.empty());
}

core::Backend GoodBackend() {
  core::Backend backend = {};
  backend.abi_version = core::kBackendAbiVersion;
  backend.backend_size = sizeof(core::Backend);
  backend.problem_size = sizeof(Problem);
  backend.device_type = TANDEM_DEVICE_CUDA;
  backend.version = TANDEM_VERSION_STRING;
  backend.name = "made_up";
  return backend;
}

TEST(PluginRecordSmall, EveryMismatchIsNamed) {
  std::string reason;
  const core::Backend good = GoodBackend();
  EXPECT_TRUE(BackendIsCompatible(&good, "p.so", &reason)) << reason;
  const auto refused = [&](auto spoil, const char* part) {
    core::Backend backend = GoodBackend();
    spoil(backend);
    EXPECT_FALSE(BackendIsCompatible(&backend, "p.so", &reason));
    EXPECT_NE(reason.find("p.so"), std::string::npos) << reason;
    EXPECT_NE(reason.find(part), std::string::npos) << reason;
  };
  const std::string other = "ABI version " + std::to_string(core::kBackendAbiVersion + 1);
  refused([](core::Backend& b) { ++b.abi_version; }, other.c_str());
  refused([](core::Backend& b) { b.backend_size -= 8; }, "structures");
  refused([](core::Backend& b) { b.problem_size += 8; }, "structures");
  refused([](core::Backend& b) { b.version = "0.0.9"; }, "0.0.9");
  refused([](core::Backend& b) { b.device_type = TANDEM_DEVICE_CPU; }, "CUDA");
  EXPECT_FALSE(BackendIsCompatible(nullptr, "p.so", &reason));
}

}  // namespace
}  // namespace tandem::dispatch
