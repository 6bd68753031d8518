// tandem_mask_inspect: the truth of a mask in host memory, pair by pair and as tiles.
#include <cstdlib>
#include <memory>

#include "core/mask_prepare.h"
#include "core/mask_tiles.h"
#include "core/validate.h"
#include "dispatch/error.h"
#include "dispatch/registry.h"

namespace tandem::dispatch {
namespace {

tandem_status CheckRange(const char* name, int64_t begin, int64_t count, int64_t limit) {
  if (begin >= 0 && count >= 0 && begin <= limit && count <= limit - begin) {
    return TANDEM_STATUS_OK;
  }
  return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
              "%s_begin is %lld and %s_count %lld, must lie in [0, %lld]", name,
              static_cast<long long>(begin), name, static_cast<long long>(count),
              static_cast<long long>(limit));
}

tandem_status Inspect(const tandem_problem* problem, int64_t batch, int64_t head, int64_t q_begin,
                      int64_t q_count, int64_t kv_begin, int64_t kv_count, uint8_t* visible,
                      tandem_tile_class* tile) {
  core::Problem p;
  tandem_status status = core::Validate(problem, nullptr, nullptr, &p, &LastError());
  if (status != TANDEM_STATUS_OK) return status;
  if (p.device_type != TANDEM_DEVICE_CPU) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "problem: its tensors are on a CUDA device, must be in host memory");
  }
  if (batch < 0 || batch >= p.batch || head < 0 || head >= p.q_heads) {
    return Fail(TANDEM_STATUS_INVALID_ARGUMENT,
                "batch is %lld and head %lld, must be in [0, %lld) and [0, %lld)",
                static_cast<long long>(batch), static_cast<long long>(head),
                static_cast<long long>(p.batch), static_cast<long long>(p.q_heads));
  }
  int32_t ignored = 0;
  const core::Sequence s = core::ResolveSequence(p, batch, &ignored);
  status = CheckRange("q", q_begin, q_count, s.q_rows);
  if (status == TANDEM_STATUS_OK) status = CheckRange("kv", kv_begin, kv_count, s.kv_rows);
  if (status != TANDEM_STATUS_OK) return status;
  const core::PreparationLayout layout = core::LayOutPreparation(p);
  std::unique_ptr<void, decltype(&std::free)> buffer(
      layout.size == 0
          ? nullptr
          : std::aligned_alloc(core::kBufferAlignment, static_cast<size_t>(layout.size)),
      &std::free);
  if (layout.size > 0 && buffer == nullptr) {
    return Fail(TANDEM_STATUS_OUT_OF_MEMORY, "host memory is exhausted (%lld bytes for the mask)",
                static_cast<long long>(layout.size));
  }
  core::BindPreparation(layout, buffer.get(), &p);
  if (layout.size > 0) {
    const core::Context context = {0, 0, nullptr, nullptr, &LastError()};
    status = StateOf(TANDEM_DEVICE_CPU).backend->prepare_mask(p, layout, buffer.get(), context);
    if (status != TANDEM_STATUS_OK) return status;
  }
  if (visible != nullptr) {
    for (int64_t i = 0; i < q_count; ++i) {
      for (int64_t j0 = 0; j0 < kv_count; j0 += 64) {
        const uint64_t word = core::VisibleWord(p.mask, s, head, q_begin + i, kv_begin + j0);
        const int64_t count = core::Min<int64_t>(64, kv_count - j0);
        for (int64_t j = 0; j < count; ++j) {
          visible[i * kv_count + j0 + j] = static_cast<uint8_t>((word >> j) & 1);
        }
      }
    }
  }
  if (tile != nullptr) {
    *tile = static_cast<tandem_tile_class>(core::ClassifyTile(
        p.mask, s, head, q_begin, q_begin + q_count, kv_begin, kv_begin + kv_count));
  }
  return TANDEM_STATUS_OK;
}

}  // namespace
}  // namespace tandem::dispatch

extern "C" tandem_status tandem_mask_inspect(const tandem_problem* problem, int64_t batch,
                                             int64_t head, int64_t q_begin, int64_t q_count,
                                             int64_t kv_begin, int64_t kv_count, uint8_t* visible,
                                             tandem_tile_class* tile) {
  return tandem::dispatch::Guard([&] {
    return tandem::dispatch::Inspect(problem, batch, head, q_begin, q_count, kv_begin, kv_count,
                                     visible, tile);
  });
}
