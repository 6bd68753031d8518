// Fuzz target: bytes make a small cache and then a sequence of calls on it, some with damaged
// arguments. The library must answer each with a status, never lose count of the keys, and run
// attention over what there is.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "tandem/tandem.h"

namespace {

constexpr int64_t kPoolSize = int64_t{1} << 16;
alignas(256) unsigned char pool[kPoolSize];
alignas(256) unsigned char cache_memory[1 << 17];
alignas(64) float out_memory[1 << 14];

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() { return position_ < size_ ? data_[position_++] : 0; }
  int64_t Below(int64_t n) { return Next() % n; }
  bool Done() const { return position_ >= size_; }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t position_ = 0;
};

// Every failure has a message.
void CheckAnswer(tandem_status status) {
  if (status != TANDEM_STATUS_OK && std::string_view(tandem_last_error()).empty()) std::abort();
  if (status == TANDEM_STATUS_INTERNAL) std::abort();
}

tandem_tensor Rows(tandem_dtype dtype, tandem_layout layout, int64_t batch, int64_t heads,
                   int64_t rows, int64_t dim) {
  tandem_tensor t = TANDEM_TENSOR_INIT;
  t.dtype = dtype;
  t.device_type = TANDEM_DEVICE_CPU;
  t.rank = 4;
  t.data = pool;
  t.shape[0] = batch;
  t.shape[1] = layout == TANDEM_LAYOUT_BHSD ? heads : rows;
  t.shape[2] = layout == TANDEM_LAYOUT_BHSD ? rows : heads;
  t.shape[3] = dim;
  int64_t stride = 1;
  for (int n = 3; n >= 0; --n) {
    t.strides[n] = stride;
    stride *= t.shape[n] > 1 ? t.shape[n] : 1;
  }
  return t;
}

// What a caller may get wrong without breaking what it promised about memory.
void Damage(Bytes* bytes, tandem_tensor* t) {
  switch (bytes->Below(24)) {
    case 0:
      t->shape[bytes->Below(4)] = 1 + bytes->Below(3);
      break;
    case 1:
      t->strides[bytes->Below(4)] = 0;
      break;
    case 2:
      t->rank = static_cast<int32_t>(bytes->Below(7)) - 1;
      break;
    case 3:
      t->dtype = static_cast<tandem_dtype>(bytes->Below(10));
      break;
    case 4:
      t->data = nullptr;
      break;
    case 5:
      t->device_type = static_cast<tandem_device_type>(bytes->Below(5));
      break;
    case 6:
      t->struct_size = bytes->Next();
      break;
    case 7:
      t->shape[bytes->Below(4)] = -1;
      break;
    default:
      break;
  }
}

