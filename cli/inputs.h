// From options and files to a tandem_problem, and the memory behind it.
#ifndef TANDEM_CLI_INPUTS_H_
#define TANDEM_CLI_INPUTS_H_

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cli/buffer.h"
#include "cli/npy.h"
#include "cli/options.h"
#include "tandem/tandem.h"

namespace tandem::cli {

enum class Source {
  kData,    // run, compare: q, k, v from files or random
  kShapes,  // explain, mask: q, k, v without data
};

// A problem and everything that it points to. Throws BadInput where options contradict each other
// or a file is not what its option needs; the library checks the rest.
class Inputs {
 public:
  Inputs(const ProblemOptions& options, Source source);
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  const tandem_problem& problem() const { return problem_; }

 private:
  // How many rows and keys the tensors have, by the layout.
  struct Extents {
    int64_t q_rows;
    int64_t kv_rows;
  };
  Extents RowExtents() const;

  void ChooseLayout(const ProblemOptions& options);
  void LoadData(const ProblemOptions& options);
  void MakeShapes(const ProblemOptions& options, Source source);
  void AddScores(const ProblemOptions& options);
  void AddMask(const MaskOptions& options);
  void AddBands(const MaskOptions& options);
  void AddLengths(const MaskOptions& options);
  void AddBlocks(const MaskOptions& options);
  void AddSegments(const MaskOptions& options);
  void AddPacked(const MaskOptions& options);

  tandem_tensor* NewTensor(tandem_dtype dtype, const std::vector<int64_t>& shape, void* data);
  tandem_tensor* Own(NpyArray array, tandem_dtype dtype);
  const tandem_tensor* ReadTensor(const std::string& option, const std::string& path,
                                  const std::string& dtype);
  const tandem_tensor* ReadMask(const std::string& option, const std::string& path);
  const tandem_tensor* ReadInt32(const std::string& option, const std::string& path);
  const tandem_tensor* ReadFloat32(const std::string& option, const std::string& path);
  const tandem_tensor* NewInt32(const std::vector<int64_t>& shape, int32_t** data);
  template <typename Term>
  void AddTerm(const Term& term, std::deque<Term>* terms);

  tandem_problem problem_ = TANDEM_PROBLEM_INIT;
  std::deque<Buffer> buffers_;
  std::deque<tandem_tensor> tensors_;
  std::deque<tandem_band_term> bands_;
  std::deque<tandem_row_ranges_term> row_ranges_;
  std::deque<tandem_lengths_term> lengths_;
  std::deque<tandem_packed_term> packed_;
  std::deque<tandem_segments_term> segments_;
  std::deque<tandem_dense_term> dense_;
  std::deque<tandem_block_sparse_term> blocks_;
  std::vector<const tandem_mask_term*> terms_;
};

// The outputs of a problem, filled with NaN.
class Outputs {
 public:
  explicit Outputs(const tandem_problem& problem);
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  const tandem_outputs& get() const { return outputs_; }
  // All bits set, a NaN in every type: what a kernel leaves unwritten is seen.
  void Poison();
  const tandem_tensor& out() const { return out_; }
  const tandem_tensor& lse() const { return lse_; }

 private:
  Buffer out_data_;
  Buffer lse_data_;
  tandem_tensor out_ = TANDEM_TENSOR_INIT;
  tandem_tensor lse_ = TANDEM_TENSOR_INIT;
  tandem_outputs outputs_ = TANDEM_OUTPUTS_INIT;
};

// A tensor in C order in host memory.
tandem_tensor ContiguousTensor(tandem_dtype dtype, const std::vector<int64_t>& shape, void* data);

// Bytes of a contiguous tensor; throws BadInput when they are beyond 63 bits.
size_t ByteSize(tandem_dtype dtype, const std::vector<int64_t>& shape);

// The tensor's shape as a vector.
std::vector<int64_t> ShapeOf(const tandem_tensor& tensor);

// The dtype of a file of floating point numbers; dtype: --dtype, or "". Throws BadInput.
tandem_dtype FloatDtype(const std::string& option, const NpyArray& array, const std::string& dtype);

// The type in which a tensor is written to a .npy file.
NpyType FileType(tandem_dtype dtype);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_INPUTS_H_
