// The `tandem` command: attention on .npy files, on the library's public interface.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <new>

#include "cli/commands/commands.h"
#include "cli/errors.h"
#include "cli/report.h"

namespace tandem::cli {
namespace {

constexpr const char* kFooter =
    "Exit codes: 0; 1 (compare) a result is out of contract; 2 bad usage or input, nothing is "
    "written;\n3 the asked-for device or kernel cannot serve, with the reason.\n"
    "Times are medians; on cuda they include the copies of the arrays there and back.";

struct Commands {
  bool info_json = false;
  ExplainOptions explain;
  RunOptions run;
  CompareOptions compare;
  DrawOptions mask;
  std::function<int()> chosen;
};

void AddJson(CLI::App* command, bool* json) {
  command->add_flag("--json", *json, "one JSON object on stdout");
}

void AddCommands(CLI::App* app, Commands* c) {
  CLI::App* info = app->add_subcommand("info", "devices, kernels, why one is absent");
  AddJson(info, &c->info_json);
  info->callback([c] { c->chosen = [c] { return Info(c->info_json); }; });

  CLI::App* explain =
      app->add_subcommand("explain", "which kernel would serve, and why each other would not");
  AddShapeOptions(explain, &c->explain.problem);
  AddScoreOptions(explain, &c->explain.problem);
  AddMaskOptions(explain, &c->explain.problem.mask);
  AddDeviceOptions(explain, &c->explain.device);
  AddJson(explain, &c->explain.json);
  explain->callback([c] { c->chosen = [c] { return Explain(c->explain); }; });

  CLI::App* run = app->add_subcommand("run", "attention of arrays");
  AddDataOptions(run, &c->run.problem);
  AddScoreOptions(run, &c->run.problem);
  AddMaskOptions(run, &c->run.problem.mask);
  AddDeviceOptions(run, &c->run.device);
  AddMeasureOptions(run, &c->run.device);
  run->add_option("--out", c->run.out, "the output, in the type of q")
      ->type_name("FILE")
      ->required();
  run->add_option("--lse", c->run.lse, "float32 [B, H, S] ([H, T] packed), written")
      ->type_name("FILE");
  AddBackwardOptions(run, &c->run.backward);
  AddJson(run, &c->run.json);
  run->callback([c] { c->chosen = [c] { return Run(c->run); }; });

  CLI::App* compare = app->add_subcommand(
      "compare", "every kernel that accepts, on every device, beside an f64 oracle");
  AddDataOptions(compare, &c->compare.problem);
  AddScoreOptions(compare, &c->compare.problem);
  AddMaskOptions(compare, &c->compare.problem.mask);
  AddDeviceOptions(compare, &c->compare.device);
  AddMeasureOptions(compare, &c->compare.device);
  compare->add_flag("--backward", c->compare.backward,
                    "the gradients too, of a random gradient of the output");
  AddJson(compare, &c->compare.json);
  compare->callback([c] { c->chosen = [c] { return Compare(c->compare); }; });

  CLI::App* mask = app->add_subcommand("mask", "a mask drawn: tiles, empty rows, sparsity");
  AddShapeOptions(mask, &c->mask.problem);
  AddMaskOptions(mask, &c->mask.problem.mask);
  mask->add_option("--sequence", c->mask.sequence, "the one to draw; default 0")->type_name("B");
  mask->add_option("--head", c->mask.head, "the one to draw; default 0")->type_name("H");
  mask->add_flag("--ascii", c->mask.ascii, "no block characters");
  CLI::Option* svg = mask->add_option("--svg", c->mask.svg, "draw into a file")->type_name("FILE");
  mask->add_option("--png", c->mask.png, "draw into a file")->type_name("FILE")->excludes(svg);
  mask->callback([c] { c->chosen = [c] { return Mask(c->mask); }; });
}

int Main(int argc, char** argv) {
  CLI::App app("Masked attention on CPUs and NVIDIA GPUs, with one definition of masking.",
               "tandem");
  app.set_version_flag("--version", tandem_version());
  app.require_subcommand(1);
  app.footer(kFooter);
  Commands commands;
  AddCommands(&app, &commands);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitBadInput;
  }
  try {
    const int code = commands.chosen();
    FlushStdout();
    return code;
  } catch (const BadInput& error) {
    fprintf(stderr, "tandem: %s\n", error.what());
    return kExitBadInput;
  } catch (const CannotServe& error) {
    fprintf(stderr, "tandem: %s\n", error.what());
    return kExitCannotServe;
  } catch (const std::bad_alloc&) {
    fprintf(stderr, "tandem: there is not enough memory for these sizes\n");
    return kExitBadInput;
  }
}

}  // namespace
}  // namespace tandem::cli

int main(int argc, char** argv) { return tandem::cli::Main(argc, argv); }
