#include "backend_cpu/onednn/onednn_kernel.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#include "backend_cpu/onednn/matmul.h"
#include "backend_cpu/onednn/row_block.h"
#include "backend_cpu/output_rows.h"
#include "backend_cpu/parallel.h"
#include "backend_cpu/reference.h"
#include "core/element.h"

namespace tandem::cpu {
namespace {

using core::CeilDiv;
using core::Clamp;
using core::DType;
using core::Max;
using core::Min;
using core::Problem;
using core::RoundUp;
using core::Sequence;

using onednn::kKeyStep;
using onednn::kMaxKeys;
using onednn::kMaxRows;
using onednn::kRowStep;

constexpr int64_t kRowsPerTask = kMaxRows;
constexpr int64_t kKeysPerTask = 4 * kKeyStep;
constexpr int64_t kDenseBytes = int64_t{64} << 20;  // of keys and values converted at a time

// The first failure of any thread.
class Failure {
 public:
  bool happened() const { return status_.load(std::memory_order_relaxed) != TANDEM_STATUS_OK; }
  tandem_status status() const { return status_.load(); }
  const char* text() const { return text_.data; }

  void Set(tandem_status status, const char* what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (happened()) return;
    core::Format(&text_, "onednn.cpu: %s", what);
    status_.store(status);
  }

  // Runs body() and keeps what it throws.
  template <typename Body>
  void Guard(Body body) {
    try {
      body();
    } catch (const dnnl::error& error) {
      Set(error.status == dnnl_out_of_memory ? TANDEM_STATUS_OUT_OF_MEMORY : TANDEM_STATUS_INTERNAL,
          error.what());
    } catch (const std::bad_alloc&) {
      Set(TANDEM_STATUS_OUT_OF_MEMORY, "out of memory");
    } catch (...) {
      Set(TANDEM_STATUS_INTERNAL, "an unknown exception");
    }
  }

 private:
  std::atomic<tandem_status> status_ = TANDEM_STATUS_OK;
  std::mutex mutex_;
  core::Text text_ = {};
};

// Keys and values of (sequence, key head) pairs in the workspace, for as many pairs at a time as
// kDenseBytes hold, and at least one.
struct DenseLayout {
  int64_t k_bytes, v_bytes, flag_bytes;  // of one pair
  int64_t pairs;                         // at a time
  int64_t pair_bytes() const { return k_bytes + v_bytes + flag_bytes; }

