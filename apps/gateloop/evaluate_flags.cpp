#include "evaluate_flags.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "commands.h"
#include "output.h"
#include "process_flags.h"

namespace gateloop::app {
namespace {

using Bytes = std::span<const std::uint8_t>;
using Clock = std::chrono::steady_clock;

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

Bytes part_of(const corpus::Corpus& corpus, const EvaluateFlags& flags) {
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

}  // namespace

void print_scores(const EvaluateFlags& flags, const corpus::Corpus& corpus,
                  const model::ModelSpec& spec, const Reading& reading, bool quiet) {
  if (!quiet) report_left_out(corpus);
  const auto text = part_of(corpus, flags);
  const bool bounded = model::has_bounded_state(spec);
  if (flags.mode == "carried" && !bounded)
    throw UsageError(
        "--mode carried needs a model without full attention; for this model "
        "use --mode windowed with a larger --length");
  const auto separator = corpus.separator();
  const auto print_score = [&](const char* name, const std::string& meaning, std::int64_t window) {
    runtime::EvaluateOptions options{.window = window, .separator = separator};
    if (!quiet) options.progress = progress_reporter(name);
    const auto start = Clock::now();
    const auto score = reading(text, options);
    if (quiet) return;
    std::printf("%-9s %.4f bits per byte, %lld bytes predicted in %.1f s (%s)\n", name,
                score.bits_per_byte(), static_cast<long long>(score.bytes), seconds_since(start),
                meaning.c_str());
    flush_output();
  };
  if (flags.mode != "carried")
    print_score("windowed",
                "each window of " + std::to_string(flags.length) + " starts from zero state" +
                    (separator ? ", each document too" : ""),
                flags.length);
  if (flags.mode != "windowed" && bounded)
    print_score("carried",
                separator ? "the state carried through each document"
                          : "one sequence, the state carried through it all",
                0);
  if (flags.mode == "both" && !bounded && !quiet)
    std::printf(
        "carried   left out: the key/value cache of full attention grows with the text; "
        "a larger --length gives it more context\n");
  if (!quiet) flush_output();
}

CLI::App* add_evaluate_flags(CLI::App& app, EvaluateFlags& flags) {
  auto* command = app.add_subcommand(
      "evaluate",
      "Bits per byte of a text: in windows, as in training, and as one stream with the state "
      "carried. Both predict every byte but the first once. Several processes (started by torchrun "
      "or srun) share the text.");
  add_checkpoint_flags(*command, flags.model);
  add_data_flags(*command, flags.corpus, "Text (required)")->required();
  add_no_documents_flag(*command, flags.corpus.no_documents, "One text");
  add_split_flag(*command, flags.corpus);
  command->add_option("--part", flags.part, "Part of the text to evaluate (default all)")
      ->check(CLI::IsMember({"train", "valid", "test", "all"}))
      ->type_name("train|valid|test|all");
  command->add_option("--first", flags.first, "Only so many bytes from the start of the part")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--mode", flags.mode, "Which figures (default both)")
      ->check(CLI::IsMember({"windowed", "carried", "both"}))
      ->type_name("windowed|carried|both");
  command->add_option("--length", flags.length, "Bytes predicted in one window (default 256)")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  add_compute_flags(*command, flags.model);
  add_timeout_flag(
      *command, flags.timeout,
      "the slowest takes for 8192 bytes, and to open text and model beyond the quickest");
  return command;
}

}  // namespace gateloop::app
