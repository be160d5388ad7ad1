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

struct Lines {
  std::string text;
  std::int64_t last_step = 0;
};

/// The lines up to and with `step`, in order.
Lines lines_until(const std::filesystem::path& path, std::int64_t step) {
  std::istringstream lines(model::read_text(path));
  Lines kept;
  for (std::string line; std::getline(lines, line);) {
    const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
    // What does not parse was being written when the machine stopped: the last line.
    if (!object.is_object()) break;
    const auto found = object.find("step");
    if (found == object.end() || !found->is_number_integer() || *found > step) break;
    kept.text += line + '\n';
    kept.last_step = *found;
  }
  return kept;
}

void add_transitions(json& object, const std::string& prefix,
                     const std::optional<TransitionDiagnostics>& transitions) {
  if (!transitions) return;
  object[prefix + "transition_magnitude"] = transitions->magnitudes;
  object[prefix + "half_life"] = transitions->half_lives;  // null where infinite
  if (transitions->phases) object[prefix + "transition_phase"] = *transitions->phases;
}

json to_json(const LayerDiagnostics& layer) {
  json object = {{"gradient_norm", layer.gradient_norm},
                 {"update_norm", layer.update_norm},
                 {"weight_norm", layer.weight_norm},
                 {"inactive_units", layer.inactive_units}};
  add_transitions(object, "", layer.transitions);
  add_transitions(object, "simple_", layer.simple_transitions);
  return object;
}

json to_json(const Diagnostics& layers) {
  json object = {{"quantiles", kQuantiles}, {"layers", json::array()}};
  for (const LayerDiagnostics& layer : layers) object["layers"].push_back(to_json(layer));
  return object;
}

void add_sample(json& object, const std::optional<Sample>& sample) {
  if (!sample) return;
  object["sample_prime"] = sample->prime;
  object["sample"] = sample->text;
}

std::string one_line(const json& object) {
  constexpr int kOneLine = -1;
  return object.dump(kOneLine, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace) + '\n';
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
  add_sample(object, metrics.sample);
  if (metrics.diagnostics) object["diagnostics"] = to_json(*metrics.diagnostics);
  return one_line(object);
}

std::string finished_line(const std::string& line, const FinalMetrics& end) {
  json object = json::parse(line);
  object["elapsed_seconds"] = end.elapsed_seconds;
  object["final_validation_bits_per_byte"] = end.validation_bits_per_byte;
  add_sample(object, end.sample);
  return one_line(object);
}

MetricsLog::MetricsLog(std::filesystem::path path, std::int64_t step) : path_(std::move(path)) {
  if (std::filesystem::exists(path_)) {
    const Lines kept = lines_until(path_, step);
    model::save_text(path_, kept.text);
    resumed_step_ = kept.last_step;
  }
  file_ =
      model::FileDescriptor(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  if (file_.get() < 0) fail(path_, "open");
}

void MetricsLog::append(const std::string& line) {
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
