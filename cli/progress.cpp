#include "cli/progress.h"

#include <unistd.h>

#include <cstdio>

namespace tandem::cli {
namespace {

constexpr std::chrono::milliseconds kTerminalPeriod{100};
constexpr std::chrono::seconds kSilence{2};
constexpr std::chrono::seconds kLogPeriod{10};

}  // namespace

Progress::Progress() : on_terminal_(isatty(STDERR_FILENO) != 0), begin_(Clock::now()) {
  next_ = begin_ + (on_terminal_ ? Clock::duration(kTerminalPeriod) : Clock::duration(kSilence));
}

Progress::~Progress() { Finish(); }

void Progress::Finish() {
  if (on_terminal_ && line_shown_) fputs("\r\033[K", stderr);
  line_shown_ = false;
}

void Progress::Step(const std::string& text) {
  text_ = text;
  percent_ = -1;
  Show();
}

void Progress::Update(double part) {
  percent_ = static_cast<int>(part * 100);
  Show();
}

void Progress::Show() {
  const Clock::time_point now = Clock::now();
  if (now < next_) return;
  next_ = now + (on_terminal_ ? Clock::duration(kTerminalPeriod) : Clock::duration(kLogPeriod));
  line_shown_ = true;
  std::string line = text_;
  if (percent_ >= 0) line.append(" ").append(std::to_string(percent_)).append(" %");
  if (on_terminal_) {
    fprintf(stderr, "\r\033[K%s", line.c_str());
    fflush(stderr);
  } else {
    const std::chrono::duration<double> elapsed = now - begin_;
    fprintf(stderr, "[%.0f s] %s\n", elapsed.count(), line.c_str());
  }
}

}  // namespace tandem::cli
