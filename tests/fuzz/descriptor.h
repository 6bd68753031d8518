// Bytes become a small valid problem with some damaged fields, and what it points to.
//
// What a caller promises stays promised: a pointer is null or points to memory, and an array lies
// in memory as far as its shape and strides reach (else its pointer becomes null).
#ifndef TANDEM_TESTS_FUZZ_DESCRIPTOR_H_
#define TANDEM_TESTS_FUZZ_DESCRIPTOR_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <vector>

#include "tests/fuzz/pool.h"

namespace {

// A problem with everything that it points to, and the places that may be damaged.
class Descriptor {
 public:
  explicit Descriptor(Bytes* bytes) : bytes_(*bytes) {
    Sizes();
    Tensors();
    Scalars();
    for (int64_t n = bytes_.Below(4); n > 0; --n) Term();
    problem_.mask_terms = terms_;
    for (int64_t n = bytes_.Below(4); n > 0 && !bytes_.Done(); --n) Damage();
    if (!bytes_.Done()) {
      Gradients();
      for (int64_t n = bytes_.Below(3); n > 0 && !bytes_.Done(); --n) Damage();
    }
    for (tandem_tensor& t : tensors_) {
      if (!LiesInPool(t)) t.data = nullptr;
    }
  }

  const tandem_problem& problem() const { return problem_; }
  const tandem_outputs& outputs() const { return outputs_; }
  const tandem_options& options() const { return options_; }
  // Null where the bytes ask for none.
  const tandem_gradients* gradients() const { return asks_gradients_ ? &gradients_ : nullptr; }

 private:
  void Sizes() {
    layout_ = static_cast<tandem_layout>(1 + bytes_.Below(3));
    batch_ = 1 + bytes_.Below(3);
    kv_heads_ = 1 + bytes_.Below(2);
    q_heads_ = kv_heads_ * (1 + bytes_.Below(2));
    q_rows_ = bytes_.Below(70);
    kv_rows_ = bytes_.Below(70);
    dim_ = 1 + bytes_.Below(9);
    v_dim_ = 1 + bytes_.Below(9);
  }

  const tandem_tensor* Tensor(tandem_dtype dtype, const std::vector<int64_t>& shape) {
    tandem_tensor t = TANDEM_TENSOR_INIT;
    t.dtype = dtype;
    t.device_type = TANDEM_DEVICE_CPU;
    t.rank = static_cast<int32_t>(shape.size());
    t.data = pool + kPoolSize / 4 + 64 * bytes_.Below(8);
    int64_t stride = 1;
    for (size_t n = shape.size(); n-- > 0;) {
      t.shape[n] = shape[n];
      t.strides[n] = stride;
      stride *= std::max<int64_t>(shape[n], 1);
    }
    tensors_.push_back(t);
    tandem_tensor* own = &tensors_.back();
    fields32_.insert(fields32_.end(),
                     {&own->dtype, &own->device_type, &own->device_index, &own->rank});
    for (int n = 0; n < TANDEM_MAX_RANK; ++n) {
      fields64_.push_back(&own->shape[n]);
      fields64_.push_back(&own->strides[n]);
    }
    data_.push_back(&own->data);
    sizes_.push_back(&own->struct_size);
    return own;
  }

  // Integers need their own memory: their values matter.
  const tandem_tensor* Integers(const std::vector<int64_t>& shape, int32_t limit) {
    tandem_tensor* t = const_cast<tandem_tensor*>(Tensor(TANDEM_DTYPE_I32, shape));
    if (integers_used_ + 4096 > kPoolSize / 4) return t;
    t->data = pool + integers_used_;
    int32_t* values = static_cast<int32_t*>(t->data);
    for (int n = 0; n < 1024; ++n) values[n] = static_cast<int32_t>(bytes_.Below(limit + 1));
    integers_used_ += 4096;
    return t;
  }

  std::vector<int64_t> Shape(int64_t heads, int64_t rows, int64_t dim) const {
    if (layout_ == TANDEM_LAYOUT_THD) return {rows, heads, dim};
    if (layout_ == TANDEM_LAYOUT_BSHD) return {batch_, rows, heads, dim};
    return {batch_, heads, rows, dim};
  }

