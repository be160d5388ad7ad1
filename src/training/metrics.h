#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "gateloop/training.h"
#include "model/file.h"
#include "training/diagnostics.h"

namespace gateloop::training {

/// One line of metrics.jsonl.
struct StepMetrics {
  std::int64_t step = 0;  ///< updates made, this one included
  double train_bits_per_byte = 0;
  double learning_rate = 0;
  double gradient_norm = 0;                   ///< before clipping
  double tokens_per_second = 0;               ///< of this update alone
  double elapsed_seconds = 0;                 ///< of training, over all resumptions
  std::optional<std::int64_t> planned_steps;  ///< where the planned length changes here
  std::optional<double> validation_bits_per_byte;
  std::optional<Sample> sample;
  std::optional<Diagnostics> diagnostics;
};

/// What the last line of a finished run has besides.
struct FinalMetrics {
  double elapsed_seconds = 0;
  double validation_bits_per_byte = 0;
  std::optional<Sample> sample;
};

/// In ASCII, with the newline: no character of a sample is a line's end to any reader.
std::string to_json_line(const StepMetrics& metrics);
/// `line`, of the run's last update, with what it ended with.
std::string finished_line(const std::string& line, const FinalMetrics& end);

/// metrics.jsonl, appended to. Each line is one write: a kill leaves whole lines.
class MetricsLog {
 public:
  /// Drops what an earlier run wrote after `step` updates.
  MetricsLog(std::filesystem::path path, std::int64_t step);

  void append(const std::string& line);
  /// Everything written so far is on the disk.
  void flush();
  /// The step of the last line that an earlier run wrote; 0 without one.
  std::int64_t resumed_step() const { return resumed_step_; }

 private:
  std::filesystem::path path_;
  std::int64_t resumed_step_ = 0;
  model::FileDescriptor file_;
};

}  // namespace gateloop::training
