#include "backend_cpu/onednn/matmul.h"

#include <omp.h>

#include "core/macros.h"

namespace tandem::cpu::onednn {
namespace {

using dnnl::memory;

memory::desc Matrix(int64_t rows, int64_t columns, bool is_transposed) {
  const memory::dims strides = is_transposed ? memory::dims{1, rows} : memory::dims{columns, 1};
  return memory::desc({rows, columns}, memory::data_type::f32, strides);
}

dnnl::matmul::primitive_desc Describe(const dnnl::engine& engine, int64_t m, int64_t n, int64_t k,
                                      bool b_is_transposed, bool accumulate) {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (accumulate) {
    dnnl::post_ops operations;
    operations.append_sum(1.0f);
    attributes.set_post_ops(operations);
  }
  const memory::desc a = Matrix(m, k, false);
  const memory::desc b = Matrix(k, n, b_is_transposed);
  const memory::desc c = Matrix(m, n, false);
#if DNNL_VERSION_MAJOR >= 3
  return dnnl::matmul::primitive_desc(engine, a, b, c, attributes);
#else
  return dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, c), attributes, engine);
#endif
}

}  // namespace

SerialScope::SerialScope() : threads_(omp_get_max_threads()) { omp_set_num_threads(1); }
SerialScope::~SerialScope() { omp_set_num_threads(threads_); }

Matmul::Matmul(const dnnl::engine& engine, int64_t m, int64_t n, int64_t k, bool b_is_transposed,
               bool accumulate)
    : descriptor_(Describe(engine, m, n, k, b_is_transposed, accumulate)),
      primitive_(descriptor_) {}

int64_t Matmul::scratch_bytes() const {
  return static_cast<int64_t>(descriptor_.scratchpad_desc().get_size());
}

void Matmul::Run(const dnnl::engine& engine, dnnl::stream* stream, const float* a, const float* b,
                 float* c, void* scratch) const {
  // Sources are only read; the wrapper has no const handle.
  const memory source(descriptor_.src_desc(), engine, const_cast<float*>(a));
  const memory weights(descriptor_.weights_desc(), engine, const_cast<float*>(b));
  const memory destination(descriptor_.dst_desc(), engine, c);
  const memory scratchpad(descriptor_.scratchpad_desc(), engine, scratch);
  primitive_.execute(*stream, {{DNNL_ARG_SRC, source},
                               {DNNL_ARG_WEIGHTS, weights},
                               {DNNL_ARG_DST, destination},
                               {DNNL_ARG_SCRATCHPAD, scratchpad}});
  stream->wait();
}

Products::Products(int64_t qk_dim, int64_t v_dim)
    : engine_(dnnl::engine::kind::cpu, 0), qk_dim_(qk_dim), v_dim_(v_dim) {}

void Products::Make(int64_t rows, int64_t keys) {
  Pair& pair = pairs_[Index(rows, keys)];
  if (pair.scores.has_value()) return;
  pair.output.emplace(engine_, rows, v_dim_, keys, false, true);
  pair.scores.emplace(engine_, rows, keys, qk_dim_, true, false);
  scratch_bytes_ = core::Max(scratch_bytes_,
                             core::Max(pair.scores->scratch_bytes(), pair.output->scratch_bytes()));
}

}  // namespace tandem::cpu::onednn
