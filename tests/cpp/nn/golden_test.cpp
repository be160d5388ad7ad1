// Parity with the installed gateloop-transformer: same weights in, same numbers out. The data is
// written by tests/golden/make_golden.py; its docstring describes the files.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "gateloop/checkpoint.h"
#include "gateloop/nn.h"

namespace {

using gateloop::checkpoint::SafeTensors;
using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

// Both packages compute in float32 what the peer also computed in float64. Summing in another order
// is allowed, losing digits is not. No channel of ours may be further from the float64 results than
// 16 times the worst channel of the peer's, each beside its own size. A channel is one draw of a
// rounding error, with heavy tails where a transition is close to zero: its gradient divides by
// |z|. In the geometric mean over all channels of a case we may be twice as far as the peer. The
// floor covers results where the peer happens to be almost exact, such as a loss (one number):
// eight roundings of 2^-24. See tests/python/parity.py.
constexpr double kMeanPeerErrors = 2;
constexpr double kSinglePeerErrors = 16;
constexpr double kFloor32 = 8 * 0x1p-24;
// In float64 nothing but the order of summation differs; the tails are the same.
constexpr double kTolerance64 = 5e-11;

/// The directory of the cases: that of the build, or what the environment names.
std::filesystem::path golden_dir() {
  const char* const named = std::getenv("GATELOOP_GOLDEN_DIR");
  return named == nullptr ? GATELOOP_GOLDEN_DIR : named;
}

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  if (std::filesystem::exists(golden_dir())) {
    for (const auto& entry : std::filesystem::directory_iterator(golden_dir())) {
      if (entry.path().extension() == ".safetensors") names.push_back(entry.path().stem());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// The entries "group/NAME" as NAME.
Tensors group(const SafeTensors& file, const std::string& name) {
  Tensors found;
  const auto prefix = name + "/";
  for (const auto& [key, tensor] : file.tensors) {
    if (key.starts_with(prefix)) found[key.substr(prefix.size())] = tensor;
  }
  return found;
}

void add_gradients(const torch::nn::Module& module, Tensors& result) {
  for (const auto& item : module.named_parameters()) {
    if (item.value().grad().defined()) result["grad/" + item.key()] = item.value().grad().clone();
  }
}

/// As run_transformer in make_golden.py.
Tensors run(gateloop::nn::Transformer model, const Tensors& input, double learning_rate) {
  Tensors result;
  const auto ids = input.at("ids");
  {
    const torch::NoGradGuard no_grad;
    result["logits"] = model->forward(ids.narrow(1, 0, ids.size(1) - 1));
  }
  const auto loss = model->loss(ids);
  loss.backward();
  result["loss"] = loss.detach().view({1});
  add_gradients(*model, result);

  torch::optim::Adam adam(model->parameters(), torch::optim::AdamOptions(learning_rate));
  std::vector<Tensor> losses;
  for (const auto& batch : input.at("adam").unbind(0)) {
    adam.zero_grad();
    const auto step_loss = model->loss(batch);
    step_loss.backward();
    adam.step();
    losses.push_back(step_loss.detach());
  }
  result["adam_losses"] = torch::stack(losses);
  return result;
}

/// As run_simple_layer in make_golden.py, but that the cache for the second part is the peer's.
Tensors run(gateloop::nn::SimpleGateLoopLayer layer, bool reverse, const Tensors& input,
            const Tensors& peer) {
  const auto dtype = layer->parameters().front().scalar_type();
  const auto x = input.at("x").to(dtype).clone().requires_grad_();
  const auto more = input.at("more").to(dtype);
  Tensors result;
  const auto y = layer->forward(x);
  y.backward(input.at("dy").to(dtype));
  result["y"] = y.detach();
  result["grad/x"] = x.grad();
  add_gradients(*layer, result);
  if (reverse) return result;

  const torch::NoGradGuard no_grad;
  gateloop::nn::SimpleGateLoopCache cache;
  const std::vector<std::pair<std::string, Tensor>> parts = {
      {"first", x}, {"second", more}, {"third", more.narrow(1, 0, 1)}};
  for (const auto& [part, sequence] : parts) {
    std::tie(result[part + "/y"], cache) = layer->forward_with_cache(sequence, cache);
    result[part + "/a"] = cache.a;
    result[part + "/kv"] = cache.kv;
    if (part == "first") cache = {peer.at("first/a").to(dtype), peer.at("first/kv").to(dtype)};
  }
  return result;
}

class Golden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    file_ = gateloop::checkpoint::load_safetensors(golden_dir() / (GetParam() + ".safetensors"));
    options_ = file_.metadata.at("options");
    is_transformer_ = file_.metadata.at("kind") == "transformer";
    torch::manual_seed(std::stoull(file_.metadata.at("seed")));
  }

  gateloop::nn::Transformer transformer() const {
    return gateloop::nn::Transformer(gateloop::model::options_from_json(options_));
  }

  gateloop::nn::SimpleGateLoopLayer simple_layer() const {
    const auto flags = nlohmann::json::parse(options_);
    return gateloop::nn::SimpleGateLoopLayer(
        file_.tensors.at("input/x").size(2),
        gateloop::nn::SimpleGateLoopLayerOptions{.prenorm = flags.value("prenorm", true),
                                                 .post_ln = flags.value("post_ln", false),
                                                 .reverse = flags.value("reverse", false)});
  }

  Tensors run_in(torch::ScalarType dtype) const {
    const auto prepare = [&](torch::nn::Module& module) {
      gateloop::checkpoint::load_state_dict(module, group(file_, "weights"));
      module.to(dtype);
    };
    if (is_transformer_) {
      auto model = transformer();
      prepare(*model);
      return run(model, group(file_, "input"), std::stod(file_.metadata.at("learning_rate")));
    }
    auto layer = simple_layer();
    prepare(*layer);
    return run(layer, nlohmann::json::parse(options_).value("reverse", false),
               group(file_, "input"), group(file_, "reference"));
  }

  /// Every result of the peer has its counterpart and no other exists: a parameter that gets no
  /// gradient there gets none here.
  void expect_same_names(const Tensors& result) const {
    std::set<std::string> ours, peers;
    for (const auto& [name, tensor] : result) ours.insert(name);
    for (const auto& [name, tensor] : group(file_, "reference")) peers.insert(name);
    EXPECT_EQ(ours, peers);
  }

  SafeTensors file_;
  std::string options_;
  bool is_transformer_ = false;
};

Tensor errors_of(const std::string& name, const Tensor& value, const Tensor& reference) {
  const bool of_weight = name.starts_with("grad/") && name != "grad/x";
  return of_weight ? weight_errors(value, reference) : channel_errors(value, reference);
}

TEST_P(Golden, Float32IsAsExactAsThePeer) {
  const auto result = run_in(torch::kFloat);
  expect_same_names(result);
  const auto peers = group(file_, "peer");
  std::vector<Tensor> log_ratios;
  for (const auto& [name, reference] : group(file_, "reference")) {
    const auto ours = errors_of(name, result.at(name), reference);
    const auto peer = errors_of(name, peers.at(name), reference);
    const auto worst = ours.max().item<double>(), theirs = peer.max().item<double>();
    EXPECT_LE(worst, kSinglePeerErrors * theirs + kFloor32)
        << name << ", channel " << ours.argmax().item<std::int64_t>() << ", the peer's worst is "
        << theirs;
    log_ratios.push_back(((ours + kFloor32) / (peer + kFloor32)).log());
    if (std::getenv("GATELOOP_VERBOSE"))
      std::printf("%-56s %.2e %.2e\n", name.c_str(), worst, theirs);
  }
  EXPECT_LE(std::exp(torch::cat(log_ratios).mean().item<double>()), kMeanPeerErrors);
}

TEST_P(Golden, Float64Equals) {
  const auto result = run_in(torch::kDouble);
  expect_same_names(result);
  for (const auto& [name, reference] : group(file_, "reference")) {
    const auto ours = errors_of(name, result.at(name), reference);
    const auto worst = ours.max().item<double>();
    EXPECT_LE(worst, kTolerance64) << name << ", channel " << ours.argmax().item<std::int64_t>();
    if (std::getenv("GATELOOP_VERBOSE")) std::printf("%-56s %.2e\n", name.c_str(), worst);
  }
}

// One seed draws the same weights in both packages: the same distributions in the same order.
TEST_P(Golden, SameSeedSameInitialWeights) {
  Tensors initial;
  const auto keep = [&](const torch::nn::Module& module) {
    for (const auto& item : module.named_parameters()) initial[item.key()] = item.value().detach();
  };
  is_transformer_ ? keep(*transformer()) : keep(*simple_layer());
  for (const auto& [name, head] : group(file_, "initial")) {
    const auto ours = initial.at(name).flatten().narrow(0, 0, head.numel());
    EXPECT_TRUE(torch::allclose(ours, head, /*rtol=*/1e-6, /*atol=*/0)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Peer, Golden, testing::ValuesIn(case_names()),
                         [](const auto& info) { return info.param; });

/// The generator writes the stamp last.
TEST(GoldenData, IsComplete) {
  EXPECT_TRUE(std::filesystem::exists(golden_dir() / "stamp"))
      << "run make_golden.py " << golden_dir();
  EXPECT_FALSE(case_names().empty());
}

}  // namespace
