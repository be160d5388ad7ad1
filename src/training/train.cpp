// What comes before the loop: checks, the lock, what the options leave open.
#include <ATen/DeviceAccelerator.h>
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "gateloop/nn/gate_looped_attention.h"
#include "gateloop/training.h"
#include "model/file.h"
#include "model/machine.h"
#include "training/device.h"
#include "training/files.h"
#include "training/memory.h"
#include "training/stopwatch.h"
#include "training/trainer.h"

namespace gateloop::training {
namespace {

/// Of the directory in which a launcher's processes train.
constexpr const char* kRunNote = "run";

/// Keeps a second process from training in the same directory. The system drops the lock when this
/// process ends, however it ends.
model::FileDescriptor lock(const std::filesystem::path& dir) {
  model::FileDescriptor folder(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0 || ::flock(folder.get(), LOCK_EX | LOCK_NB) != 0) {
    throw std::runtime_error(dir.string() + ": another process is training there");
  }
  return folder;
}

void check_lengths(const Corpus& corpus, const TrainingOptions& options) {
  const auto check_part = [&](const char* part, std::span<const std::uint8_t> bytes) {
    if (std::ssize(bytes) > options.length) return;
    throw std::invalid_argument(corpus.name() + ": the part to " + part + " holds " +
                                std::to_string(bytes.size()) + " bytes, a window needs " +
                                std::to_string(options.length + 1) +
                                ": use a longer text, a smaller length or another split");
  };
  check_part("train on", corpus.train());
  check_part("validate on", corpus.valid());
}

std::int64_t free_memory(const torch::Device& device) {
  const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
  return static_cast<std::int64_t>(free);
}

/// A run goes on anywhere; bit for bit only where it began.
void say_where_devices_differ(const std::filesystem::path& dir, const TrainingOptions& options) {
  const std::string before = load_config(dir).training.device;
  if (before == options.device) return;
  std::printf(
      "Going on on %s, where the run was on %s: losses agree to rounding, not bit for bit\n",
      options.device.c_str(), before.c_str());
}

/// What differs from machine to machine.
void settle_machine(TrainingOptions& options, const torch::Device& device,
                    const distributed::Communicator& communicator) {
  options.device = device.str();
  if (options.threads == 0) options.threads = default_threads(communicator.local_size());
  torch::set_num_threads(static_cast<int>(options.threads));
  if (!device.is_cpu()) at::accelerator::setDeviceIndex(device.index());
}

/// What the options leave open is decided once, at the start of a run, and kept in config.json.
void settle(RunConfig& config, const Corpus& corpus, const torch::Device& device,
            const distributed::Communicator& communicator) {
  TrainingOptions& options = config.training;
  options.data.clear();
  for (const auto& path : corpus.sources().paths) options.data.push_back(path_to_text(path));
  options.field = corpus.sources().field;
  options.documents = corpus.sources().documents;
  options.split = corpus.split();
  settle_machine(options, device, communicator);
  const std::int64_t available =
      device.is_cpu() ? model::available_memory() / communicator.local_size() : free_memory(device);
  if (options.rows_per_pass == 0) {
    const std::int64_t rows = options.batch * options.accumulation;
    const std::int64_t most = (rows + communicator.size() - 1) / communicator.size();
    options.rows_per_pass = choose_rows_per_pass(config, most, available);
  }
  if (const auto advice = memory_advice(config, available)) std::printf("%s\n", advice->c_str());
}

void check_rows(const TrainingOptions& options, const distributed::Communicator& communicator) {
  const std::int64_t rows = options.batch * options.accumulation;
  if (rows >= communicator.size()) return;
  throw std::invalid_argument("batch x accumulation must be at least the number of processes, " +
                              std::to_string(communicator.size()) + ", not " +
                              std::to_string(rows));
}

void check_corpus(const TrainingOptions& options, const Corpus& corpus) {
  const std::string fingerprint = corpus.fingerprint();
  if (!options.fingerprint.empty() && options.fingerprint != fingerprint) {
    throw std::runtime_error(corpus.name() + " (" + fingerprint +
                             ") is not the corpus of this run, which was " +
                             sources(options).name() + " (" + options.fingerprint + ")");
  }
}

void fix_transitions(const nn::Transformer& model) {
  bool found = false;
  for (const auto& module : model->modules(/*include_self=*/false)) {
    if (module->as<nn::GateLoopedAttentionImpl>() == nullptr) continue;
    auto weight = module->named_parameters()["to_a.0.weight"];
    weight.requires_grad_(false);
    weight.zero_();
    found = true;
  }
  if (!found) throw std::invalid_argument("fixed_transitions: the model has no GateLoop layer");
}

/// The weights come from the seed alone.
nn::Transformer make_model(const RunConfig& config) {
  torch::manual_seed(config.training.seed);
  try {
    nn::Transformer model(config.model);
    model->set_checkpoint_blocks(config.training.checkpoint_blocks);
    if (config.training.fixed_transitions) fix_transitions(model);
    return model;
  } catch (const c10::Error& error) {
    throw std::invalid_argument(error.what_without_backtrace());
  }
}

/// Under the lock: makes the directory what `start` needs, or throws.
void prepare(const std::filesystem::path& dir, Start start, const RunConfig& config) {
  if (start == Start::kNew && holds_run(dir)) {
    throw std::invalid_argument(dir.string() +
                                " holds a run already: resume it, overwrite it, or "
                                "choose another directory");
  }
  if (start == Start::kOverwrite) {
    for (const char* file : kRunFiles) std::filesystem::remove(dir / file);
  }
  if (start == Start::kResume) {
    std::string names;
    for (const std::string& name : obstacles_to_resuming(load_config(dir), config)) {
      names += (names.empty() ? "" : ", ") + name;
    }
    if (!names.empty()) {
      throw std::runtime_error(dir.string() + " holds a run with another " + names +
                               ": resume it with its own options, or train in another directory");
    }
  }
}

/// What process 0 has settled, on this machine.
RunConfig follow(RunConfig settled, const TrainingOptions& own, const Corpus& corpus,
                 const distributed::Communicator& communicator) {
  check_corpus(settled.training, corpus);
  // The kind of device is that of process 0, "cuda" of "cuda:0"; which of them is this process's
  // own.
  const std::string kind = settled.training.device.substr(0, settled.training.device.find(':'));
  const std::string name = own.device.starts_with(kind + ":") ? own.device : kind;
  settled.training.threads = own.threads;
  settle_machine(settled.training, device_of(name, communicator.local_rank()), communicator);
  return settled;
}

}  // namespace

Result train(RunConfig config, const Corpus& corpus, const std::filesystem::path& dir, Start start,
             const SampleCallback& sample, const Clock& clock,
             const distributed::Communicator& communicator) {
  nn::Transformer model{nullptr};
  model::FileDescriptor locked;
  const std::string settled = communicator.from_main([&] {
    check(config);
    check_rows(config.training, communicator);
    check_lengths(corpus, config.training);
    check_corpus(config.training, corpus);
    const torch::Device device = device_of(config.training.device, communicator.local_rank());
    model = make_model(config);
    std::filesystem::create_directories(dir);
    locked = lock(dir);
    prepare(dir, start, config);
    communicator.leave_note(kRunNote, path_to_text(dir));
    config.training.fingerprint = corpus.fingerprint();
    settle(config, corpus, device, communicator);
    if (start == Start::kResume) say_where_devices_differ(dir, config.training);
    return to_json(config);
  });
  if (!communicator.is_main()) {
    config = follow(config_from_json(settled), config.training, corpus, communicator);
    model = make_model(config);
  }
  model->to(device_of(config.training.device));
  return Trainer(std::move(config), std::move(model), corpus, dir, sample,
                 clock ? clock : steady_seconds, communicator)
      .run();
}

bool launch_trains_in(const std::filesystem::path& dir,
                      const distributed::Communicator& communicator) {
  return communicator.note(kRunNote) == path_to_text(dir) &&
         std::filesystem::exists(dir / kConfigFile);
}

}  // namespace gateloop::training
