#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "commands.h"
#include "corpus_flags.h"
#include "gateloop/runtime.h"
#include "model/config_file.h"
#include "model/provenance.h"
#include "model_flags.h"
#include "output.h"

namespace gateloop::app {
namespace {

using Bytes = std::span<const std::uint8_t>;

struct QuantizeFlags {
  std::string checkpoint;
  std::string out;
  runtime::Format format = runtime::Format::kInt8;
  CorpusFlags corpus;
  std::size_t last = 100'000;
  int threads = 0;
};

/// Bits per byte of a text, as the runtime reads it. Full attention costs time that grows with the
/// square of a text: it starts anew every 1024 bytes.
double score(const std::string& dir, Bytes text, std::optional<std::uint8_t> separator,
             int threads) {
  runtime::Session session = open_byte_session({.directory = dir, .threads = threads});
  const bool bounded = model::has_bounded_state(session.model().spec());
  return runtime::evaluate(session, text, {.window = bounded ? 0 : 1024, .separator = separator})
      .bits_per_byte();
}

void print_size(const char* name, const std::filesystem::path& dir, std::optional<double> bits) {
  std::printf("%-6s %lld bytes of weights", name,
              static_cast<long long>(runtime::Model(dir).weight_bytes()));
  if (bits) std::printf(", %.4f bits per byte", *bits);
  std::printf("\n");
}

/// `to` may hold that of another model.
void copy_tokenizer(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::filesystem::create_directories(to);
  if (!std::filesystem::exists(from / kTokenizer)) {
    std::filesystem::remove(to / kTokenizer);
    return;
  }
  std::filesystem::copy_file(from / kTokenizer, to / kTokenizer,
                             std::filesystem::copy_options::overwrite_existing);
}

void run(const QuantizeFlags& flags) {
  const std::filesystem::path from = flags.checkpoint, to = flags.out;
  check_directory(flags.checkpoint);
  if (std::filesystem::exists(to) && std::filesystem::equivalent(from, to))
    throw UsageError("--out must be another directory than --checkpoint");
  std::optional<corpus::Corpus> corpus;
  Bytes text;
  if (!flags.corpus.data.empty()) {
    corpus.emplace(open_corpus_for(flags.checkpoint, flags.corpus));
    report_left_out(*corpus);
    text = corpus->bytes();
    text = text.last(std::min(text.size(), flags.last));
    if (text.size() < 2)
      throw UsageError(corpus->name() + " has " + std::to_string(text.size()) +
                       " bytes: at least 2 are needed");
  }
  std::optional<double> before, after;
  if (corpus) before = score(flags.checkpoint, text, corpus->separator(), flags.threads);
  copy_tokenizer(from, to);  // before the weights: without it they are read as bytes
  runtime::quantize(from, to, flags.format);
  model::add_provenance(to, model::provenance());
  if (corpus) after = score(flags.out, text, corpus->separator(), flags.threads);
  print_size("before", from, before);
  print_size("after", to, after);
  if (corpus)
    std::printf("loss   %+.4f bits per byte over the last %zu bytes of %s\n", *after - *before,
                text.size(), corpus->name().c_str());
  flush_output();
}

}  // namespace

void add_quantize_command(CLI::App& app) {
  using runtime::Format;
  auto flags = std::make_shared<QuantizeFlags>();
  auto* command = app.add_subcommand(
      "quantize", "Write a model's weights in a smaller format, and say what that costs.");
  add_directory_flag(*command, flags->checkpoint);
  command->add_option("--out", flags->out, "Directory for the smaller model (required)")
      ->required()
      ->type_name("DIR");
  command
      ->add_option("--format", flags->format,
                   "Of the matrices (default int8, with one scale for each row)")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, Format>{{"int8", Format::kInt8}, {"bfloat16", Format::kBFloat16}}))
      ->type_name("int8|bfloat16");
  CLI::Option* const data =
      add_data_flags(*command, flags->corpus, "Text to measure bits per byte on, before and after");
  add_no_documents_flag(*command, flags->corpus.no_documents, "The text is one");
  for (const char* of_data : {"--field", "--documents", "--no-documents"})
    command->get_option(of_data)->needs(data);
  command
      ->add_option("--last", flags->last,
                   "Only so many bytes from the end of the text (default 100000)")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  add_threads_flag(*command, flags->threads);
  command->callback([flags] { run(*flags); });
}

}  // namespace gateloop::app
