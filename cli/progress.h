// What the command is doing, on stderr, for work that takes long: at once on a terminal, else only
// after two seconds and then rarely. Never on stdout.
#ifndef TANDEM_CLI_PROGRESS_H_
#define TANDEM_CLI_PROGRESS_H_

#include <chrono>
#include <string>

namespace tandem::cli {

class Progress {
 public:
  Progress();
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // A new step, "flash_cpu.avx2.f32: run 2 of 5".
  void Step(const std::string& text);
  // The part of the step that is done, in [0, 1].
  void Update(double part);
  // Clears the line: stdout may be the same terminal.
  void Finish();

 private:
  using Clock = std::chrono::steady_clock;
  void Show();

  bool on_terminal_;
  bool line_shown_ = false;
  Clock::time_point begin_;
  Clock::time_point next_;
  std::string text_;
  int percent_ = -1;
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_PROGRESS_H_