  explicit DenseLayout(const Problem& p) {
    const int64_t keys = RoundUp(p.kv_rows, kKeyStep);
    k_bytes = RoundUp<int64_t>(4 * keys * p.qk_dim, 64);
    v_bytes = RoundUp<int64_t>(4 * keys * p.v_dim, 64);
    flag_bytes = RoundUp<int64_t>(keys / kKeyStep, 64);
    const int64_t all = p.batch * p.kv_heads;
    pairs = Min(all, Max<int64_t>(1, kDenseBytes / Max<int64_t>(pair_bytes(), 1)));
  }
};

struct DensePair {
  float* k;
  float* v;
  uint8_t* non_finite;
};

DensePair PairAt(const DenseLayout& layout, void* workspace, int64_t slot) {
  char* base = static_cast<char*>(workspace) + slot * layout.pair_bytes();
  return {reinterpret_cast<float*>(base), reinterpret_cast<float*>(base + layout.k_bytes),
          reinterpret_cast<uint8_t*>(base + layout.k_bytes + layout.v_bytes)};
}

template <DType kType>
void ConvertRow(const core::Array4& source, int64_t offset, int64_t columns, float* destination) {
  for (int64_t c = 0; c < columns; ++c) {
    destination[c] = core::LoadFloat(source.data, kType, offset + c * source.column_stride);
  }
}

// Replaces what is not finite by 0; whether there was anything.
bool Sanitise(float* values, int64_t count) {
  bool any = false;
  for (int64_t c = 0; c < count; ++c) {
    const bool is_finite = core::IsFinite(values[c]);
    values[c] = is_finite ? values[c] : 0.0f;
    any |= !is_finite;
  }
  return any;
}

// Converts keys [begin, end) of one pair; rows at or beyond the sequence's keys become 0.
template <DType kType>
void ConvertKeys(const Problem& p, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                 const DensePair& pair) {
  const int64_t keys = core::LocalKeys(s);
  for (int64_t j = begin; j < end; ++j) {
    float* k = pair.k + j * p.qk_dim;
    float* v = pair.v + j * p.v_dim;
    if (j % kKeyStep == 0) pair.non_finite[j / kKeyStep] = 0;
    if (j >= keys) {
      std::memset(k, 0, static_cast<size_t>(p.qk_dim) * sizeof(float));
      std::memset(v, 0, static_cast<size_t>(p.v_dim) * sizeof(float));
      continue;
    }
    ConvertRow<kType>(p.k, core::KeyRowOffset(p, p.k, s, kv_head, j), p.qk_dim, k);
    ConvertRow<kType>(p.v, core::KeyRowOffset(p, p.v, s, kv_head, j), p.v_dim, v);
    if (Sanitise(v, p.v_dim)) pair.non_finite[j / kKeyStep] = 1;
  }
}

Sequence SequenceAt(const Problem& p, int64_t batch) {
  int32_t status = 0;
  return core::ResolveSequence(p, batch, &status);
}

int64_t ExistingRows(const Sequence& s) {
  return Clamp<int64_t>(s.q_len - s.q_offset, 0, s.q_rows);
}

// Makes the products for the blocks of every sequence.
void MakeProducts(const Problem& p, onednn::Products* products) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceAt(p, b);
    const int64_t keys = core::LocalKeys(s);
    const int64_t rows_per_block = onednn::RowsPerBlock(keys);
    const int64_t rows = ExistingRows(s);
    const int64_t row_sizes[] = {rows >= rows_per_block ? rows_per_block : 0,
                                 RoundUp(rows % rows_per_block, kRowStep)};
    const int64_t key_sizes[] = {keys >= kMaxKeys ? kMaxKeys : 0,
                                 RoundUp(keys % kMaxKeys, kKeyStep)};
    for (const int64_t row_size : row_sizes) {
      for (const int64_t key_size : key_sizes) {
        if (row_size > 0 && key_size > 0) products->Make(row_size, key_size);
      }
    }
  }
}

// The longest sequence need not have the largest blocks: they have fewer rows where keys are many.
int64_t LargestBlockBytes(const Problem& p) {
  const int64_t full_height = onednn::SizesOfBlock(p, Min(p.kv_rows, onednn::kManyKeys)).bytes();
  return Max(full_height, onednn::SizesOfBlock(p, p.kv_rows).bytes());
}

class Run {
 public:
  Run(const Problem& problem, void* workspace, const core::Context& context)
      : p_(problem),
        workspace_(workspace),
        context_(context),
        layout_(problem),
        products_(problem.qk_dim, problem.v_dim) {}

  void Start(Failure* failure);

 private:
  void ConvertTask(int64_t first_pair, int64_t index);
  void ComputeTask(int64_t first_pair, int64_t index, void* scratch);

  int64_t ConvertTasksPerPair() const {
    return CeilDiv(RoundUp(p_.kv_rows, kKeyStep), kKeysPerTask);
  }
  int64_t ComputeTasksPerHead() const { return CeilDiv(p_.q_rows, kRowsPerTask); }

  const Problem& p_;
  void* workspace_;
  const core::Context& context_;
  const DenseLayout layout_;
  onednn::Products products_;
};

