#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "commands.h"
#include "corpus_flags.h"
#include "model_flags.h"
#include "output.h"

namespace gateloop::app {
namespace {

using Bytes = std::span<const std::uint8_t>;
using Clock = std::chrono::steady_clock;

struct Flags {
  ModelFlags model;
  CorpusFlags corpus;
  std::string part = "all";
  std::string mode = "both";
  std::int64_t length = 256;
  std::size_t first = std::numeric_limits<std::size_t>::max();
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Tells on standard error how far a long evaluation is: a line that rewrites itself on a terminal,
/// a new line every ten seconds elsewhere.
auto progress_reporter(const char* name) {
  return [name, terminal = isatty(STDERR_FILENO) != 0, start = Clock::now(), last = Clock::now()](
             std::int64_t done, std::int64_t total) mutable {
    const bool end = done == total;
    if (!end && seconds_since(last) < (terminal ? 0.2 : 10)) return;
    last = Clock::now();
    const double rate = static_cast<double>(done) / seconds_since(start);
    if (!end)
      std::fprintf(stderr, "%s%s: %.1f %% of %lld bytes, %.0f bytes/s, %.0f s left%s",
                   terminal ? "\r" : "", name,
                   100.0 * static_cast<double>(done) / static_cast<double>(total),
                   static_cast<long long>(total), rate, static_cast<double>(total - done) / rate,
                   terminal ? "\033[K" : "\n");
    else if (terminal)
      std::fprintf(stderr, "\r\033[K");  // the result takes the line
  };
}

Bytes part_of(const corpus::Corpus& corpus, const Flags& flags) {
  Bytes text = corpus.bytes();
  if (flags.part == "train") text = corpus.train();
  if (flags.part == "valid") text = corpus.valid();
  if (flags.part == "test") text = corpus.test();
  text = text.first(std::min(text.size(), flags.first));
  if (text.size() < 2)
    throw UsageError("--part " + flags.part + " of " + corpus.name() + " has " +
                     std::to_string(text.size()) + " bytes: at least 2 are needed");
  return text;
}

void print_score(const char* name, const std::string& meaning, runtime::Session& session,
                 Bytes text, runtime::EvaluateOptions options) {
  const auto start = Clock::now();
  options.progress = progress_reporter(name);
  const auto score = runtime::evaluate(session, text, options);
  std::printf("%-9s %.4f bits per byte, %lld bytes predicted in %.1f s (%s)\n", name,
              score.bits_per_byte(), static_cast<long long>(score.bytes), seconds_since(start),
              meaning.c_str());
  flush_output();
}

void run(const Flags& flags) {
  const auto corpus = open_corpus(flags.corpus.sources(), flags.corpus.parts());
  report_left_out(corpus);
  const auto text = part_of(corpus, flags);
  auto session = open_session(flags.model);
  const bool bounded = model::has_bounded_state(session.model().spec());
  if (flags.mode == "carried" && !bounded)
    throw UsageError(
        "--mode carried needs a model without full attention; for this model "
        "use --mode windowed with a larger --length");
  const auto separator = corpus.separator();
  const char* too = separator ? ", each document too" : "";
  if (flags.mode != "carried")
    print_score("windowed",
                "each window of " + std::to_string(flags.length) + " starts from zero state" + too,
                session, text, {.window = flags.length, .separator = separator});
  if (flags.mode != "windowed" && bounded)
    print_score("carried",
                separator ? "the state carried through each document"
                          : "one sequence, the state carried through it all",
                session, text, {.separator = separator});
  if (flags.mode == "both" && !bounded)
    std::printf(
        "carried   left out: the key/value cache of full attention grows with the text; "
        "a larger --length gives it more context\n");
  flush_output();
}

}  // namespace

void add_evaluate_command(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  auto* command = app.add_subcommand(
      "evaluate",
      "Bits per byte of a text: in windows, as in training, and as one stream with the state "
      "carried. Both predict every byte but the first once.");
  add_checkpoint_flags(*command, flags->model);
  add_data_flags(*command, flags->corpus, "Text (required)")->required();
  add_split_flag(*command, flags->corpus);
  command->add_option("--part", flags->part, "Part of the text to evaluate (default all)")
      ->check(CLI::IsMember({"train", "valid", "test", "all"}))
      ->type_name("train|valid|test|all");
  command->add_option("--first", flags->first, "Only so many bytes from the start of the part")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--mode", flags->mode, "Which figures (default both)")
      ->check(CLI::IsMember({"windowed", "carried", "both"}))
      ->type_name("windowed|carried|both");
  command->add_option("--length", flags->length, "Bytes predicted in one window (default 256)")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  add_compute_flags(*command, flags->model);
  command->callback([flags] { run(*flags); });
}

}  // namespace gateloop::app
