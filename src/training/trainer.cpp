#include "training/trainer.h"

#include <ATen/ops/_foreach_norm.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <stdexcept>
#include <vector>

#include "gateloop/checkpoint.h"
#include "model/config_file.h"
#include "model/file.h"
#include "nn/autocast.h"
#include "training/device.h"
#include "training/diagnostics.h"
#include "training/files.h"
#include "training/memory.h"
#include "training/packed_rows.h"

namespace gateloop::training {
namespace {

/// Of an option that is bfloat16 or something else.
torch::ScalarType scalar_type(const std::string& name) {
  return name == "bfloat16" ? torch::kBFloat16 : torch::kFloat32;
}

/// Windows of the last validation, as a multiple of those of the others.
double final_share(const Corpus& corpus, const TrainingOptions& options) {
  const std::int64_t windows = window_count(corpus.valid(), options.length);
  return static_cast<double>(std::min(windows, options.final_windows)) /
         static_cast<double>(std::min(windows, options.validation_windows));
}

}  // namespace

Trainer::Trainer(RunConfig config, nn::Transformer model, const Corpus& corpus,
                 const std::filesystem::path& dir, const SampleCallback& sample, Clock clock,
                 distributed::Communicator communicator)
    : config_(std::move(config)),
      corpus_(corpus),
      dir_(dir),
      sample_(sample),
      communicator_(std::move(communicator)),
      model_(std::move(model)),
      device_(device_of(model_)),
      optimizer_(*model_, options_, communicator_),
      batches_(corpus.train(), options_.length, options_.seed),
      position_(take_up(dir_ / kStateFile, *model_, optimizer_, communicator_)),
      reduction_(communicator_, model_->parameters(), scalar_type(options_.gradient_compression),
                 [this] { loss(model_, moved(batches_.at(0, 0, 1), device_)).backward(); }),
      replicas_(model_, replica_count()),
      budget_(options_, final_share(corpus, options_)),
      progress_(communicator_.is_main()),
      clock_(std::move(clock)),
      since_start_(clock_) {
  // config.json may be ahead of the state by some estimates.
  if (estimates()) options_.plan = position_.plan;
  elapsed_before_ = position_.elapsed_seconds;
  first_step_ = position_.step;
  if (config_.id.empty()) config_.id = model::config_id(config_.model);
  config_.provenance.push_back(checkpoint::provenance(communicator_.size()));
  // From here on the directory is a run: what it needs to be resumed lies in it.
  if (communicator_.is_main()) model::save_text(dir_ / kConfigFile, to_json(config_));
}

void Trainer::introduce() {
  std::int64_t parameters = 0;
  for (const torch::Tensor& parameter : model_->parameters()) parameters += parameter.numel();
  char line[200];
  std::snprintf(
      line, sizeof line, "Model of %.2f M parameters in %s; %lld x %lld bytes a step; %s on %s",
      static_cast<double>(parameters) / 1e6, dir_.string().c_str(), static_cast<long long>(rows()),
      static_cast<long long>(options_.length), options_.dtype.c_str(),
      device_.is_cpu() ? (std::to_string(options_.threads) + " threads").c_str()
                       : device_.str().c_str());
  progress_.say(line);
  if (communicator_.size() > 1) {
    progress_.say(std::to_string(communicator_.size()) + " processes share each step");
  }
  if (position_.step > 0) {
    progress_.say("Going on after step " + std::to_string(position_.step));
  }
}

void Trainer::fail_not_finite(const std::string& what, std::int64_t step) const {
  throw std::runtime_error(what + " is not finite at step " + std::to_string(step) + ": stopped; " +
                           (std::filesystem::exists(dir_ / kStateFile)
                                ? "the last checkpoint in " + dir_.string() + " is whole"
                                : "no checkpoint had been saved yet") +
                           ". Try a lower learning rate.");
}

/// One where processes share a step: their gradients travel while the backward pass runs.
std::int64_t Trainer::replica_count() const {
  if (communicator_.size() > 1 || !device_.is_cpu()) return 1;
  return choose_replicas(config_, rows_per_pass());
}

/// ids (B, T + 1) -> the mean loss of their bytes but the first of each row.
torch::Tensor Trainer::loss(nn::Transformer& model, const torch::Tensor& ids) {
  const nn::Autocast autocast(device_.type(), scalar_type(options_.dtype));
  return next_byte_loss(model, ids, corpus_.separator(), at::Reduction::Mean);
}

/// Computes the gradient of the mean loss over all rows of the step, summed over processes. Returns
/// this process's part of that loss in nats.
double Trainer::backward() {
  const auto [first, last] = communicator_.part_of(rows());
  const torch::Tensor ids =
      moved(batches_.at(position_.step, first, last), device_);  // (last - first, T + 1) int64
  // A pass is one part for each replica.
  const std::vector<torch::Tensor> parts = ids.split(rows_per_pass() / replicas_.count());
  const auto count = static_cast<std::int64_t>(parts.size());
  // The mean over all rows is the sum over parts of their means divided by this.
  const auto parts_of_step = [this](const torch::Tensor& part) {
    return static_cast<double>(rows()) / static_cast<double>(part.size(0));
  };
  std::vector<torch::Tensor> losses(parts.size());  // ()
  for (std::int64_t begin = 0; begin < count; begin += replicas_.count()) {
    replicas_.for_each(std::min(replicas_.count(), count - begin),
                       [&](nn::Transformer& model, std::int64_t i) {
                         const auto index = static_cast<std::size_t>(begin + i);
                         const torch::Tensor loss = this->loss(model, parts[index]);
                         losses[index] = loss.detach();
                         if (index + 1 == parts.size()) reduction_.prepare();
                         const double divisor = parts_of_step(parts[index]);
                         (divisor == 1 ? loss : loss / divisor).backward();
                       });
  }
  replicas_.gather_gradients();
  reduction_.finish();
  // Read once all passes are queued: on a GPU reading waits for the work before it.
  double nats = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    nats += losses[i].item<double>() / parts_of_step(parts[i]);
  }
  return nats;
}

