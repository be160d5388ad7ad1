#pragma once

/// Training a Transformer on the bytes of files.
///
/// A run lives in a directory:
///   config.json                 {"format": 1, "model": {...}, "training": {...}, ...}
///   model.safetensors           weights at the last checkpoint
///   model.best.safetensors      weights at the best validation
///   training_state.safetensors  all that resuming needs, in one file: a kill between two files
///                               cannot mix two steps
///   metrics.jsonl               one JSON object per step, in ASCII
///
/// A resumed run repeats the unbroken one bit for bit, on the same machine with the same number of
/// threads. With `minutes` the length, and so the decay, depends on the clock: `plan` says how.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gateloop/corpus.h"
#include "gateloop/distributed.h"
#include "gateloop/nn/transformer.h"

namespace gateloop::training {

using corpus::Corpus;
using corpus::Sources;
using corpus::Split;

/// From the moment when `step` updates were made, the run was to have `steps` in all.
struct PlannedLength {
  std::int64_t step = 0;
  std::int64_t steps = 0;
  bool operator==(const PlannedLength&) const = default;
};

/// How to train. Names in config.json and of the command line's flags are the fields' names.
struct TrainingOptions {
  std::string preset;

  // Corpus, as it was when the run began; filled in by train().
  /// Absolute paths, each a file URI where it is not UTF-8: see sources(). One is a string in
  /// config.json, several are a list.
  std::vector<std::string> data;
  std::string field;       ///< of JSON lines, see corpus::Sources; empty: whole files
  bool documents = false;  ///< the state starts anew at each document, see corpus::Sources
  std::optional<Split> split;
  std::string fingerprint;

  // Length of the run: `steps`, else `minutes`, else the `plan` of an earlier run. With `minutes`,
  // train() estimates at every step how many fit, and appends to `plan` what changes. A run with
  // that plan and without `minutes` has the same learning rates, and so the same losses.
  std::optional<std::int64_t> steps;
  std::optional<double> minutes;
  std::vector<PlannedLength> plan;

  // One step: batch x accumulation sequences of length + 1 bytes.
  std::int64_t batch = 4;
  std::int64_t accumulation = 4;
  std::int64_t length = 256;
  /// Sequences whose activations are kept at the same time. 0: all batch x accumulation of them if
  /// the memory allows, else `batch`; train() sets it. The mathematics are the same, the rounding
  /// is not, so that a run keeps its choice.
  std::int64_t rows_per_pass = 0;

  /// Keep of each layer only what it reads, and run it again in the backward pass: less memory, for
  /// one more forward pass. A run may be resumed with another choice.
  bool checkpoint_blocks = false;

  /// GateLoop layers have transitions that are learned and do not depend on the text: the weights
  /// of `to_a` stay zero, its biases are trained. Simple gate loops stay as they are.
  bool fixed_transitions = false;

  std::string optimizer = "adam";  ///< adam (decay added to the gradient) or adamw (decoupled)
  double learning_rate = 1e-4;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double epsilon = 1e-8;
  double weight_decay = 0;  ///< of matrices; gains and biases never decay
  double clip = 0.5;        ///< largest global gradient norm; 0: no limit

  std::string schedule = "constant";  ///< after the warm-up: constant, linear or cosine (to zero)
  std::int64_t warmup_steps = 0;

  std::string dtype = "float32";  ///< float32, or bfloat16: autocast with float32 master weights
  std::uint64_t seed = 0;
  std::int64_t threads = 0;  ///< 0: default_threads(); train() sets it
  /// cpu, cuda, cuda:N, or auto: CUDA where there is some, else the CPU; train() sets it. A run may
  /// be resumed on another device, whose bits differ.
  std::string device = "auto";

  // Several processes (distributed.h) share the rows of a step; a run may be resumed with another
  // number of them, whose bits differ.
  /// none, or bfloat16: gradients travel between processes in it, at half the bytes.
  std::string gradient_compression = "none";
  /// Each process keeps and updates its part of the optimiser's state (stage 1 of ZeRO, arXiv
  /// 1910.02054). The same numbers, and the same files.
  bool shard_optimizer = false;