class Session {
 public:
  explicit Session(Bytes* bytes) : bytes_(*bytes) {
    config_.dtype = static_cast<tandem_dtype>(1 + bytes_.Below(3));
    config_.batch = bytes_.Below(4);
    config_.kv_heads = bytes_.Below(3);
    config_.capacity = bytes_.Below(80);
    config_.qk_dim = bytes_.Below(10);
    config_.v_dim = bytes_.Below(10);
    size_t size = 0;
    const tandem_status sized = tandem_kv_cache_size(&config_, &size);
    CheckAnswer(sized);
    if (sized == TANDEM_STATUS_OK && size <= sizeof(cache_memory)) {
      CheckAnswer(tandem_kv_cache_create(&config_, cache_memory, size, &cache_));
    }
    held_.assign(static_cast<size_t>(config_.batch), 0);
  }
  ~Session() { tandem_kv_cache_destroy(cache_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  bool IsOpen() const { return cache_ != nullptr; }

  void Step() {
    switch (bytes_.Below(3)) {
      case 0:
        Append();
        break;
      case 1:
        Truncate();
        break;
      default:
        Attend();
    }
    std::vector<int32_t> lengths(held_.size());
    CheckAnswer(tandem_kv_cache_lengths(cache_, lengths.data()));
    if (lengths != held_) std::abort();
  }

 private:
  tandem_tensor Lengths() {
    values_.clear();
    for (size_t b = 0; b < held_.size(); ++b) {
      values_.push_back(static_cast<int32_t>(bytes_.Below(70)) - 1);
    }
    tandem_tensor t = TANDEM_TENSOR_INIT;
    t.dtype = TANDEM_DTYPE_I32;
    t.device_type = TANDEM_DEVICE_CPU;
    t.rank = 1;
    t.data = values_.data();
    t.shape[0] = config_.batch;
    t.strides[0] = 1;
    return t;
  }

  void Append() {
    const tandem_layout layout = static_cast<tandem_layout>(1 + bytes_.Below(3));
    const int64_t rows = bytes_.Below(70);
    tandem_tensor k =
        Rows(config_.dtype, layout, config_.batch, config_.kv_heads, rows, config_.qk_dim);
    tandem_tensor v =
        Rows(config_.dtype, layout, config_.batch, config_.kv_heads, rows, config_.v_dim);
    Damage(&bytes_, &k);
    Damage(&bytes_, &v);
    const bool has_lengths = bytes_.Below(2) == 1;
    const tandem_tensor lengths = Lengths();
    const tandem_status status =
        tandem_kv_cache_append(cache_, layout, &k, &v, has_lengths ? &lengths : nullptr);
    CheckAnswer(status);
    if (status != TANDEM_STATUS_OK) return;
    const int64_t appended = k.shape[layout == TANDEM_LAYOUT_BHSD ? 2 : 1];
    for (size_t b = 0; b < held_.size(); ++b) {
      held_[b] += has_lengths ? values_[b] : static_cast<int32_t>(appended);
    }
  }

  void Truncate() {
    const bool has_lengths = bytes_.Below(4) != 0;
    const tandem_tensor lengths = Lengths();
    const tandem_status status = tandem_kv_cache_truncate(cache_, has_lengths ? &lengths : nullptr);
    CheckAnswer(status);
    if (status != TANDEM_STATUS_OK) return;
    for (size_t b = 0; b < held_.size(); ++b) held_[b] = has_lengths ? values_[b] : 0;
  }

  void Attend() {
    const tandem_layout layout = static_cast<tandem_layout>(1 + bytes_.Below(2));
    const int64_t heads = config_.kv_heads * (1 + bytes_.Below(3)), rows = 1 + bytes_.Below(40);
    tandem_tensor q = Rows(config_.dtype, layout, config_.batch, heads, rows, config_.qk_dim);
    tandem_tensor out = Rows(TANDEM_DTYPE_F32, layout, config_.batch, heads, rows, config_.v_dim);
    out.data = out_memory;
    Damage(&bytes_, &q);
    tandem_band_term band = TANDEM_BAND_TERM_INIT;
    band.alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
    band.right = static_cast<int32_t>(bytes_.Below(3)) - 1;
    const tandem_mask_term* terms[] = {&band.head};
    tandem_problem problem = TANDEM_PROBLEM_INIT;
    problem.layout = layout;
    problem.q = &q;
    problem.kv_cache = cache_;
    problem.mask_terms = terms;
    problem.mask_term_count = 1;
    tandem_outputs outputs = TANDEM_OUTPUTS_INIT;
    outputs.out = &out;
    tandem_options options = TANDEM_OPTIONS_INIT;
    options.threads = 1;
    if (bytes_.Below(4) == 0) options.kernel = "reference.cpu";
    CheckAnswer(tandem_attention(&problem, &outputs, &options));
  }

  Bytes& bytes_;
  tandem_kv_cache_config config_ = TANDEM_KV_CACHE_CONFIG_INIT;
  tandem_kv_cache* cache_ = nullptr;
  std::vector<int32_t> held_, values_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::memset(pool, 0x3c, sizeof(pool));
  std::memset(cache_memory, 0xff, sizeof(cache_memory));
  Bytes bytes(data, size);
  Session session(&bytes);
  for (int n = 0; session.IsOpen() && n < 16 && !bytes.Done(); ++n) session.Step();
  return 0;
}