/// One update: gradient, clipping, Adam.
StepMetrics Trainer::update() {
  const Stopwatch stopwatch(clock_);
  StepMetrics metrics;
  metrics.step = position_.step + 1;
  const double part = backward();
  // The norm is that of process 0: of equal gradients, processors of other kinds have other norms.
  const auto shared = communicator_.gather({part, optimizer_.gradient_norm()});
  double nats = 0;
  for (const auto& of_process : shared) nats += of_process[0];
  metrics.train_bits_per_byte = nats / std::numbers::ln2;
  metrics.learning_rate = learning_rate(options_, position_.step);
  metrics.gradient_norm = shared.front()[1];
  if (!std::isfinite(nats)) fail_not_finite("the loss", metrics.step);
  if (!std::isfinite(metrics.gradient_norm)) fail_not_finite("the gradient norm", metrics.step);
  const bool diagnosed = communicator_.is_main() && due(options_.diagnostics_every, metrics.step);
  std::optional<UpdateDiagnosis> diagnosis;
  if (diagnosed) diagnosis.emplace(model_);
  optimizer_.step(metrics.learning_rate, metrics.gradient_norm);
  optimizer_.zero_grad();
  ++position_.step;
  const double seconds = stopwatch.seconds();
  budget_.record_step(seconds);
  metrics.tokens_per_second = static_cast<double>(rows() * options_.length) / seconds;
  if (diagnosis) {
    metrics.diagnostics =
        diagnosis->diagnose(corpus_.valid(), options_.length, corpus_.separator());
  }
  return metrics;
}

/// The first process's that has one.
int Trainer::received_signal(const StopSignals& signals) const {
  for (const auto& of_process : communicator_.gather({static_cast<double>(signals.received())})) {
    if (of_process[0] != 0) return static_cast<int>(of_process[0]);
  }
  return 0;
}

/// The length that process 0 estimates, where it is another than was planned.
std::optional<std::int64_t> Trainer::estimated_length() {
  const bool untimed = !budget_.validation_timed();
  if (untimed && communicator_.from_main(budget_.ready() ? 1 : 0) != 0) {
    time_validation_and_saving();
  }
  std::optional<std::int64_t> length;
  if (communicator_.is_main() && budget_.ready()) {
    length = budget_.new_length(position_.step, steps(), elapsed());
  }
  constexpr std::int64_t kUnchanged = -1;
  const auto decided = static_cast<std::int64_t>(
      communicator_.from_main(static_cast<double>(length.value_or(kUnchanged))));
  return decided == kUnchanged ? std::nullopt : std::optional(decided);
}

void Trainer::validate_now(StepMetrics& metrics) {
  const Stopwatch stopwatch(clock_);
  const double bits = validate(options_.validation_windows).bits_per_byte();
  budget_.record_validation(stopwatch.seconds());
  metrics.validation_bits_per_byte = bits;
  const bool best = bits < position_.best_bits_per_byte;
  if (best) {
    position_.best_bits_per_byte = bits;
    position_.best_step = position_.step;
    save_weights(kBestFile);
  }
  char line[96];
  std::snprintf(line, sizeof line, "step %lld  validation %.4f bits/byte%s",
                static_cast<long long>(position_.step), bits, best ? "  (best)" : "");
  progress_.say(line);
}

/// Over evenly spaced windows of the validation part; all of it if it holds no more of them.
Score Trainer::validate(std::int64_t windows) {
  EvaluationOptions evaluation;
  evaluation.length = options_.length;
  evaluation.windows = windows;
  evaluation.separator = corpus_.separator();
  evaluation.dtype = scalar_type(options_.dtype);
  return evaluate_windows(model_, corpus_.valid(), evaluation, communicator_);
}

/// Validates a finished run, whose state is saved, and writes its last line. A validation part of
/// reasonable size is read whole, as `gateloop evaluate` does: the figure to quote.
void Trainer::conclude(std::optional<MetricsLog>& log) {
  final_ = validate(options_.final_windows);
  if (!log || position_.last_line.empty()) return;
  log->append(
      finished_line(position_.last_line, {.elapsed_seconds = elapsed(),
                                          .validation_bits_per_byte = final_.bits_per_byte(),
                                          .sample = sample_now()}));
  log->flush();
}