  std::int64_t validate_every = 100;     ///< 0: only at the end
  std::int64_t validation_windows = 64;  ///< evenly spaced, of length + 1 bytes; always the same
  /// At the end, where the whole validation part is no more than this many windows, all of it is
  /// used; else this many windows. 4096 of 256 bytes take a small model about 20 s on 2 cores.
  std::int64_t final_windows = 4096;
  std::int64_t sample_every = 500;  ///< 0: only at the end
  std::int64_t sample_prime = 128;
  std::int64_t sample_length = 512;
  std::int64_t checkpoint_every = 500;  ///< 0: only at the end and when stopped
  /// 0: never. What the layers do and how they learn, into the log; see docs/runs.md.
  std::int64_t diagnostics_every = 0;
};

/// Where the corpus of a run lay.
Sources sources(const TrainingOptions& options);

/// What config.json holds.
struct RunConfig {
  nn::TransformerOptions model;
  TrainingOptions training;
  // Filled in by train().
  std::string id;                       ///< the weights carry it too
  std::vector<std::string> provenance;  ///< of checkpoint.h: one object for each process
};

/// `quick` and `enwik8`. Throws std::invalid_argument naming the presets there are.
RunConfig preset(std::string_view name);
std::vector<std::string> preset_names();
/// "bfloat16" where this processor multiplies it natively, else "float32".
std::string fastest_dtype();

/// As many as libtorch chooses (OMP_NUM_THREADS, which torchrun sets to 1), or fewer where this
/// process may use fewer processors. Its affinity and the CPU quota of its control groups (a
/// container's) bound them. Each of `processes` on this machine has its part: in a SLURM step
/// SLURM_CPUS_PER_TASK, where that is set.
int default_threads(int processes = 1);

/// Throws std::invalid_argument naming the option that is out of range or does not go with another.
void check(const RunConfig& config);

std::string to_json(const RunConfig& config);
/// Throws std::runtime_error saying what is wrong.
RunConfig config_from_json(const std::string& text);
/// DIR/config.json. Throws std::runtime_error naming the path and what is wrong.
RunConfig load_config(const std::filesystem::path& dir);
/// Whether DIR holds any file of a run.
bool holds_run(const std::filesystem::path& dir);
/// Names of the options that differ, though resuming needs them equal. Options that only say how
/// often to save, sample and so on may change. `steps` may change where the schedule is constant.
std::vector<std::string> obstacles_to_resuming(const RunConfig& stored, const RunConfig& requested);

/// Length of the run as planned when `step` updates were made; nullopt before the first estimate.
std::optional<std::int64_t> planned_steps(const TrainingOptions& options, std::int64_t step);
/// The schedule: learning rate of update `step`, counted from 0. The warm-up does not depend on the
/// length. The decay begins after it, once a length is planned; each new length stretches or
/// shortens what is left of the decay.
double learning_rate(const TrainingOptions& options, std::int64_t step);

/// Bytes that the model continued, but for a separator before them, and their continuation. In the
/// log each is text: a byte that is no UTF-8 is there as U+FFFD.
struct Sample {
  std::string prime;
  std::string text;
};

/// Called after updates that the options choose, with the model in eval mode; `step` counts
/// updates. What it returns is in the log, in the record of that step.
using SampleCallback =
    std::function<std::optional<Sample>(nn::Transformer& model, std::int64_t step)>;

/// Seconds since any fixed moment. Empty: the system's steady clock.
using Clock = std::function<double()>;

struct Result {
  std::int64_t step = 0;   ///< updates made in all
  std::int64_t steps = 0;  ///< of how many; 0 if stopped before the first estimate
  /// The signal that stopped the run (after a last checkpoint), or 0.
  int signal = 0;
  /// Of the last weights, over final_windows; none where a signal came before.
  std::optional<double> final_bits_per_byte;
  std::int64_t final_bytes = 0;              ///< how many bytes that predicts
  std::optional<double> best_bits_per_byte;  ///< over validation_windows
  std::int64_t best_step = 0;
};

enum class Start {
  kNew,        ///< in a directory that holds no run
  kOverwrite,  ///< in any; the run it holds is removed first
  kResume,     ///< from the checkpoint in the directory, or from the seed if it holds none yet
};

/// Trains in `dir` and prints as it goes. To resume, take load_config(dir) and change in it what
/// obstacles_to_resuming() allows.
///
/// Every process of `communicator` calls it, inside report_failures(). The run has the options and
/// the corpus of process 0. That process alone reads and writes `dir`, prints, and calls `sample`.
/// Of their own options the others take threads, and the number of the device. Each has its copy of
/// the corpus.
///
/// Throws std::invalid_argument for options that do not fit (as check(), and those of the model).
/// Also for a corpus shorter than a window, and for kNew where there is a run. Throws
/// std::runtime_error for files that cannot be read or written, and for a loss or gradient that is
/// not finite. Also for a run with other options or another corpus, and for a directory in which
/// another process trains. Whatever it throws, the last good checkpoint is whole.
///
/// With `minutes` the run ends that long after its start, validation and saving included; the time
/// of earlier processes counts where the run was resumed.
Result train(RunConfig config, const Corpus& corpus, const std::filesystem::path& dir, Start start,
             const SampleCallback& sample = {}, const Clock& clock = {},
             const distributed::Communicator& communicator = {});

/// Whether the run in `dir` was begun by processes that the same launcher started before these: by
/// torchrun, which keeps a store while it replaces processes that died. On process 0.
bool launch_trains_in(const std::filesystem::path& dir,
                      const distributed::Communicator& communicator);

}  // namespace gateloop::training