  // Keys and values in pages; at times the table names one that is not there.
  void Pages(tandem_dtype dtype) {
    const int64_t page_size = 1 + bytes_.Below(70), pages = 1 + bytes_.Below(6);
    const int64_t per_sequence = (kv_rows_ + page_size - 1) / page_size;
    problem_.page_size = page_size;
    problem_.k = Tensor(dtype, {pages, page_size, kv_heads_, dim_});
    problem_.v = Tensor(dtype, {pages, page_size, kv_heads_, v_dim_});
    const int32_t most = static_cast<int32_t>(bytes_.Below(8) == 0 ? pages : pages - 1);
    problem_.block_table = Integers({batch_, per_sequence}, most);
    kv_rows_ = per_sequence * page_size;
  }

  void Tensors() {
    const tandem_dtype dtype = static_cast<tandem_dtype>(1 + bytes_.Below(3));
    problem_.layout = layout_;
    problem_.q = Tensor(dtype, Shape(q_heads_, q_rows_, dim_));
    if (layout_ != TANDEM_LAYOUT_THD && bytes_.Below(4) == 0) {
      Pages(dtype);
    } else {
      problem_.k = Tensor(dtype, Shape(kv_heads_, kv_rows_, dim_));
      problem_.v = Tensor(dtype, Shape(kv_heads_, kv_rows_, v_dim_));
    }
    tandem_tensor* out = const_cast<tandem_tensor*>(
        Tensor(bytes_.Coin() ? dtype : TANDEM_DTYPE_F32, Shape(q_heads_, q_rows_, v_dim_)));
    out->data = pool + kPoolSize / 2;
    outputs_.out = out;
    if (bytes_.Coin()) {
      const std::vector<int64_t> shape = layout_ == TANDEM_LAYOUT_THD
                                             ? std::vector<int64_t>{q_heads_, q_rows_}
                                             : std::vector<int64_t>{batch_, q_heads_, q_rows_};
      tandem_tensor* lse = const_cast<tandem_tensor*>(Tensor(TANDEM_DTYPE_F32, shape));
      lse->data = pool + kPoolSize / 4 * 3;
      outputs_.lse = lse;
    }
    fields32_.push_back(&problem_.layout);
    sizes_.insert(sizes_.end(), {&problem_.struct_size, &outputs_.struct_size});
    pointers_.insert(pointers_.end(),
                     {&problem_.q, &problem_.k, &problem_.v, &outputs_.out, &outputs_.lse});
  }

  void Scalars() {
    const uint8_t which = bytes_.Next();
    if (which & 1) problem_.has_scale = 1;
    problem_.scale = static_cast<float>(bytes_.Next()) - 128.0f;
    if (which & 2) problem_.softcap = 10.0f;
    if (which & 4) problem_.dropout_rate = 0.25f;
    if (which & 8) problem_.sink = Tensor(TANDEM_DTYPE_F32, {q_heads_});
    if (which & 16) {
      problem_.alibi_slopes = Tensor(TANDEM_DTYPE_F32, {q_heads_});
      problem_.alibi_alignment = TANDEM_ALIGN_TOP_LEFT;
    }
    if (which & 32) problem_.bias = Tensor(TANDEM_DTYPE_F32, {1, 1, 1, 1});
    if ((which & 64) && layout_ != TANDEM_LAYOUT_THD) {
      problem_.q_offset = bytes_.Below(4);
      problem_.global_q_len = problem_.q_offset + q_rows_ + bytes_.Below(4);
    }
    if (which & 128) options_.kernel = "reference.cpu";
    options_.threads = 1;
    fields32_.insert(fields32_.end(),
                     {&problem_.has_scale, &problem_.alibi_alignment, &options_.device_type,
                      &options_.device_index, &options_.threads});
    fields64_.insert(fields64_.end(),
                     {&problem_.q_offset, &problem_.kv_offset, &problem_.global_q_len,
                      &problem_.global_kv_len, &problem_.page_size});
    pointers_.insert(pointers_.end(), {&problem_.sink, &problem_.alibi_slopes, &problem_.bias,
                                       &problem_.block_table});
    floats_ = {&problem_.scale, &problem_.softcap, &problem_.dropout_rate};
    sizes_.push_back(&options_.struct_size);
    if (layout_ == TANDEM_LAYOUT_THD) Packed();
  }

