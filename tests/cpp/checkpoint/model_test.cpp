#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>

#include "gateloop/checkpoint.h"
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

void save_model(const std::filesystem::path& dir, nn::Transformer& model) {
  save_text(dir / "config.json",
            R"({"format": 1, "model": )" + to_json(model->options()) + R"(, "training": {}})");
  save_safetensors(dir / "model.safetensors", {state_dict(*model), {}});
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
  save_model(dir.path(), model);
  nn::Transformer loaded = load_model(dir.path());
  const torch::Tensor ids = torch::arange(12).view({2, 6});
  EXPECT_TRUE(torch::equal(loaded->forward(ids), model->forward(ids)));
  EXPECT_FALSE(loaded->is_training());
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
  EXPECT_NE(message.find(misshapen + " is [3, 5]"), std::string::npos) << message;
  EXPECT_NE(message.find("unexpected extra [2]"), std::string::npos) << message;
  for (const auto& [name, tensor] : state_dict(*model)) {  // nothing was copied
    EXPECT_TRUE(torch::equal(tensor, before.at(name))) << name;
  }
}

TEST(Model, LoadModelNamesTheFile) {
  const TemporaryDirectory dir;
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("no config.json"), std::string::npos);

  nn::Transformer model(small_options());
  save_model(dir.path(), model);
  EXPECT_NE(
      message_of([&] { load_model(dir.path(), Weights::kBest); }).find("model.best.safetensors"),
      std::string::npos);

  nn::TransformerOptions other = small_options();
  other.dim = 32;
  save_text(dir / "config.json", R"({"format": 1, "model": )" + to_json(other) + "}");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("not this model's"),
            std::string::npos);
  save_text(dir / "config.json", R"({"format": 2, "model": {}})");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("format 2"), std::string::npos);
  save_text(dir / "config.json", R"({"format": 1, "model": {"width": 3}})");
  EXPECT_NE(message_of([&] { load_model(dir.path()); }).find("\"width\""), std::string::npos);
}

}  // namespace
}  // namespace gateloop::checkpoint
