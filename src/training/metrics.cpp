#include "training/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <system_error>

#include "gateloop/checkpoint.h"

namespace gateloop::training {
namespace {

using json = nlohmann::ordered_json;

[[noreturn]] void fail(const std::filesystem::path& path, const char* action) {
  throw std::runtime_error(path.string() + ": cannot " + action + ": " +
                           std::generic_category().message(errno));
}

/// The lines up to and with `step`, in order.
std::string lines_until(const std::filesystem::path& path, std::int64_t step) {
  std::istringstream lines(model::read_text(path));
  std::string kept;
  for (std::string line; std::getline(lines, line);) {
    const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
    // What does not parse was being written when the machine stopped: the last line.
    if (!object.is_object()) break;
    const auto found = object.find("step");
    if (found == object.end() || !found->is_number_integer() || *found > step) break;
    kept += line + '\n';
  }
  return kept;
}

json to_json(const LayerDiagnostics& layer) {
  json object = {{"gradient_norm", layer.gradient_norm},
                 {"update_norm", layer.update_norm},
                 {"weight_norm", layer.weight_norm},
                 {"inactive_units", layer.inactive_units}};
  if (const auto& transitions = layer.transitions) {
    object["transition_magnitude"] = transitions->magnitudes;
    object["half_life"] = transitions->half_lives;  // null where infinite
    if (transitions->phases) object["transition_phase"] = *transitions->phases;
  }
  return object;
}

json to_json(const Diagnostics& layers) {
  json object = {{"quantiles", kQuantiles}, {"layers", json::array()}};
  for (const LayerDiagnostics& layer : layers) object["layers"].push_back(to_json(layer));
  return object;
}

}  // namespace

std::string to_json_line(const StepMetrics& metrics) {
  json object = {{"step", metrics.step},
                 {"train_bits_per_byte", metrics.train_bits_per_byte},
                 {"learning_rate", metrics.learning_rate},
                 {"gradient_norm", metrics.gradient_norm},
                 {"tokens_per_second", metrics.tokens_per_second},
                 {"elapsed_seconds", metrics.elapsed_seconds}};
  if (metrics.planned_steps) object["planned_steps"] = *metrics.planned_steps;
  if (metrics.validation_bits_per_byte) {
    object["validation_bits_per_byte"] = *metrics.validation_bits_per_byte;
  }
  if (metrics.final_validation_bits_per_byte) {
    object["final_validation_bits_per_byte"] = *metrics.final_validation_bits_per_byte;
  }
  if (metrics.sample) {
    object["sample_prime"] = metrics.sample->prime;
    object["sample"] = metrics.sample->text;
  }
  if (metrics.diagnostics) object["diagnostics"] = to_json(*metrics.diagnostics);
  constexpr int kOneLine = -1;
  return object.dump(kOneLine, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace) + '\n';
}

MetricsLog::MetricsLog(std::filesystem::path path, std::int64_t step) : path_(std::move(path)) {
  if (std::filesystem::exists(path_)) model::save_text(path_, lines_until(path_, step));
  file_ =
      model::FileDescriptor(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  if (file_.get() < 0) fail(path_, "open");
}

void MetricsLog::append(const StepMetrics& metrics) {
  const std::string line = to_json_line(metrics);
  for (std::size_t done = 0; done < line.size();) {
    const ssize_t written = ::write(file_.get(), line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, "write");
    done += static_cast<std::size_t>(written);
  }
}

void MetricsLog::flush() {
  if (::fdatasync(file_.get()) != 0) fail(path_, "flush to the disk");
}

}  // namespace gateloop::training
