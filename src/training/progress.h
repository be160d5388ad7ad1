#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "training/metrics.h"

namespace gateloop::training {

/// The progress of a run on standard output: a bar that redraws itself on a terminal, a line
/// every few seconds elsewhere.
class Progress {
 public:
  /// Not shown: prints nothing.
  explicit Progress(bool shown);

  /// After every update. `steps` is unknown before the first estimate of --minutes.
  void update(const StepMetrics& metrics, std::optional<std::int64_t> steps,
              std::optional<double> seconds_left);
  /// A line that stays.
  void say(const std::string& line);
  /// Removes the bar, so that others can print.
  void clear();

 private:
  bool due() const;

  bool shown_;
  bool terminal_;
  bool bar_shown_ = false;
  double smoothed_bits_ = 0;
  double smoothed_tokens_per_second_ = 0;
  std::int64_t updates_ = 0;
  std::chrono::steady_clock::time_point last_shown_;
};

/// 83.4 -> "1:23"; from an hour on, "1:02:03".
std::string clock_text(double seconds);

}  // namespace gateloop::training
