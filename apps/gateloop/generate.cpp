#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "commands.h"
#include "corpus_flags.h"
#include "gateloop/corpus.h"
#include "gateloop/generation.h"
#include "model_flags.h"
#include "output.h"

namespace gateloop::app {
namespace {

struct GenerateFlags {
  ModelFlags model;
  std::string prompt, prompt_file;
  std::vector<std::string> stop;
  generation::GenerateOptions generate;
  bool echo_prompt = false;
  bool documents = false, no_documents = false;
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) throw UsageError("cannot read --prompt-file " + path);
  return text;
}

std::vector<std::int64_t> ids_of(const std::string& text) {
  if (text.empty()) throw UsageError("--stop must not be empty");
  return generation::encode_prompt(text);
}

/// Bytes to standard output, each there for the reader at once.
void write(const std::string& bytes) {
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  flush_output();
}

/// The figures a user reads the constant cost per token from, on standard error.
void print_summary(const runtime::Reader& reader, const std::vector<double>& seconds) {
  // seconds[0] is the prompt and the first token; the others are one token each.
  const auto steps = seconds.size() - 1;
  if (steps == 0) return;
  const auto mean_ms = [&](std::size_t begin, std::size_t count) {
    const auto first = seconds.begin() + static_cast<std::ptrdiff_t>(begin);
    return 1e3 * std::accumulate(first, first + static_cast<std::ptrdiff_t>(count), 0.0) /
           static_cast<double>(count);
  };
  const auto edge = std::min<std::size_t>(100, steps);
  const double mean = mean_ms(1, steps);
  std::fprintf(stderr,
               "prompt and first token: %.1f ms; then %zu tokens, %.1f tokens/s\n"
               "mean time of a token: %.3f ms in the first %zu, %.3f ms in the last %zu\n"
               "state carried after %lld tokens: %lld bytes\n",
               1e3 * seconds[0], steps, 1e3 / mean, mean_ms(1, edge), edge,
               mean_ms(seconds.size() - edge, edge), edge,
               static_cast<long long>(reader.position()),
               static_cast<long long>(reader.state_bytes()));
}

void run(const GenerateFlags& flags) {
  // First: another program may take over, and a pipe is read once.
  const auto reader = open_byte_reader(flags.model);
  const auto prompt = flags.prompt_file.empty() ? flags.prompt : read_file(flags.prompt_file);
  auto options = flags.generate;
  for (const std::string& stop : flags.stop) options.sampling.stop.push_back(ids_of(stop));
  try {
    generation::Sampler(options.sampling, options.seed);
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
  const bool documents =
      are_apart(flags.documents, flags.no_documents, trained_on_documents(flags.model.directory));
  if (flags.echo_prompt) write(prompt);

  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  auto last = Clock::now();
  const auto separator = static_cast<char>(corpus::kSeparator);
  const auto ids = generation::encode_prompt(documents ? separator + prompt : prompt);
  generation::generate(*reader, ids, 1, options, [&](auto tokens) {
    if (documents && tokens.front() == corpus::kSeparator) return false;
    write(std::string(1, static_cast<char>(tokens.front())));
    const auto now = Clock::now();
    seconds.push_back(std::chrono::duration<double>(now - last).count());
    last = now;
    return true;
  });
  if (isatty(STDOUT_FILENO)) write("\n");  // so that the shell's prompt starts on its own line
  if (!seconds.empty()) print_summary(*reader, seconds);
}

}  // namespace

void add_generate_command(CLI::App& app) {
  auto flags = std::make_shared<GenerateFlags>();
  auto* command = app.add_subcommand(
      "generate",
      "Draw text from a trained model. The bytes drawn go to standard output as they come, the "
      "timing to standard error; the cost of a byte does not grow with the length.");
  add_checkpoint_flags(*command, flags->model);
  auto* prompt = command
                     ->add_option("--prompt", flags->prompt,
                                  "Text to continue (default, and where empty: a newline)")
                     ->type_name("TEXT");
  command->add_option("--prompt-file", flags->prompt_file, "File to continue, read whole")
      ->check(CLI::ExistingFile)
      ->excludes(prompt)
      ->type_name("FILE");
  command->add_flag("--echo-prompt", flags->echo_prompt, "Write the prompt before the bytes drawn");
  command->add_flag("--documents", flags->documents,
                    "The prompt begins a document, and the text ends with it, as with a model "
                    "trained with --documents");
  add_no_documents_flag(*command, flags->no_documents, "The prompt is from anywhere in a text");
  command->add_option("--length", flags->generate.length, "Bytes to draw (default 512)")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  auto& sampling = flags->generate.sampling;
  command
      ->add_option(
          "--temperature", sampling.temperature,
          "Above 1 more varied, below 1 safer; 0 always takes the likeliest byte (default 1)")
      ->check(CLI::NonNegativeNumber)
      ->type_name("T");
  command
      ->add_option("--top-k-threshold", sampling.filter_thres,
                   "Share of the alphabet never drawn: 0.9 keeps the likeliest 10 per cent, 0 all "
                   "(default 0.9)")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("SHARE");
  command->add_option("--top-k", sampling.top_k, "Draw only the K likeliest (default 0: all)")
      ->check(CLI::NonNegativeNumber)
      ->type_name("K");
  command
      ->add_option("--top-p", sampling.top_p,
                   "Draw only the likeliest that together have this probability (default 1)")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("P");
  command
      ->add_option("--min-p", sampling.min_p,
                   "Draw only what is at least P times as probable as the likeliest (default 0)")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("P");
  command
      ->add_option("--repetition-penalty", sampling.repetition_penalty,
                   "Above 1: bytes read or drawn before are drawn less often (default 1)")
      ->type_name("R");
  command
      ->add_option("--stop", flags->stop,
                   "End after this text is drawn; may be given several times")
      ->type_name("TEXT")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command
      ->add_option("--seed", flags->generate.seed,
                   "The same seed and flags draw the same bytes (default 0)")
      ->type_name("S");
  add_compute_flags(*command, flags->model);
  command->callback([flags] { run(*flags); });
}

}  // namespace gateloop::app
