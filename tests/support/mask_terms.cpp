#include "tests/support/mask_terms.h"

#include <algorithm>
#include <optional>

namespace tandem::test {
namespace {

// Index `n` of a dimension that may be broadcast.
int64_t At(const Tensor& tensor, int dimension, int64_t n) {
  return tensor.shape()[dimension] == 1 ? 0 : n;
}

int64_t Extent(bool present, int64_t extent) { return present ? extent : 1; }

class TestBand final : public Term {
 public:
  TestBand(const TermSpec& spec, const Extents& extents, Random& random) {
    term_.alignment = spec.alignment;
    term_.left = spec.left;
    term_.right = spec.right;
    if (spec.widths_per_head) {
      const Shape shape = {Extent(spec.per_batch, extents.batch),
                           Extent(spec.per_head, extents.q_heads)};
      left_.emplace(TANDEM_DTYPE_I32, shape, Strides{}, extents.placement);
      right_.emplace(TANDEM_DTYPE_I32, shape, Strides{}, extents.placement);
      for (Tensor* tensor : {&*left_, &*right_}) {
        tensor->ForEach([&](std::span<const int64_t> index) {
          tensor->Set(index, random.Chance(0.25) ? -1 : random.Below(extents.kv_len / 2 + 2));
        });
      }
      term_.left_per_head = left_->get();
      term_.right_per_head = right_->get();
    }
    if (spec.prefix) {
      prefix_.emplace(TANDEM_DTYPE_I32, Shape{Extent(spec.per_batch, extents.batch)}, Strides{},
                      extents.placement);
      prefix_->ForEach([&](std::span<const int64_t> index) {
        prefix_->Set(index, random.Below(extents.kv_len + 1));
      });
      term_.prefix = prefix_->get();
    }
  }
  bool Allows(const Pair& p) const override {
    const int64_t offset = term_.alignment == TANDEM_ALIGN_BOTTOM_RIGHT ? p.kv_len - p.q_len : 0;
    const int64_t d = p.i + offset;
    if (prefix_ && p.j < prefix_->Get({At(*prefix_, 0, p.batch)})) return true;
    const int64_t left = Width(left_, term_.left, p);
    const int64_t right = Width(right_, term_.right, p);
    return (left < 0 || p.j >= d - left) && (right < 0 || p.j <= d + right);
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  static int64_t Width(const std::optional<Tensor>& tensor, int32_t scalar, const Pair& p) {
    if (!tensor) return scalar;
    return static_cast<int64_t>(tensor->Get({At(*tensor, 0, p.batch), At(*tensor, 1, p.head)}));
  }
  tandem_band_term term_ = TANDEM_BAND_TERM_INIT;
  std::optional<Tensor> left_, right_, prefix_;
};

class TestRowRanges final : public Term {
 public:
  TestRowRanges(const TermSpec& spec, const Extents& extents, Random& random)
      : ranges_(TANDEM_DTYPE_I32,
                {Extent(spec.per_batch, extents.batch), Extent(spec.per_head, extents.q_heads),
                 Extent(spec.per_row, extents.q_len), spec.ranges, 2},
                spec.strides, extents.placement) {
    ranges_.ForEach([&](std::span<const int64_t> index) {
      if (index[4] != 0) return;
      std::vector<int64_t> at(index.begin(), index.end());
      // Runs of rows share their ranges, so that tiles of every class occur; some are inverted.
      if (index[2] % 48 != 0) {
        std::vector<int64_t> above = at;
        --above[2];
        const double begin = ranges_.Get(above);
        above[4] = 1;
        ranges_.Set(at, begin);
        at[4] = 1;
        ranges_.Set(at, ranges_.Get(above));
        return;
      }
      const int64_t begin = random.Range(-3, extents.kv_len);
      ranges_.Set(at, static_cast<double>(begin));
      at[4] = 1;
      ranges_.Set(at, static_cast<double>(begin + random.Range(-2, extents.kv_len / 2 + 70)));
    });
    term_.ranges = ranges_.get();
  }
  bool Allows(const Pair& p) const override {
    const int64_t b = At(ranges_, 0, p.batch), h = At(ranges_, 1, p.head), i = At(ranges_, 2, p.i);
    for (int64_t r = 0; r < ranges_.shape()[3]; ++r) {
      if (p.j >= ranges_.Get({b, h, i, r, 0}) && p.j < ranges_.Get({b, h, i, r, 1})) return true;
    }
    return false;
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  Tensor ranges_;
  tandem_row_ranges_term term_ = TANDEM_ROW_RANGES_TERM_INIT;
};

class TestLengths final : public Term {
 public:
  TestLengths(const Extents& extents, bool q, bool kv)
      : q_(IndexTensor(extents.q_lens)), kv_(IndexTensor(extents.kv_lens)) {
    if (q) term_.q_lengths = q_.get();
    if (kv) term_.kv_lengths = kv_.get();
  }
  bool Allows(const Pair& p) const override {
    return (term_.q_lengths == nullptr || p.i < q_.Get({p.batch})) &&
           (term_.kv_lengths == nullptr || p.j < kv_.Get({p.batch}));
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  Tensor q_, kv_;
  tandem_lengths_term term_ = TANDEM_LENGTHS_TERM_INIT;
};

class TestPacked final : public Term {
 public:
  TestPacked(const Extents& extents, tandem_dtype dtype)
      : q_(IndexTensor(extents.cu_q, dtype)), k_(IndexTensor(extents.cu_k, dtype)) {
    term_.cu_seqlens_q = q_.get();
    term_.cu_seqlens_k = k_.get();
  }
  bool Allows(const Pair&) const override { return true; }  // pairs of one sequence only
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  Tensor q_, k_;
  tandem_packed_term term_ = TANDEM_PACKED_TERM_INIT;
};

class TestSegments final : public Term {
 public:
  TestSegments(const TermSpec& spec, const Extents& extents, Random& random)
      : packed_(extents.packed),
        q_(TANDEM_DTYPE_I32,
           packed_ ? Shape{extents.q_total}
                   : Shape{Extent(spec.per_batch, extents.batch), extents.q_len},
           Strides{}, extents.placement),
        kv_(TANDEM_DTYPE_I32,
            packed_ ? Shape{extents.kv_total}
                    : Shape{Extent(spec.per_batch, extents.batch), extents.kv_len},
            Strides{}, extents.placement) {
    Fill(spec, q_, random);
    Fill(spec, kv_, random);
    term_.q_segments = q_.get();
    term_.kv_segments = kv_.get();
  }
  bool Allows(const Pair& p) const override {
    const int64_t q = Read(q_, p.batch, p.q_start + p.i);
    return q >= 0 && q == Read(kv_, p.batch, p.kv_start + p.j);
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  static void Fill(const TermSpec& spec, Tensor& tensor, Random& random) {
    const int64_t length = tensor.shape().back();
    tensor.ForEach([&](std::span<const int64_t> index) {
      const int64_t n = index.back();
      const int64_t segment = spec.sorted ? n * spec.segments / std::max<int64_t>(length, 1)
                                          : random.Below(spec.segments);
      // The padding of a sorted row, and stray positions of an unsorted one, belong to nothing.
      const bool none = spec.sorted ? n >= length - length / 8 : random.Chance(0.1);
      tensor.Set(index, none ? -static_cast<double>(random.Range(1, 3))
                             : static_cast<double>(segment * 7));
    });
  }
  int64_t Read(const Tensor& tensor, int64_t batch, int64_t n) const {
    return static_cast<int64_t>(packed_ ? tensor.Get({n}) : tensor.Get({At(tensor, 0, batch), n}));
  }
  bool packed_;
  Tensor q_, kv_;
  tandem_segments_term term_ = TANDEM_SEGMENTS_TERM_INIT;
};

class TestDense final : public Term {
 public:
  TestDense(const TermSpec& spec, const Extents& extents, Random& random)
      : mask_(spec.dtype, ShapeOf(spec, extents), spec.strides, extents.placement) {
    const uint64_t tile_seed = random.Next();
    if (spec.offsets) {
      int64_t offset = 3;  // not on a byte's border
      std::vector<int64_t> offsets;
      for (int64_t b = 0; b < extents.batch; ++b) {
        offsets.push_back(offset);
        kv_pitch_.push_back(extents.kv_lens[b]);
        offset += extents.q_lens[b] * extents.kv_lens[b];
      }
      offsets_.emplace(IndexTensor(offsets, TANDEM_DTYPE_I64));
      term_.sequence_offsets = offsets_->get();
    }
    mask_.ForEach([&](std::span<const int64_t> index) {
      bool visible = random.Chance(spec.density);
      if (spec.tiles && index.size() >= 2) {
        uint64_t tile = tile_seed;
        for (size_t d = 0; d < index.size(); ++d) {
          tile = tile * 1000003 + (d + 2 >= index.size() ? index[d] / 64 : index[d]);
        }
        const int64_t kind = Random(tile).Below(3);
        visible = kind == 0 ? false : (kind == 1 ? true : visible);
      }
      mask_.Set(index, visible);
    });
    term_.mask = mask_.get();
  }
  bool Allows(const Pair& p) const override {
    if (offsets_) {
      return mask_.Get({static_cast<int64_t>(offsets_->Get({p.batch})) + p.i * kv_pitch_[p.batch] +
                        p.j}) != 0;
    }
    const int rank = static_cast<int>(mask_.shape().size());
    std::vector<int64_t> index = {p.batch, p.head, p.i, p.j};
    if (rank == 3) index = {p.batch, p.i, p.j};
    if (rank == 2) index = {p.i, p.j};
    for (int d = 0; d < rank; ++d) index[d] = At(mask_, d, index[d]);
    return mask_.Get(index) != 0;
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  static Shape ShapeOf(const TermSpec& spec, const Extents& extents) {
    if (spec.offsets) {
      int64_t count = 3;
      for (int64_t b = 0; b < extents.batch; ++b) count += extents.q_lens[b] * extents.kv_lens[b];
      return {count};
    }
    const Shape full = {Extent(spec.per_batch, extents.batch),
                        Extent(spec.per_head, extents.q_heads), Extent(spec.per_row, extents.q_len),
                        extents.kv_len};
    if (spec.rank == 3) return {full[0], full[2], full[3]};
    if (spec.rank == 2) return {full[2], full[3]};
    return full;
  }
  Tensor mask_;
  std::optional<Tensor> offsets_;
  std::vector<int64_t> kv_pitch_;
  tandem_dense_term term_ = TANDEM_DENSE_TERM_INIT;
};

class TestBlockSparse final : public Term {
 public:
  TestBlockSparse(const TermSpec& spec, const Extents& extents, Random& random) {
    term_.q_block = spec.q_block;
    term_.kv_block = spec.kv_block;
    const int64_t q_blocks = (extents.q_len + spec.q_block - 1) / spec.q_block;
    const int64_t kv_blocks = (extents.kv_len + spec.kv_block - 1) / spec.kv_block;
    const Shape counts = {Extent(spec.per_batch, extents.batch),
                          Extent(spec.per_head, extents.q_heads), q_blocks};
    const Shape indices = {counts[0], counts[1], q_blocks, kv_blocks};
    AddLists(counts, indices, kv_blocks, extents.placement, random);
    if (spec.full_lists) AddLists(counts, indices, kv_blocks, extents.placement, random);
    term_.counts = lists_[0].get();
    term_.indices = lists_[1].get();
    if (spec.full_lists) {
      term_.full_counts = lists_[2].get();
      term_.full_indices = lists_[3].get();
    }
  }
  bool Allows(const Pair& p) const override {
    for (size_t list = 0; list < lists_.size(); list += 2) {
      const Tensor& counts = lists_[list];
      const int64_t b = At(counts, 0, p.batch), h = At(counts, 1, p.head), q = p.i / term_.q_block;
      for (int64_t n = 0; n < counts.Get({b, h, q}); ++n) {
        if (lists_[list + 1].Get({b, h, q, n}) == p.j / term_.kv_block) return true;
      }
    }
    return false;
  }
  const tandem_mask_term* get() const override { return &term_.head; }

