// Matrix products of fixed sizes by oneDNN, versions 2 and 3. Functions throw dnnl::error and
// std::bad_alloc, which onednn_kernel.cpp keeps inside.
#ifndef TANDEM_BACKEND_CPU_ONEDNN_MATMUL_H_
#define TANDEM_BACKEND_CPU_ONEDNN_MATMUL_H_

#include <array>
#include <cstdint>
#include <oneapi/dnnl/dnnl.hpp>
#include <optional>

namespace tandem::cpu::onednn {

// Makes oneDNN serial on this thread while it lives: Tandem's own threads each run whole products,
// so that no sum depends on how many there are. A product must be made and run under one.
class SerialScope {
 public:
  SerialScope();
  ~SerialScope();
  SerialScope(const SerialScope&) = delete;
  SerialScope& operator=(const SerialScope&) = delete;

 private:
  int threads_;
};

// Row-major f32 c[m, n] = a[m, k] b, b being [k, n] or, transposed, [n, k]; with `accumulate` the
// product is added to c. Immutable: threads may run it at once, each with its own scratch.
class Matmul {
 public:
  Matmul(const dnnl::engine& engine, int64_t m, int64_t n, int64_t k, bool b_is_transposed,
         bool accumulate);

  int64_t scratch_bytes() const;
  void Run(const dnnl::engine& engine, dnnl::stream* stream, const float* a, const float* b,
           float* c, void* scratch) const;

 private:
  dnnl::matmul::primitive_desc descriptor_;
  dnnl::matmul primitive_;
};

// Sizes of the products: `rows` query rows by `keys` keys, both rounded up by the caller.
inline constexpr int64_t kRowStep = 16;
inline constexpr int64_t kMaxRows = 64;
inline constexpr int64_t kKeyStep = 64;
inline constexpr int64_t kMaxKeys = 512;

// The two products of attention for every size that a call needs, made before it starts.
class Products {
 public:
  Products(int64_t qk_dim, int64_t v_dim);

  void Make(int64_t rows, int64_t keys);  // once or more often
  const Matmul& scores(int64_t rows, int64_t keys) const { return *At(rows, keys).scores; }
  const Matmul& output(int64_t rows, int64_t keys) const { return *At(rows, keys).output; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  const dnnl::engine& engine() const { return engine_; }

 private:
  struct Pair {
    std::optional<Matmul> scores;  // [rows, qk_dim] [keys, qk_dim]^T
    std::optional<Matmul> output;  // += [rows, keys] [keys, v_dim]
  };
  static int64_t Index(int64_t rows, int64_t keys) {
    return (rows / kRowStep - 1) * (kMaxKeys / kKeyStep) + keys / kKeyStep - 1;
  }
  const Pair& At(int64_t rows, int64_t keys) const { return pairs_[Index(rows, keys)]; }

  dnnl::engine engine_;
  int64_t qk_dim_;
  int64_t v_dim_;
  int64_t scratch_bytes_ = 0;
  std::array<Pair, (kMaxRows / kRowStep) * (kMaxKeys / kKeyStep)> pairs_;
};

}  // namespace tandem::cpu::onednn

#endif  // TANDEM_BACKEND_CPU_ONEDNN_MATMUL_H_