void Run::ConvertTask(int64_t first_pair, int64_t index) {
  const int64_t slot = index / ConvertTasksPerPair();
  const int64_t pair = first_pair + slot;
  const Sequence s = SequenceAt(p_, pair / p_.kv_heads);
  const int64_t begin = index % ConvertTasksPerPair() * kKeysPerTask;
  const int64_t end = Min(begin + kKeysPerTask, RoundUp(core::LocalKeys(s), kKeyStep));
  const DensePair dense = PairAt(layout_, workspace_, slot);
  const int64_t kv_head = pair % p_.kv_heads;
  if (p_.dtype == DType::kF32) ConvertKeys<DType::kF32>(p_, s, kv_head, begin, end, dense);
  if (p_.dtype == DType::kF16) ConvertKeys<DType::kF16>(p_, s, kv_head, begin, end, dense);
  if (p_.dtype == DType::kBF16) ConvertKeys<DType::kBF16>(p_, s, kv_head, begin, end, dense);
}

void Run::ComputeTask(int64_t first_pair, int64_t index, void* scratch) {
  const int64_t head_slot = index / ComputeTasksPerHead();
  const int64_t slot = head_slot / p_.group;
  const int64_t pair = first_pair + slot;
  const int64_t head = pair % p_.kv_heads * p_.group + head_slot % p_.group;
  const Sequence s = SequenceAt(p_, pair / p_.kv_heads);
  const int64_t begin = index % ComputeTasksPerHead() * kRowsPerTask;
  const int64_t end = Min(begin + kRowsPerTask, s.q_rows);
  const int64_t existing_end = Min(end, ExistingRows(s));
  WriteEmptyRows(p_, s, head, Max(begin, existing_end), end);
  if (begin >= existing_end) return;
  const onednn::SerialScope serial;
  dnnl::stream stream(products_.engine());
  const DensePair dense = PairAt(layout_, workspace_, slot);
  onednn::RowBlock block(p_, s, head, {dense.k, dense.v, dense.non_finite}, products_, scratch);
  const int64_t step = onednn::RowsPerBlock(core::LocalKeys(s));
  for (int64_t row = begin; row < existing_end; row += step) {
    block.Compute(&stream, row, Min(step, existing_end - row));
  }
}

void Run::Start(Failure* failure) {
  {
    const onednn::SerialScope serial;
    MakeProducts(p_, &products_);
  }
  const int64_t pairs = p_.batch * p_.kv_heads;
  const int64_t compute_tasks_per_pair = p_.group * ComputeTasksPerHead();
  const int workers = WorkerCount(context_, layout_.pairs * compute_tasks_per_pair);
  // All scratch before anything is written, so that running out of memory leaves outputs alone.
  const int64_t worker_bytes =
      RoundUp<int64_t>(LargestBlockBytes(p_) + products_.scratch_bytes(), 64);
  const std::unique_ptr<char, decltype(&std::free)> scratch(
      static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(workers * worker_bytes))),
      &std::free);
  if (scratch == nullptr) throw std::bad_alloc();

  for (int64_t first = 0; first < pairs && !failure->happened(); first += layout_.pairs) {
    const int64_t count = Min(layout_.pairs, pairs - first);
    auto convert = [this, first](int64_t index, int) { ConvertTask(first, index); };
    ParallelForEach(context_, count * ConvertTasksPerPair(), convert);
    auto compute = [&](int64_t index, int worker) {
      if (failure->happened()) return;
      failure->Guard([&] { ComputeTask(first, index, scratch.get() + worker * worker_bytes); });
    };
    ParallelForEach(context_, count * compute_tasks_per_pair, compute);
  }
  WriteRowsOutsideSequences(p_);
}

}  // namespace

bool OnednnDecline(const Problem& problem, core::Text* reason) {
  if (!problem.is_backward) return false;
  core::Format(reason, "it computes the forward pass only, and gradients are asked for");
  return true;
}

int64_t OnednnWorkspace(const Problem& problem) {
  const DenseLayout layout(problem);
  return layout.pairs * layout.pair_bytes();
}

tandem_status OnednnRun(const Problem& problem, void* workspace, const core::Context& context) {
  Failure failure;
  failure.Guard([&] { Run(problem, workspace, context).Start(&failure); });
  if (failure.happened()) core::Format(context.error, "%s", failure.text());
  return failure.status();
}

}  // namespace tandem::cpu