  void Packed() {
    tandem_packed_term term = TANDEM_PACKED_TERM_INIT;
    term.cu_seqlens_q = Integers({batch_ + 1}, 0);
    term.cu_seqlens_k = Integers({batch_ + 1}, 0);
    const auto fill = [&](const tandem_tensor* cu, int64_t rows) {
      int32_t* values = static_cast<int32_t*>(cu->data);
      int64_t at = 0;
      for (int64_t b = 0; b <= batch_; ++b) {
        values[b] = static_cast<int32_t>(at);
        at += bytes_.Below(std::max<int64_t>(rows - at, 0) + 1);
      }
    };
    fill(term.cu_seqlens_q, q_rows_);
    fill(term.cu_seqlens_k, kv_rows_);
    tandem_packed_term* own = Add(term);
    pointers_.insert(pointers_.end(), {&own->cu_seqlens_q, &own->cu_seqlens_k});
    fields64_.insert(fields64_.end(), {&own->max_q_len, &own->max_kv_len});
  }

  template <typename T>
  T* Add(const T& term) {
    Storage* storage = &storage_.emplace_back();
    std::memcpy(storage->bytes, &term, sizeof(term));
    T* own = reinterpret_cast<T*>(storage->bytes);
    terms_[problem_.mask_term_count++] = &own->head;
    sizes_.push_back(&own->head.struct_size);
    return own;
  }

  void Term() {
    switch (bytes_.Below(6)) {
      case 0: {
        tandem_band_term term = TANDEM_BAND_TERM_INIT;
        term.alignment = static_cast<tandem_alignment>(1 + bytes_.Below(2));
        term.right = static_cast<int32_t>(bytes_.Below(5)) - 1;
        if (bytes_.Coin()) term.prefix = Integers({1}, 20);
        if (bytes_.Coin()) term.left_per_head = Integers({1, q_heads_}, 20);
        tandem_band_term* own = Add(term);
        fields32_.insert(fields32_.end(), {&own->alignment, &own->left, &own->right});
        pointers_.insert(pointers_.end(), {&own->prefix, &own->left_per_head});
        break;
      }
      case 1: {
        tandem_row_ranges_term term = TANDEM_ROW_RANGES_TERM_INIT;
        term.ranges = Integers({1, 1, 1, 1 + bytes_.Below(3), 2}, 70);
        pointers_.push_back(&Add(term)->ranges);
        break;
      }
      case 2: {
        tandem_lengths_term term = TANDEM_LENGTHS_TERM_INIT;
        term.kv_lengths =
            Integers({batch_}, layout_ == TANDEM_LAYOUT_THD ? 0 : static_cast<int32_t>(kv_rows_));
        tandem_lengths_term* own = Add(term);
        pointers_.insert(pointers_.end(), {&own->q_lengths, &own->kv_lengths});
        break;
      }
      case 3: {
        if (layout_ == TANDEM_LAYOUT_THD) return;
        tandem_segments_term term = TANDEM_SEGMENTS_TERM_INIT;
        term.q_segments = Integers({1, q_rows_}, 3);
        term.kv_segments = Integers({1, kv_rows_}, 3);
        tandem_segments_term* own = Add(term);
        pointers_.insert(pointers_.end(), {&own->q_segments, &own->kv_segments});
        break;
      }
      case 4: {
        tandem_dense_term term = TANDEM_DENSE_TERM_INIT;
        term.mask = Tensor(bytes_.Coin() ? TANDEM_DTYPE_BOOL : TANDEM_DTYPE_BIT, {1, 1, 1, 1});
        pointers_.push_back(&Add(term)->mask);
        break;
      }
      default: {
        tandem_block_sparse_term term = TANDEM_BLOCK_SPARSE_TERM_INIT;
        term.q_block = static_cast<int32_t>(1 + bytes_.Below(40));
        term.kv_block = static_cast<int32_t>(1 + bytes_.Below(40));
        const int64_t blocks = (q_rows_ + term.q_block - 1) / term.q_block;
        const int64_t kv_blocks = (kv_rows_ + term.kv_block - 1) / term.kv_block;
        term.counts = Integers({1, 1, blocks}, 2);
        term.indices =
            Integers({1, 1, blocks, 2}, static_cast<int32_t>(std::max<int64_t>(kv_blocks, 1)) - 1);
        tandem_block_sparse_term* own = Add(term);
        fields32_.insert(fields32_.end(), {&own->q_block, &own->kv_block});
        pointers_.insert(pointers_.end(), {&own->counts, &own->indices});
        break;
      }
    }
  }

