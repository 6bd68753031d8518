#include "cli/options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <limits>

#include "cli/errors.h"

namespace tandem::cli {

void AddMaskOptions(CLI::App* command, MaskOptions* o) {
  const char* group = "Mask (every term given must allow a pair; arrays are .npy files)";
  const auto add = [&](const char* name, std::string* value, const char* help, const char* type) {
    command->add_option(name, *value, help)->group(group)->type_name(type);
  };
  add("--mask", &o->mask, "bool, true is visible; broadcastable to [B, H, Sq, Sk]", "FILE");
  add("--causal", &o->causal, "keys up to the query: top_left or bottom_right", "ALIGN");
  add("--window", &o->window, "keys from L before to R after the query; -1 is unbounded",
      "L,R,ALIGN");
  add("--prefix", &o->prefix, "int32 [B|1]: keys before it are exempt from the one band given",
      "FILE");
  add("--row-ranges", &o->row_ranges, "int32 [B|1, H|1, Sq|1, R, 2]: half-open key intervals",
      "FILE");
  add("--q-lengths", &o->q_lengths, "int32 [B]: rows that are there", "FILE");
  add("--kv-lengths", &o->kv_lengths, "int32 [B]: keys that are there", "FILE");
  add("--block-size", &o->block_size, "rows and keys of a block of --blocks", "M,N");
  add("--blocks", &o->blocks, "bool [B|1, H|1, ceil(Sq/M), ceil(Sk/N)]: visible blocks", "FILE");
  add("--q-segments", &o->q_segments, "int32 [B|1, Sq]: visible where equal and >= 0", "FILE");
  add("--kv-segments", &o->kv_segments, "int32 [B|1, Sk]", "FILE");
  add("--cu-seqlens-q", &o->cu_seqlens_q,
      "int32 or int64 [B + 1]: packed sequences; tensors are [T, H, D]", "FILE");
  add("--cu-seqlens-k", &o->cu_seqlens_k, "int32 or int64 [B + 1]", "FILE");
}

namespace {

void AddShapeOption(CLI::App* command, ProblemOptions* o) {
  command
      ->add_option("--shape", o->shape,
                   "sizes instead of --q; packed: Sq and Sk are all rows, B is 1")
      ->type_name("B,Hq,Hk,Sq,Sk,D");
  command->add_option("--layout", o->layout, "bhsd: [B, H, S, D] (default), or bshd: [B, S, H, D]")
      ->type_name("LAYOUT");
}

}  // namespace

void AddShapeOptions(CLI::App* command, ProblemOptions* o) {
  command->add_option("--q", o->q, "shape of q")->type_name("B,Hq,Sq,D");
  command->add_option("--kv", o->kv, "shape of k and v")->type_name("B,Hk,Sk,D");
  AddShapeOption(command, o);
}

void AddDataOptions(CLI::App* command, ProblemOptions* o) {
  command->add_option("--q", o->q, "queries")->type_name("FILE");
  command->add_option("--k", o->k, "keys")->type_name("FILE");
  command->add_option("--v", o->v, "values")->type_name("FILE");
  AddShapeOption(command, o);
  command
      ->add_option("--data-seed", o->data_seed,
                   "with --shape: q, k, v are drawn in this order from N(0, 1) by "
                   "std::mt19937_64(seed) and Box-Muller")
      ->type_name("N");
}

void AddScoreOptions(CLI::App* command, ProblemOptions* o) {
  command
      ->add_option("--dtype", o->dtype,
                   "f32, f16 or bf16, of --shape; bf16 also: uint16 files are bf16")
      ->type_name("TYPE");
  const char* group = "Scores";
  command->add_option("--bias", o->bias, "added to the scores; broadcastable to [B, H, Sq, Sk]")
      ->group(group)
      ->type_name("FILE");
  command->add_option("--scale", o->scale, "factor of q k^T; 1/sqrt(D) when not given")
      ->group(group)
      ->type_name("X");
  command->add_option("--softcap", o->softcap, "s = softcap * tanh(s / softcap)")
      ->group(group)
      ->type_name("X");
  command->add_option("--dropout", o->dropout, "rate, in [0, 1)")->group(group)->type_name("P");
  command->add_option("--dropout-seed", o->dropout_seed, "key of Philox")
      ->group(group)
      ->type_name("N");
  command->add_option("--sink", o->sink, "float32 [Hq]: one more score per row")
      ->group(group)
      ->type_name("FILE");
  command->add_option("--alibi", o->alibi, "float32 [Hq] or [B, Hq]: slopes")
      ->group(group)
      ->type_name("FILE");
  command->add_option("--alibi-align", o->alibi_align, "top_left or bottom_right")
      ->group(group)
      ->type_name("ALIGN");
}

void AddDeviceOptions(CLI::App* command, DeviceOptions* o) {
  command->add_option("--device", o->device, "auto (default), cpu or cuda")->type_name("DEVICE");
  command
      ->add_option("--kernel", o->kernel,
                   "the one kernel to use, with gradients for them; `tandem info` lists all")
      ->type_name("NAME");
}

void AddMeasureOptions(CLI::App* command, DeviceOptions* o) {
  command->add_option("--threads", o->threads, "CPU threads; 0 (default): OpenMP's choice")
      ->type_name("N");
  command
      ->add_option("--repeat", o->repeat,
                   "timed runs, after one that is not counted; default: 5, fewer when slow")
      ->type_name("N")
      ->check(CLI::Range(1, 1000000));
}

void AddBackwardOptions(CLI::App* command, BackwardOptions* o) {
  const char* group = "Backward pass, with --dout";
  const auto add = [&](const char* name, std::string* value, const char* help) {
    command->add_option(name, *value, help)->group(group)->type_name("FILE");
  };
  add("--dout", &o->dout, "gradient of out, read");
  add("--dlse", &o->dlse, "gradient of lse, read");
  add("--dq", &o->dq, "gradients, written");
  add("--dk", &o->dk, "");
  add("--dv", &o->dv, "");
  add("--dbias", &o->dbias, "");
  add("--dsink", &o->dsink, "");
  add("--dalibi", &o->dalibi, "");
}

tandem_options LibraryOptions(const DeviceOptions& o) {
  tandem_options options = TANDEM_OPTIONS_INIT;
  if (o.device == "auto") {
    options.device_type = TANDEM_DEVICE_AUTO;
  } else if (o.device == "cpu") {
    options.device_type = TANDEM_DEVICE_CPU;
  } else if (o.device == "cuda") {
    options.device_type = TANDEM_DEVICE_CUDA;
  } else {
    throw BadInput("--device is '" + o.device + "'; it may be auto, cpu or cuda");
  }
  options.threads = o.threads;
  if (!o.kernel.empty()) options.kernel = o.kernel.c_str();
  return options;
}

const char* DeviceName(tandem_device_type type) {
  return type == TANDEM_DEVICE_CUDA ? "cuda" : "cpu";
}

std::vector<int64_t> ParseNumbers(const std::string& option, const std::string& text) {
  std::vector<int64_t> numbers;
  const char* position = text.data();
  const char* const end = text.data() + text.size();
  while (true) {
    int64_t number = 0;
    const std::from_chars_result result = std::from_chars(position, end, number);
    if (result.ec != std::errc()) break;
    numbers.push_back(number);
    if (result.ptr == end) return numbers;
    if (*result.ptr != ',') break;
    position = result.ptr + 1;
  }
  throw BadInput(option + " is '" + text + "'; it must be whole numbers with commas between");
}

tandem_alignment ParseAlignment(const std::string& option, const std::string& text) {
  if (text == "top_left") return TANDEM_ALIGN_TOP_LEFT;
  if (text == "bottom_right") return TANDEM_ALIGN_BOTTOM_RIGHT;
  throw BadInput(option + " is '" + text + "'; it may be top_left or bottom_right");
}

int32_t NarrowToInt32(const std::string& option, int64_t value) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw BadInput(option + " holds " + std::to_string(value) + ", which is beyond 32 bits");
  }
  return static_cast<int32_t>(value);
}

void NeedBoth(const std::string& a, const std::string& name_a, const std::string& b,
              const std::string& name_b) {
  if (a.empty() != b.empty()) throw BadInput(name_a + " and " + name_b + " go together");
}

}  // namespace tandem::cli
