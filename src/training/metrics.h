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
  std::optional<double> final_validation_bits_per_byte;
  std::optional<Sample> sample;
  std::optional<Diagnostics> diagnostics;
};

/// In ASCII, with the newline: no character of a sample is a line's end to any reader.
std::string to_json_line(const StepMetrics& metrics);

/// metrics.jsonl, appended to. Each line is one write: a kill leaves whole lines.
class MetricsLog {
 public:
  /// Drops what an earlier run wrote after `step` updates.
  MetricsLog(std::filesystem::path path, std::int64_t step);

  void append(const StepMetrics& metrics);
  /// Everything written so far is on the disk.
  void flush();

 private:
  std::filesystem::path path_;
  model::FileDescriptor file_;
};

}  // namespace gateloop::training
