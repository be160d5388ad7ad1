#include "readers.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <utility>
#include <vector>

#include "gateloop/checkpoint.h"
#include "gateloop/nn/runtime_model.h"
#include "gateloop/runtime.h"
#include "gateloop/training.h"
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

void read_state(const path& directory) {
  static runtime::Session session = mixed_session();
  auto state = runtime::State::load(directory / "state");
  const std::int64_t batch = std::max<std::int64_t>(1, state.batch());
  session.set_state(std::move(state));
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

/// What packs the same text in every format that a corpus may have; those absent here are left out.
void write_texts(const path& directory) {
  write(directory / "plain", std::string(200, 'a') + "\nplain text\n");
  for (const char* command : {"gzip -k -S .gz", "bzip2 -k", "xz -k", "zstd -q -k",
                              "zip -q plain.zip", "tar cf plain.tar"}) {
    const std::string line = "cd '" + directory.string() + "' && " + command + " plain 2>/dev/null";
    if (std::system(line.c_str()) != 0) continue;
  }
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
  };
  return all;
}

}  // namespace gateloop::fuzz
