#include "training/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>

namespace gateloop::training {
namespace {

using std::chrono::duration;
using std::chrono::steady_clock;

constexpr duration<double> kRedraw{0.2};
constexpr duration<double> kLineEvery{10.0};
// A bar shows the running mean of about this many updates; single batches jump by 0.2 bits.
constexpr double kMemory = 20;

int terminal_columns() {
  struct winsize size {};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string bar(double fraction, int cells) {
  const int full = static_cast<int>(fraction * cells);
  std::string text(static_cast<std::size_t>(cells), '.');
  std::fill_n(text.begin(), std::clamp(full, 0, cells), '#');
  return "[" + text + "] ";
}

}  // namespace

std::string clock_text(double seconds) {
  const auto total = static_cast<long long>(std::llround(std::max(seconds, 0.0)));
  char text[48];
  if (total >= 3600) {
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", total / 3600, total / 60 % 60,
                  total % 60);
  } else {
    std::snprintf(text, sizeof text, "%lld:%02lld", total / 60, total % 60);
  }
  return text;
}

Progress::Progress(bool shown)
    : shown_(shown), terminal_(::isatty(STDOUT_FILENO) == 1), last_shown_(steady_clock::now()) {}

bool Progress::due() const {
  return steady_clock::now() - last_shown_ >= (terminal_ ? kRedraw : kLineEvery);
}

void Progress::update(const StepMetrics& metrics, std::optional<std::int64_t> steps,
                      std::optional<double> seconds_left) {
  ++updates_;
  const double weight = 1 / std::min(static_cast<double>(updates_), kMemory);
  smoothed_bits_ += weight * (metrics.train_bits_per_byte - smoothed_bits_);
  smoothed_tokens_per_second_ += weight * (metrics.tokens_per_second - smoothed_tokens_per_second_);
  if (!shown_ || !due()) return;
  last_shown_ = steady_clock::now();

  char figures[160];
  std::snprintf(figures, sizeof figures,
                "step %lld/%s  loss %.3f  %.3f bits/byte  lr %.2e  %.1fk tokens/s  ",
                static_cast<long long>(metrics.step), steps ? std::to_string(*steps).c_str() : "?",
                smoothed_bits_ * std::numbers::ln2, smoothed_bits_, metrics.learning_rate,
                smoothed_tokens_per_second_ / 1e3);
  std::string line = figures;
  line += seconds_left ? clock_text(*seconds_left) + " left" : "length not planned yet";
  if (!terminal_) {
    std::puts(line.c_str());
    std::fflush(stdout);
    return;
  }
  const int room = terminal_columns() - static_cast<int>(line.size()) - 4;
  if (steps && room >= 10) {
    line =
        bar(static_cast<double>(metrics.step) / static_cast<double>(*steps), std::min(room, 30)) +
        line;
  }
  line.resize(std::min<std::size_t>(line.size(), static_cast<std::size_t>(terminal_columns() - 1)));
  std::printf("\r%s\033[K", line.c_str());
  std::fflush(stdout);
  bar_shown_ = true;
}

void Progress::clear() {
  if (bar_shown_) std::printf("\r\033[K");
  bar_shown_ = false;
}

void Progress::say(const std::string& line) {
  if (!shown_) return;
  clear();
  std::puts(line.c_str());
  std::fflush(stdout);
}

}  // namespace gateloop::training
