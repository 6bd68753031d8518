// The tensors of a backward pass, and the memory behind them.
#ifndef TANDEM_CLI_GRADIENTS_H_
#define TANDEM_CLI_GRADIENTS_H_

#include <cstdint>
#include <deque>
#include <string>

#include "cli/buffer.h"
#include "cli/options.h"
#include "tandem/tandem.h"

namespace tandem::cli {

class Gradients {
 public:
  // Of run: dO and dLSE from their files, and the gradients that the options name. dtype: --dtype.
  // Throws BadInput where a file is not what its option needs.
  Gradients(const tandem_problem& problem, const BackwardOptions& options,
            const std::string& dtype);
  // Of compare: dO drawn from the normal distribution, and every gradient that the problem has.
  Gradients(const tandem_problem& problem, const tandem_outputs& outputs, uint64_t seed);
  Gradients(const Gradients&) = delete;
  Gradients& operator=(const Gradients&) = delete;

  const tandem_gradients& get() const { return gradients_; }
  // All bits set, a NaN in every type: what a kernel leaves unwritten is seen.
  void Poison();

 private:
  // A tensor of the shape of `like`, in its dtype or the given one.
  const tandem_tensor* New(const tandem_tensor& like, tandem_dtype dtype = TANDEM_DTYPE_UNSET);
  const tandem_tensor* NewResult(const tandem_tensor& like,
                                 tandem_dtype dtype = TANDEM_DTYPE_UNSET);
  const tandem_tensor* Read(const std::string& option, const std::string& path,
                            const std::string& dtype);

  tandem_gradients gradients_ = TANDEM_GRADIENTS_INIT;
  std::deque<Buffer> buffers_;
  std::deque<tandem_tensor> tensors_;
  std::deque<Buffer*> results_;
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_GRADIENTS_H_