 private:
  void AddLists(const Shape& counts, const Shape& indices, int64_t kv_blocks, Placement placement,
                Random& random) {
    Tensor& count = lists_.emplace_back(TANDEM_DTYPE_I32, counts, Strides{}, placement);
    count.ForEach([&](std::span<const int64_t> index) {
      count.Set(index, random.Chance(0.2) ? 0 : random.Below(kv_blocks + 1));
    });
    // Unused places of a list are never looked at: they hold nonsense.
    Tensor& list = lists_.emplace_back(TANDEM_DTYPE_I32, indices, Strides{}, placement);
    list.ForEach([&](std::span<const int64_t> index) {
      const double used = lists_[lists_.size() - 2].Get({index[0], index[1], index[2]});
      list.Set(index, index[3] < used ? random.Below(kv_blocks) : -77777);
    });
  }
  std::vector<Tensor> lists_;
  tandem_block_sparse_term term_ = TANDEM_BLOCK_SPARSE_TERM_INIT;
};

}  // namespace

std::unique_ptr<Term> MakeTerm(const TermSpec& spec, const Extents& extents, Random& random) {
  switch (spec.kind) {
    case TANDEM_MASK_BAND:
      return std::make_unique<TestBand>(spec, extents, random);
    case TANDEM_MASK_ROW_RANGES:
      return std::make_unique<TestRowRanges>(spec, extents, random);
    case TANDEM_MASK_SEGMENTS:
      return std::make_unique<TestSegments>(spec, extents, random);
    case TANDEM_MASK_DENSE:
      return std::make_unique<TestDense>(spec, extents, random);
    case TANDEM_MASK_BLOCK_SPARSE:
      return std::make_unique<TestBlockSparse>(spec, extents, random);
    default:
      return nullptr;
  }
}

std::unique_ptr<Term> MakePackedTerm(const Extents& extents, tandem_dtype dtype) {
  return std::make_unique<TestPacked>(extents, dtype);
}

std::unique_ptr<Term> MakeLengthsTerm(const Extents& extents, bool q, bool kv) {
  return std::make_unique<TestLengths>(extents, q, kv);
}

}  // namespace tandem::test