  // Some of the gradients, with the shapes that the problem has by now, in parts of the pool that
  // are theirs: the largest has 30 KB.
  void Gradients() {
    asks_gradients_ = true;
    const auto like = [&](const tandem_tensor* t, bool keeps_dtype, int64_t place) {
      if (t == nullptr) return t;
      tandem_tensor* own = const_cast<tandem_tensor*>(Tensor(TANDEM_DTYPE_F32, {}));
      *own = *t;
      own->data = pool + place;
      if (!keeps_dtype) own->dtype = TANDEM_DTYPE_F32;
      return const_cast<const tandem_tensor*>(own);
    };
    constexpr int64_t kInput = kPoolSize / 4, kAfterOut = kPoolSize / 2 + 32768,
                      kAfterLse = kPoolSize / 4 * 3 + 8192;
    const uint8_t which = bytes_.Next();
    gradients_.dout = like(outputs_.out, true, kInput);
    if (which & 1) gradients_.dlse = like(outputs_.lse, true, kInput);
    if (which & 2) gradients_.dq = like(problem_.q, which & 128, kAfterOut);
    if (which & 4) gradients_.dk = like(problem_.k, which & 128, kAfterLse);
    if (which & 8) gradients_.dv = like(problem_.v, which & 128, kAfterLse + 16384);
    if (which & 16) gradients_.dbias = like(problem_.bias, false, kAfterLse + 32768);
    if (which & 32) gradients_.dsink = like(problem_.sink, false, kAfterLse + 33792);
    if (which & 64) gradients_.dalibi = like(problem_.alibi_slopes, false, kAfterLse + 34816);
    gradients_.deterministic = bytes_.Coin() ? 1 : 0;
    sizes_.push_back(&gradients_.struct_size);
    fields32_.push_back(&gradients_.deterministic);
    pointers_.insert(pointers_.end(),
                     {&gradients_.dout, &gradients_.dlse, &gradients_.dq, &gradients_.dk,
                      &gradients_.dv, &gradients_.dbias, &gradients_.dsink, &gradients_.dalibi});
  }

  void Damage() {
    const int64_t value = kTelling[bytes_.Below(std::size(kTelling))];
    switch (bytes_.Below(8)) {
      case 0:
      case 1:
        *Pick(fields64_) = value;
        break;
      case 2:
        *Pick(fields32_) = static_cast<int32_t>(value);
        break;
      case 3:
        *Pick(pointers_) = bytes_.Coin() ? nullptr : &tensors_[Index(tensors_.size())];
        break;
      case 4: {
        void** data = Pick(data_);
        const bool is_kept = *data != nullptr && !bytes_.Coin();
        *data = is_kept ? static_cast<unsigned char*>(*data) + 1 : nullptr;
        break;
      }
      case 5: {
        const float values[] = {-1.0f, 1.0f, 0.0f, __builtin_nanf(""), __builtin_inff(), -1e38f};
        *Pick(floats_) = values[Index(std::size(values))];
        break;
      }
      case 6:
        *Pick(sizes_) = static_cast<uint32_t>(value);
        break;
      default: {
        const int32_t counts[] = {-1, 0, 16, INT32_MIN, problem_.mask_term_count + 1};
        problem_.mask_term_count = counts[Index(std::size(counts))];
      }
    }
  }

  size_t Index(size_t count) {
    const size_t high = bytes_.Next();
    return (high * 256 + bytes_.Next()) % count;
  }
  template <typename T>
  T Pick(const std::vector<T>& places) {
    return places[Index(places.size())];
  }

  struct Storage {
    alignas(8) unsigned char bytes[256] = {};
  };

  Bytes& bytes_;
  tandem_layout layout_;
  int64_t batch_, q_heads_, kv_heads_, q_rows_, kv_rows_, dim_, v_dim_;
  int64_t integers_used_ = 0;
  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
  tandem_options options_ = TANDEM_OPTIONS_INIT;
  tandem_gradients gradients_ = TANDEM_GRADIENTS_INIT;
  bool asks_gradients_ = false;
  const tandem_mask_term* terms_[64] = {};
  std::deque<tandem_tensor> tensors_;
  std::deque<Storage> storage_;
  std::vector<int32_t*> fields32_;
  std::vector<int64_t*> fields64_;
  std::vector<uint32_t*> sizes_;
  std::vector<void**> data_;
  std::vector<const tandem_tensor**> pointers_;
  std::vector<float*> floats_;
};

}  // namespace

#endif  // TANDEM_TESTS_FUZZ_DESCRIPTOR_H_