/// The update may have carried a finite gradient to an infinite weight; such weights shall not
/// replace a good checkpoint, and give no distribution to draw from.
void Trainer::check_weights() const {
  if (std::isfinite(
          torch::stack(at::_foreach_norm(model_->parameters(), 2)).sum().item<double>())) {
    return;
  }
  fail_not_finite("a weight", position_.step);
}

void Trainer::save_checkpoint() {
  const Stopwatch stopwatch(clock_);
  check_weights();
  position_.elapsed_seconds = elapsed();
  position_.plan = options_.plan;
  auto moments = optimizer_.state();
  if (communicator_.is_main()) {
    // Resuming reads the state file alone; the model file after it is for generate and evaluate.
    save_state(dir_ / kStateFile, *model_, std::move(moments), position_);
    save_weights(kLatestFile);
    if (estimates()) model::save_text(dir_ / kConfigFile, to_json(config_));
  }
  budget_.record_checkpoint(stopwatch.seconds());
}

void Trainer::save_weights(const char* file) const {
  if (!communicator_.is_main()) return;
  auto metadata = model::config_metadata(config_.model, config_.id);
  metadata["step"] = std::to_string(position_.step);
  checkpoint::save_safetensors(dir_ / file, {checkpoint::state_dict(*model_), metadata});
}

void Trainer::time_validation_and_saving() {
  progress_.clear();
  const Stopwatch validation(clock_);
  validate(options_.validation_windows);
  budget_.record_validation(validation.seconds());
  // A whole checkpoint waits until the step is in the log; its state file holds three times as much
  // as the model file.
  const Stopwatch writing(clock_);
  save_weights(kLatestFile);
  budget_.record_checkpoint(4 * writing.seconds());
}

/// --minutes: how many steps fit, where that is not what was planned; `metrics` of the update just
/// made shows it.
void Trainer::plan_length(StepMetrics& metrics) {
  if (estimates()) {
    const auto length = estimated_length();
    if (length && options_.plan.empty()) {
      char line[96];
      std::snprintf(line, sizeof line, "%g minutes are about %lld steps on this machine",
                    *options_.minutes, static_cast<long long>(*length));
      progress_.say(line);
    }
    if (length) options_.plan.push_back({position_.step, *length});
  }
  for (const PlannedLength& planned : options_.plan) {
    if (planned.step == position_.step) metrics.planned_steps = planned.steps;
  }
}

std::optional<Sample> Trainer::sample_now() {
  if (!sample_ || !communicator_.is_main()) return std::nullopt;
  check_weights();
  progress_.clear();
  model_->eval();
  std::optional<Sample> sample = sample_(model_, position_.step);
  model_->train();
  return sample;
}

std::optional<double> Trainer::seconds_left() const {
  if (estimates()) return std::max(0.0, *options_.minutes * 60 - elapsed());
  if (!steps()) return std::nullopt;
  const double per_step =
      since_start_.seconds() / static_cast<double>(position_.step - first_step_);
  return per_step * static_cast<double>(*steps() - position_.step);
}

Result Trainer::result(int signal) const {
  Result result;
  result.step = position_.step;
  result.steps = steps().value_or(0);
  result.signal = signal;
  if (final_.bytes > 0) {
    result.final_bits_per_byte = final_.bits_per_byte();
    result.final_bytes = final_.bytes;
  }
  if (std::isfinite(position_.best_bits_per_byte)) {
    result.best_bits_per_byte = position_.best_bits_per_byte;
    result.best_step = position_.best_step;
  }
  return result;
}

Result Trainer::run() {
  const StopSignals signals;
  std::optional<MetricsLog> log;
  if (communicator_.is_main()) log.emplace(dir_ / kMetricsFile, position_.step);
  model_->train();
  if (log && log->resumed_step() >= position_.step) position_.last_line.clear();  // written
  if (finished()) {  // resumed after its end: only print the end again
    conclude(log);
    return result(0);
  }
  introduce();
  while (true) {
    StepMetrics metrics = update();
    plan_length(metrics);
    const bool last = finished();
    if (due(options_.validate_every) || last) validate_now(metrics);
    metrics.elapsed_seconds = elapsed();
    if (due(options_.sample_every) && !last) metrics.sample = sample_now();
    if (last) {
      position_.last_line = to_json_line(metrics);
    } else if (log) {
      log->append(to_json_line(metrics));
    }
    progress_.update(metrics, steps(), seconds_left());

    const int signal = received_signal(signals);
    if (due(options_.checkpoint_every) || last || signal != 0) {
      if (log) log->flush();  // before the state: the log is behind it by last_line alone
      save_checkpoint();
    }
    if (last || signal != 0) {
      progress_.clear();
      if (signal == 0) conclude(log);
      return result(signal);
    }
  }
}

}  // namespace gateloop::training
