#include <gtest/gtest.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "gateloop/checkpoint.h"
#include "gateloop/generation.h"
#include "gateloop/nn/runtime_model.h"
#include "model/file.h"
#include "temporary_directory.h"

namespace gateloop::checkpoint {
namespace {

using test::TemporaryDirectory;

nn::TransformerOptions small_options() {
  nn::TransformerOptions options;
  options.dim = 16;
  options.depth = 2;
  return options;
}

/// The same options and, to the last bit, the same weights.
bool equal(const nn::Transformer& left, const nn::Transformer& right) {
  const auto ours = state_dict(*left);
  const auto theirs = state_dict(*right);
  return model::to_json(left->options()) == model::to_json(right->options()) &&
         ours.size() == theirs.size() &&
         std::equal(ours.begin(), ours.end(), theirs.begin(), [](const auto& one, const auto& two) {
           return one.first == two.first && torch::equal(one.second, two.second);
         });
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Model, LoadsWhatWasSaved) {
  const TemporaryDirectory dir;
  torch::manual_seed(1);
  nn::Transformer model(small_options());
  save_model(model, dir.path());
  nn::Transformer loaded = load_model(dir.path());
  const torch::Tensor ids = torch::arange(12).view({2, 6});
  EXPECT_TRUE(torch::equal(loaded->forward(ids), model->forward(ids)));
  EXPECT_FALSE(loaded->is_training());
}

TEST(Model, ModulesOfAMappedModelAreThoseOfItsFile) {
  const TemporaryDirectory dir;
  torch::manual_seed(3);
  save_model(nn::Transformer(small_options()), dir / "float32");
  using runtime::Format;
  runtime::quantize(dir / "float32", dir / "int8", Format::kInt8);
  runtime::quantize(dir / "float32", dir / "bfloat16", Format::kBFloat16);
  for (const char* stored : {"float32", "int8", "bfloat16"}) {
    const nn::Transformer expected = load_model(dir / stored);
    for (const Format format : {Format::kFile, Format::kInt8}) {
      std::optional<runtime::Model> mapped(std::in_place, dir / stored,
                                           runtime::OpenOptions{.format = format});
      nn::Transformer modules = nn::modules_of(*mapped);
      mapped.reset();
      EXPECT_TRUE(equal(modules, expected)) << stored;
      EXPECT_FALSE(modules->is_training());
      for (const auto& parameter : modules->parameters()) EXPECT_FALSE(parameter.requires_grad());
    }
  }
}

TEST(Model, ModulesOfAMappedModelAreInItsMemory) {
  const TemporaryDirectory dir;
  save_model(nn::Transformer(small_options()), dir.path());
  const runtime::Model mapped(dir.path());
  const auto modules = nn::modules_of(mapped);
  const auto parameters = modules->named_parameters();
  const auto weights = mapped.weights();
  EXPECT_EQ(weights.size(), parameters.size());
  for (const auto& weight : weights)
    EXPECT_EQ(parameters[weight.name].const_data_ptr(), weight.data) << weight.name;
}

TEST(Model, AModuleReaderReadsAsASession) {
  nn::TransformerOptions options = small_options();
  options.depth = 3;
  options.layer_pattern = "none,gate_loop,attention";
  torch::manual_seed(3);
  const nn::Transformer transformer(options);
  runtime::Session session(nn::runtime_model(transformer));
  nn::ModuleReader modules(transformer);
  std::string text(300, 'a');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 127);
  const std::span bytes(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  for (const std::int64_t window : {0, 64}) {
    const runtime::EvaluateOptions cut{.window = window, .separator = 3, .bytes_at_once = 100};
    const auto expected = runtime::evaluate(session, bytes, cut);
    const auto score = runtime::evaluate(modules, bytes, cut);
    EXPECT_EQ(score.bytes, expected.bytes);
    EXPECT_NEAR(score.nats, expected.nats, 1e-5 * expected.nats);
  }
  const std::vector<std::int64_t> prompt = {1, 2, 3, 4, 5, 6};
  for (runtime::Reader* reader :
       {static_cast<runtime::Reader*>(&session), static_cast<runtime::Reader*>(&modules)})
    reader->restart();
  const generation::GenerateOptions greedy{.length = 20, .sampling = {.temperature = 0}};
  EXPECT_EQ(generation::generate(modules, prompt, 2, greedy),
            generation::generate(session, prompt, 2, greedy));
  EXPECT_EQ(modules.position(), 3 + 19);
  EXPECT_EQ(modules.position(), session.position());
  EXPECT_GT(modules.state_bytes(), 0);

  const std::vector<std::int64_t> outside = {0, -1}, three = {1, 2, 3};
  for (runtime::Reader* reader :
       {static_cast<runtime::Reader*>(&session), static_cast<runtime::Reader*>(&modules)}) {
    reader->restart();
    EXPECT_EQ(reader->position(), 0);
    EXPECT_THROW(reader->prefill(outside, 2), std::invalid_argument);
    EXPECT_THROW(reader->prefill(three, 2), std::invalid_argument);
    EXPECT_THROW(reader->prefill({}, 1), std::invalid_argument);
    EXPECT_THROW(reader->surprise(three, outside), std::invalid_argument);
    EXPECT_THROW(reader->surprise(three, prompt), std::invalid_argument);
    reader->prefill(prompt, 2);
    EXPECT_THROW(reader->prefill(three, 1), std::invalid_argument);
  }
}

TEST(Model, AModuleReaderReadsALongPromptInParts) {
  nn::TransformerOptions options = small_options();
  options.num_tokens = 16;
  const nn::Transformer transformer(options);
  runtime::Session session(nn::runtime_model(transformer));
  nn::ModuleReader modules(transformer);
  std::vector<std::int64_t> prompt(20000);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int64_t>(i * i % 7);
  const auto expected = session.prefill(prompt, 2), found = modules.prefill(prompt, 2);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-4);
  EXPECT_EQ(modules.position(), 10000);
}

TEST(Model, ModulesNeedAModelFromADirectory) {
  const auto in_memory = nn::runtime_model(nn::Transformer(small_options()));
  EXPECT_THROW(nn::modules_of(in_memory), std::invalid_argument);
}

TEST(Model, ChecksumTellsTheLastNumberOfAWeight) {
  const TemporaryDirectory dir;
  const auto checksum = [&] { return runtime::Model(dir.path()).checksum(); };
  nn::Transformer model(small_options());
  save_model(model, dir.path());
  const std::string before = checksum();
  EXPECT_EQ(before.size(), 16);
  EXPECT_EQ(checksum(), before);
  const torch::NoGradGuard no_grad;
  model->parameters().back().flatten()[-1].add_(1);
  save_model(model, dir.path());
  EXPECT_NE(checksum(), before);
}

TEST(Model, ReadsDirectoriesOfEarlierVersions) {
  const TemporaryDirectory dir;
  nn::Transformer model(small_options());
  model::save_text(
      dir / "config.json",
      R"({"format": 1, "model": )" + model::to_json(model->options()) + R"(, "training": {}})");
  save_safetensors(dir / "model.safetensors", {state_dict(*model), {{"step", "7"}}});
  EXPECT_TRUE(equal(load_model(dir.path()), model));
  EXPECT_TRUE(load_provenance(dir.path()).empty());
}

TEST(Model, SavingSaysWhatSaved) {
  const TemporaryDirectory dir;
  save_model(nn::Transformer(small_options()), dir.path());
  const auto written = load_provenance(dir.path());
  ASSERT_EQ(written.size(), 1U);
  for (const char* expected : {"\"program\":\"gateloop ", "\"revision\":\"", "\"torch\":\"",
                               "\"processor\":\"", "\"command\":[\"", "\"date\":\"20"}) {
    EXPECT_NE(written[0].find(expected), std::string::npos) << expected << " in " << written[0];
  }
}

/// Of a system call that the stopped process begins: f of fsync, r of a rename, nothing of others.
std::string letter_of_call(pid_t stopped) {
  __ptrace_syscall_info info{};
  ::ptrace(PTRACE_GET_SYSCALL_INFO, stopped, sizeof info, &info);
  if (info.op != PTRACE_SYSCALL_INFO_ENTRY) return "";
  switch (info.entry.nr) {
    case SYS_fsync:
      return "f";
#ifdef SYS_rename
    case SYS_rename:
#endif
#ifdef SYS_renameat
    case SYS_renameat:
#endif
    case SYS_renameat2:
      return "r";
    default:
      return "";
  }
}

/// Runs `act` in a child process that is killed at its `number`-th stop: a child stops before and
/// after each of its system calls. False where it ended before. Appends to `calls` their letters.
bool killed_at(int number, const std::function<void()>& act, std::string& calls) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::raise(SIGSTOP);
    act();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ::ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_TRACESYSGOOD);
  for (int stops = 0; WIFSTOPPED(status); ++stops) {
    calls += letter_of_call(child);
    if (stops == number) ::kill(child, SIGKILL);
    ::ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
    ::waitpid(child, &status, 0);
  }
  EXPECT_TRUE(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
  return WIFSIGNALED(status);
}

