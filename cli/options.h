// The command's options as given: strings and numbers, not yet read or checked against each other.
#ifndef TANDEM_CLI_OPTIONS_H_
#define TANDEM_CLI_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tandem/tandem.h"

namespace CLI {
class App;
}

namespace tandem::cli {

// Names are those of the options; "" means not given.
struct MaskOptions {
  std::string mask;
  std::string causal;
  std::string window;
  std::string prefix;
  std::string row_ranges;
  std::string q_lengths;
  std::string kv_lengths;
  std::string block_size;
  std::string blocks;
  std::string q_segments;
  std::string kv_segments;
  std::string cu_seqlens_q;
  std::string cu_seqlens_k;
};

struct ProblemOptions {
  std::string q;  // a file, or for explain and mask a shape
  std::string k;
  std::string v;
  std::string kv;     // a shape
  std::string shape;  // B,Hq,Hk,Sq,Sk,D
  std::string dtype;
  uint64_t data_seed = 0;
  std::string layout;
  MaskOptions mask;
  std::string bias;
  std::optional<float> scale;
  float softcap = 0;
  float dropout = 0;
  uint64_t dropout_seed = 0;
  std::string sink;
  std::string alibi;
  std::string alibi_align;
};

struct DeviceOptions {
  std::string device = "auto";
  std::string kernel;
  int threads = 0;
  int repeat = 0;  // 0: as many as fit a few seconds, at most 5
};

struct BackwardOptions {
  std::string dout, dlse;                        // read
  std::string dq, dk, dv, dbias, dsink, dalibi;  // written
  bool HasOutput() const { return !(dq + dk + dv + dbias + dsink + dalibi).empty(); }
};

struct OutputOptions {
  std::string out;
  std::string lse;
};

void AddMaskOptions(CLI::App* command, MaskOptions* options);
// Shapes only (explain, mask): --q and --kv, or --shape.
void AddShapeOptions(CLI::App* command, ProblemOptions* options);
// Data (run, compare): --q, --k, --v files, or --shape.
void AddDataOptions(CLI::App* command, ProblemOptions* options);
// Everything else of a problem but the mask.
void AddScoreOptions(CLI::App* command, ProblemOptions* options);
void AddDeviceOptions(CLI::App* command, DeviceOptions* options);
void AddMeasureOptions(CLI::App* command, DeviceOptions* options);
void AddBackwardOptions(CLI::App* command, BackwardOptions* options);

// The library's options; the strings must outlive them.
tandem_options LibraryOptions(const DeviceOptions& options);
const char* DeviceName(tandem_device_type type);

// "1,32,8192,128". Throws BadInput, naming the option.
std::vector<int64_t> ParseNumbers(const std::string& option, const std::string& text);
tandem_alignment ParseAlignment(const std::string& option, const std::string& text);
// Throws BadInput where the value does not fit 32 bits.
int32_t NarrowToInt32(const std::string& option, int64_t value);
// Throws BadInput where only one of two options is given.
void NeedBoth(const std::string& a, const std::string& name_a, const std::string& b,
              const std::string& name_b);

}  // namespace tandem::cli

#endif  // TANDEM_CLI_OPTIONS_H_
