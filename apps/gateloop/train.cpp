#include <torch/torch.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "allocator.h"
#include "commands.h"
#include "gateloop/distributed.h"
#include "gateloop/generation.h"
#include "gateloop/nn/runtime_model.h"
#include "gateloop/training.h"
#include "output.h"
#include "processes.h"
#include "train_flags.h"

namespace gateloop::app {
namespace {

using training::RunConfig;
using training::TrainingOptions;

void check_resumable(const TrainFlags& flags, const RunConfig& config) {
  const auto names = training::obstacles_to_resuming(training::load_config(flags.dir()), config);
  if (names.empty()) return;
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  throw UsageError(flags.dir().string() + " holds a run with another " + list +
                   ": leave those flags out to resume it, or train anew in another --out");
}

corpus::Sources choose_sources(const TrainFlags& flags, const RunConfig& config) {
  corpus::Sources sources = training::sources(config.training);
  if (!flags.corpus.data.empty()) {
    sources.paths = flags.corpus.sources().paths;
    return sources;
  }
  if (flags.resume && !sources.paths.empty()) {
    for (const std::filesystem::path& path : sources.paths) {
      if (std::filesystem::exists(path)) continue;
      throw UsageError("the corpus of this run, " + path.string() +
                       ", is gone: say where it is with --data PATH");
    }
    return sources;
  }
  for (const char* known : {"data/enwik8", "data/wiki_sample"}) {
    if (!std::filesystem::exists(known)) continue;
    sources.paths = {known};
    return sources;
  }
  throw UsageError(
      "no text to train on: run `make corpus`, or give any file or folder with --data PATH");
}

/// A run in a folder of its own text would change that text.
void check_apart(const std::filesystem::path& out, const corpus::Sources& sources) {
  const auto dir = std::filesystem::weakly_canonical(std::filesystem::absolute(out));
  for (const std::filesystem::path& path : sources.paths) {
    if (!std::filesystem::is_directory(path)) continue;
    const std::filesystem::path folder = std::filesystem::weakly_canonical(path / "");
    const auto below = dir.lexically_relative(folder);
    if (below.empty() || *below.begin() == "..") continue;
    throw UsageError("--out " + out.string() + " lies in --data " + path.string() +
                     ": the run would become part of its own text; choose another --out");
  }
}

/// Text for a terminal: control characters, which could garble it, become '?'.
std::string printable(std::span<const std::uint8_t> bytes) {
  std::string text;
  for (const std::uint8_t byte : bytes) {
    const bool control = (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f;
    text += control ? '?' : static_cast<char>(byte);
  }
  return text;
}

/// Continues a piece of the validation text, another one at each step, and prints it meanwhile.
training::Sample print_sample(const TrainingOptions& options, const training::Corpus& corpus,
                              nn::Transformer& model, std::int64_t step) {
  const auto valid = corpus.valid();
  const auto prime_length =
      std::min<std::size_t>(static_cast<std::size_t>(options.sample_prime), valid.size());
  const std::size_t start =
      static_cast<std::size_t>(step) * 7919 % (valid.size() - prime_length + 1);
  auto read = valid.subspan(start, prime_length);
  auto shown = read;
  // Of several documents the last: the session does not start anew between them.
  if (const auto separator = corpus.separator()) {
    const auto last = std::find(read.rbegin(), read.rend(), *separator);
    shown = read.last(static_cast<std::size_t>(last - read.rbegin()));
    if (last != read.rend()) read = read.last(shown.size() + 1);
  }
  training::Sample sample{std::string(shown.begin(), shown.end()), {}};

  std::printf("--- sample at step %lld: %zu bytes of validation text | then the model\n%s|",
              static_cast<long long>(step), shown.size(), printable(shown).c_str());
  runtime::Session session(nn::runtime_model(model));
  generation::GenerateOptions generate;
  generate.length = options.sample_length;
  generate.seed = options.seed + static_cast<std::uint64_t>(step);
  generation::generate(
      session, generation::encode_prompt({reinterpret_cast<const char*>(read.data()), read.size()}),
      1, generate, [&](auto tokens) {
        const auto byte = static_cast<std::uint8_t>(tokens.front());
        if (byte == corpus.separator()) return false;
        std::fputs(printable({&byte, 1}).c_str(), stdout);
        sample.text += static_cast<char>(byte);
        return true;
      });
  std::puts("\n---");
  std::fflush(stdout);
  return sample;
}

void print_end(const std::string& program, const std::filesystem::path& dir,
               const training::Result& result, const corpus::Sources& sources) {
  const std::string command = shell_path(program);
  const std::string run = shell_path(dir);
  if (result.signal != 0) {
    std::printf(
        "Stopped by SIG%s after step %lld; saved. To go on:\n  %s train --out %s --resume\n",
        ::sigabbrev_np(result.signal), static_cast<long long>(result.step), command.c_str(),
        run.c_str());
    return;
  }
  std::printf("\nFinished: %lld steps.\n", static_cast<long long>(result.step));
  std::printf("  validation    %.4f bits per byte over %lld bytes\n", *result.final_bits_per_byte,
              static_cast<long long>(result.final_bytes));
  std::printf("  checkpoint    %s/model.safetensors", dir.c_str());
  if (result.best_step > 0) {
    std::printf(" (model.best.safetensors: step %lld)", static_cast<long long>(result.best_step));
  }
  std::printf("\n  losses        %s/metrics.jsonl\n\nTo go on:\n", dir.c_str());
  std::printf("  %s generate --checkpoint %s%s --prompt 'The ' --length 1000\n", command.c_str(),
              run.c_str(), sources.documents ? " --documents" : "");
  constexpr std::size_t kMostPaths = 8;
  std::string data;
  for (const std::filesystem::path& path : sources.paths) data += " " + shell_path(path);
  if (sources.paths.size() > kMostPaths) data = " PATH...";
  if (!sources.field.empty()) data += " --field " + shell_word(sources.field);
  if (sources.documents) data += " --documents";
  std::printf("  %s evaluate --checkpoint %s --data%s\n", command.c_str(), run.c_str(),
              data.c_str());
}

/// How the run in the directory of `flags` begins. Where the launcher has replaced processes that
/// died (torchrun --max-restarts), theirs goes on.
training::Start choose_start(TrainFlags& flags, const distributed::Communicator& communicator) {
  const std::filesystem::path dir = flags.dir();
  const bool configured = std::filesystem::exists(dir / "config.json");
  if (training::launch_trains_in(dir, communicator)) flags.resume = true;
  if (flags.resume) {
    if (!configured) {
      throw UsageError(dir.string() + " holds no run to resume: leave --resume out to start one");
    }
    return training::Start::kResume;
  }
  if (flags.overwrite) return training::Start::kOverwrite;
  if (training::holds_run(dir)) {
    throw UsageError(dir.string() +
                     " holds a run already: --resume goes on with it, --overwrite "
                     "replaces it, --out DIR trains elsewhere");
  }
  return training::Start::kNew;
}

/// As `flags` say on process 0, but for what is this process's own: its device and threads.
RunConfig agreed_config(const TrainFlags& flags, const distributed::Communicator& communicator) {
  RunConfig own;
  const std::string text = communicator.from_main([&] {
    own = configure(flags);
    if (flags.resume) check_resumable(flags, own);
    return training::to_json(own);
  });
  if (communicator.is_main()) return own;
  RunConfig config = training::config_from_json(text);
  config.training.device = "auto";
  config.training.threads = 0;
  apply_overrides(flags, config);
  return config;
}

training::Result train(TrainFlags flags, const distributed::Communicator& communicator,
                       corpus::Sources& sources) {
  std::signal(SIGBUS, SIG_DFL);           // main() sets it for mapped weights; training maps none
  auto start = training::Start::kResume;  // of no meaning on the others
  communicator.from_main([&] { return start = choose_start(flags, communicator), std::string(); });
  RunConfig config = agreed_config(flags, communicator);
  sources = choose_sources(flags, config);
  check_apart(flags.dir(), sources);
  const training::Corpus corpus = open_corpus(sources, config.training.split);
  if (communicator.is_main()) {
    std::printf("Corpus %s\n", corpus.description().c_str());
    report_left_out(corpus);
  }
  release_freed_memory();  // unpacking a corpus leaves much of it
  const TrainingOptions options = config.training;
  training::SampleCallback sample;
  if (options.sample_length > 0) {
    sample = [&](nn::Transformer& model, std::int64_t step) {
      return print_sample(options, corpus, model, step);
    };
  }
  return training::train(std::move(config), corpus, flags.dir(), start, sample, {}, communicator);
}

void run(const std::string& program, const TrainFlags& flags) {
  training::Result result;
  corpus::Sources sources;
  const auto communicator =
      work_together(flags.backend, flags.timeout, [&](const distributed::Communicator& processes) {
        try {
          result = train(flags, processes, sources);
        } catch (const std::invalid_argument& error) {  // every option is a flag
          throw UsageError(error.what());
        }
      });
  if (communicator.is_main()) print_end(program, flags.dir(), result, sources);
  if (result.signal != 0) throw CLI::RuntimeError(128 + result.signal);
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto flags = std::make_shared<TrainFlags>();
  auto* command = app.add_subcommand(
      "train",
      "Train a model on the bytes of files. A preset sets everything; each flag overrides one "
      "value of it ([in brackets]). Ctrl-C and the signals HUP, QUIT, TERM, USR1, USR2 and XCPU "
      "finish the step, save and exit with 128 + the signal's number (Ctrl-C: 130); --resume then "
      "continues bit for bit.");
  add_train_flags(*command, *flags);
  command->callback([flags, &app] { run(app.get_name(), *flags); });
}

}  // namespace gateloop::app