TEST(Model, AKilledSaveLeavesOneModel) {
  const TemporaryDirectory dir;
  nn::TransformerOptions wide = small_options();
  wide.dim = 24;
  nn::TransformerOptions inner_norm = small_options();
  inner_norm.post_ln_norm = true;  // other options, the same tensors
  nn::Transformer old_model(small_options());
  for (const nn::TransformerOptions& options : {wide, inner_norm}) {
    nn::Transformer new_model(options);
    std::string found, calls;
    int number = 0;
    do {
      save_model(old_model, dir.path());
      std::filesystem::copy(dir / "model.safetensors", dir / "model.best.safetensors");
      calls.clear();
      if (!killed_at(
              number++, [&] { save_model(new_model, dir.path()); }, calls))
        break;
      nn::Transformer loaded = load_model(dir.path());
      const bool is_new = equal(loaded, new_model);
      ASSERT_TRUE(is_new || equal(loaded, old_model)) << "killed at " << number;
      found += is_new ? 'n' : 'o';
      if (std::filesystem::exists(dir / "model.best.safetensors")) {
        EXPECT_TRUE(equal(load_model(dir.path(), Weights::kBest), old_model));
      }
    } while (number < 2000);
    EXPECT_TRUE(equal(load_model(dir.path()), new_model));
    // Of the weights and the configuration: the file to the disk, its rename, the folder.
    EXPECT_EQ(calls, "frffrf");
    // The old one, and from some call on the new one.
    EXPECT_GT(found.find('n'), 20U);
    EXPECT_LT(found.find('n'), found.size());
#ifndef __SANITIZE_ADDRESS__  // it makes system calls of its own, now more and now fewer
    EXPECT_GT(found.find('n'), found.rfind('o'));
#endif
  }
}

