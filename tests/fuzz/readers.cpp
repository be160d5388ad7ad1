#include "readers.h"

#include <archive.h>
#include <archive_entry.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "gateloop/checkpoint.h"
#include "gateloop/nn/runtime_model.h"
#include "gateloop/runtime.h"
#include "gateloop/training.h"
#include "model/digest.h"
#include "model/file.h"
#include "training/metrics.h"

namespace gateloop::fuzz {
namespace {

using std::filesystem::path;

void write(const path& file, const std::string& bytes) {
  std::ofstream(file, std::ios::binary) << bytes;
}

/// A header of `json`, the length before it as the format has it, then `data`.
std::string safetensors(const std::string& json, std::size_t data) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(json.size() >> (8 * i));
  return bytes + json + std::string(data, '\1');
}

void write_safetensors(const path& directory) {
  checkpoint::save_safetensors(directory / "two",
                               {{{"a", torch::ones({2, 3})}, {"b", torch::ones({4})}},
                                {{"format", "pt"}, {"config", "{}"}}});
  write(directory / "half", safetensors(R"({"w":{"dtype":"F16","shape":[2,2],)"
                                        R"("data_offsets":[0,8]}})",
                                        8));
  write(directory / "empty", safetensors(R"({"w":{"dtype":"F32","shape":[0,7],)"
                                         R"("data_offsets":[0,0]},"__metadata__":{"k":"v"}})",
                                         0));
}

nn::TransformerOptions small() { return {.num_tokens = 256, .dim = 2, .depth = 1}; }

/// Every kind of state.
nn::TransformerOptions mixed() {
  return {.num_tokens = 8,
          .dim = 4,
          .depth = 3,
          .dim_head = 2,
          .heads = 2,
          .ff_mult = 1,
          .window = 3,
          .simple_gate_loop = model::SimpleGateLoopSpec{},
          .layer_pattern = "gate_loop,attention,none"};
}

constexpr std::int64_t kIds[] = {1, 2, 3, 4, 5, 6};

runtime::Session mixed_session() {
  torch::manual_seed(1);
  return runtime::Session(nn::runtime_model(nn::Transformer(mixed())), {.threads = 1});
}

void write_states(const path& directory) {
  auto session = mixed_session();
  session.state().save(directory / "start");
  session.prefill(kIds);
  session.state().save(directory / "one");
  session.set_state({});
  session.prefill(kIds, 3);
  session.state().save(directory / "three");
}

/// With a checksum that fits: else next to every mutated file would be refused by it.
void read_state(const path& directory) {
  static runtime::Session session = mixed_session();
  std::string bytes = model::read_text(directory / "state");
  std::uint64_t checksum = 0;
  if (bytes.size() > sizeof checksum) {
    model::Digest digest;
    digest.add(bytes.data(), bytes.size() - sizeof checksum);
    checksum = digest.value();
    std::memcpy(bytes.data() + bytes.size() - sizeof checksum, &checksum, sizeof checksum);
    write(directory / "state", bytes);
  }
  auto state = runtime::State::load(directory / "state");
  const std::int64_t batch = std::max<std::int64_t>(1, state.batch());
  session.set_state(std::move(state));
  if (batch > 1000) return;
  session.step(std::vector<std::int64_t>(static_cast<std::size_t>(batch), 1));
}

/// In float32 and in int8.
void write_weights(const path& directory) {
  const path wide = directory.parent_path() / "wide", narrow = directory.parent_path() / "narrow";
  checkpoint::save_model(nn::Transformer(mixed()), wide);
  runtime::quantize(wide, narrow, runtime::Format::kInt8);
  for (const path& from : {wide, narrow})
    std::filesystem::copy_file(from / "model.safetensors", directory / from.filename());
}

void read_weights(const path& directory) {
  if (!std::filesystem::exists(directory / "config.json"))
    std::filesystem::copy_file(directory / "wide/config.json", directory / "config.json");
  runtime::Session session(runtime::Model(directory), {.threads = 1});
  session.prefill(kIds);
}

void write_configs(const path& directory) {
  training::RunConfig run;
  run.model = small();
  run.training.steps = 3;
  write(directory / "run", training::to_json(run));
  run.model = mixed();
  run.model.num_tokens = 256;
  write(directory / "layers", training::to_json(run));
  run.model.layers = model::resolve(run.model).layers;
  write(directory / "list", training::to_json(run));
}

void read_config(const path& directory) {
  (void)model::weight_table(model::resolve(training::load_config(directory).model));
}

void write_metrics(const path& directory) {
  std::string lines;
  for (std::int64_t step = 1; step <= 3; ++step) {
    training::StepMetrics metrics;
    metrics.step = step;
    metrics.validation_bits_per_byte = 2.5;
    lines += training::to_json_line(metrics) + "\n";
  }
  write(directory / "lines", lines);
  write(directory / "cut", lines.substr(0, lines.size() - 7));
}

/// `text` in a file, packed by libarchive. Throws where this libarchive lacks a format.
void pack(const path& file, int (*format)(archive*), int (*filter)(archive*),
          const std::string& text) {
  const std::unique_ptr<archive, int (*)(archive*)> out(archive_write_new(), archive_write_free);
  const std::unique_ptr<archive_entry, void (*)(archive_entry*)> entry(archive_entry_new(),
                                                                       archive_entry_free);
  archive_entry_set_pathname(entry.get(), "plain");
  archive_entry_set_filetype(entry.get(), AE_IFREG);
  archive_entry_set_perm(entry.get(), 0644);
  archive_entry_set_mtime(entry.get(), 0, 0);
  archive_entry_set_size(entry.get(), static_cast<la_int64_t>(text.size()));
  const auto written = static_cast<la_ssize_t>(text.size());
  // A filter by a program beside libarchive is a warning, not ARCHIVE_OK.
  if (format(out.get()) != ARCHIVE_OK || filter(out.get()) != ARCHIVE_OK ||
      archive_write_set_bytes_in_last_block(out.get(), 1) != ARCHIVE_OK ||
      archive_write_open_filename(out.get(), file.c_str()) != ARCHIVE_OK ||
      archive_write_header(out.get(), entry.get()) != ARCHIVE_OK ||
      archive_write_data(out.get(), text.data(), text.size()) != written ||
      archive_write_close(out.get()) != ARCHIVE_OK) {
    const char* const reason = archive_error_string(out.get());
    throw std::runtime_error("pack: cannot write " + file.string() + ": " +
                             (reason == nullptr ? "no reason given" : reason));
  }
}

/// The same text in every format that a corpus may have.
void write_texts(const path& directory) {
  std::string text(200, 'a');
  text += "\nplain text\n";
  write(directory / "plain", text);
  const auto raw = [&](const char* name, int (*filter)(archive*)) {
    pack(directory / name, archive_write_set_format_raw, filter, text);
  };
  raw("gz", archive_write_add_filter_gzip);
  raw("bz2", archive_write_add_filter_bzip2);
  raw("xz", archive_write_add_filter_xz);
  raw("zst", archive_write_add_filter_zstd);
  raw("lz", archive_write_add_filter_lzip);
  raw("lz4", archive_write_add_filter_lz4);
  raw("Z", archive_write_add_filter_compress);
  const auto whole = [&](const char* name, int (*format)(archive*)) {
    pack(directory / name, format, archive_write_add_filter_none, text);
  };
  whole("tar", archive_write_set_format_ustar);
  whole("zip", archive_write_set_format_zip);
  whole("7z", archive_write_set_format_7zip);
}

void write_json_lines(const path& directory) {
  write(directory / "sample",
        "{\"text\": \"one\\u00e9\", \"id\": [1, {}]}\n\n{\"text\": \"two\"}\r\n");
}

}  // namespace

const std::vector<Reader>& readers() {
  static const std::vector<Reader> all = {
      {"safetensors", "model.safetensors", write_safetensors,
       [](const path& d) { (void)checkpoint::load_safetensors(d / "model.safetensors"); }},
      {"weights", "model.safetensors", write_weights, read_weights},
      {"state", "state", write_states, read_state},
      {"config", "config.json", write_configs, read_config},
      {"metrics", "metrics.jsonl", write_metrics,
       [](const path& d) { training::MetricsLog(d / "metrics.jsonl", 2).flush(); }},
      {"corpus", "text", write_texts,
       [](const path& d) { (void)training::Corpus(d / "text").fingerprint(); }},
      {"json_lines", "lines", write_json_lines,
       [](const path& d) {
         (void)training::Corpus({.paths = {d / "lines"}, .field = "text", .documents = true});
       }},
  };
  return all;
}

bool accepts(const Reader& reader, const path& directory, std::string_view bytes) {
  std::ofstream(directory / reader.file, std::ios::binary) << bytes;
  try {
    reader.read(directory);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace gateloop::fuzz