TEST(Model, TiedWeightsAreSavedUnderBothNames) {
  const TemporaryDirectory dir;
  nn::Transformer model(small_options());
  const auto parameters = model->named_parameters();
  parameters["to_logits.1.weight"].set_data(parameters["token_emb.weight"].data());
  save_model(model, dir.path());
  EXPECT_TRUE(equal(load_model(dir.path()), model));
}

TEST(Model, StateDictSharesNoMemory) {
  nn::Transformer model(small_options());
  const auto before = state_dict(*model);
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.add_(1);
  }
  for (const auto& [name, tensor] : state_dict(*model)) {
    EXPECT_FALSE(torch::equal(tensor, before.at(name))) << name;
  }
}

TEST(Model, LoadStateDictNamesEveryProblem) {
  nn::Transformer model(small_options());
  auto tensors = state_dict(*model);
  const auto before = state_dict(*model);
  const std::string gone = tensors.begin()->first;
  tensors.erase(gone);
  const std::string misshapen = tensors.begin()->first;
  tensors[misshapen] = torch::zeros({3, 5});
  tensors["extra"] = torch::zeros({2});
  const std::string message = message_of([&] { load_state_dict(*model, tensors); });
  EXPECT_NE(message.find("missing " + gone), std::string::npos) << message;
  EXPECT_NE(message.find(misshapen + " is (3, 5)"), std::string::npos) << message;
  EXPECT_NE(message.find("unexpected extra (2)"), std::string::npos) << message;
  for (const auto& [name, tensor] : state_dict(*model)) {  // nothing was copied
    EXPECT_TRUE(torch::equal(tensor, before.at(name))) << name;
  }
}

TEST(Model, LoadModelNamesTheFile) {
  const TemporaryDirectory dir;
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("no config.json"), std::string::npos);

  nn::Transformer model(small_options());
  save_model(model, dir.path());
  EXPECT_NE(
      message_of([&] { load_model(dir.path(), Weights::kBest); }).find("model.best.safetensors"),
      std::string::npos);

  // config.json edited by hand holds: its id is that of the weights.
  std::string config = model::read_text(dir / "config.json");
  config.replace(config.find("\"dim\": 16"), 9, "\"dim\": 32");
  model::save_text(dir / "config.json", config);
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("not this model's"),
            std::string::npos);
  model::save_text(dir / "config.json", R"({"format": 2, "model": {}})");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("format 2"), std::string::npos);
  save_safetensors(dir / "model.safetensors", {state_dict(*model), {}});
  model::save_text(dir / "config.json", R"({"format": 1, "model": {"width": 3}})");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("\"width\""), std::string::npos);
  // The message printed the value by recursion: 100,000 levels overflow the stack.
  const std::string deep = std::string(300'000, '[') + std::string(300'000, ']');
  model::save_text(dir / "config.json", R"({"model": {}, "format": )" + deep + "}");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("levels or deeper"),
            std::string::npos);
}

}  // namespace
}  // namespace gateloop::checkpoint
