#include "training/optimizer.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "in_processes.h"

namespace gateloop::training {
namespace {

struct Net : torch::nn::Module {
  Net() {
    first = register_module("first", torch::nn::Linear(5, 300));
    second = register_module("second", torch::nn::Linear(300, 3));
    unused = register_parameter("unused", torch::ones({4, 4}));
  }
  torch::Tensor loss(const torch::Tensor& x) {
    return second->forward(first->forward(x).tanh()).square().sum();
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
  torch::Tensor unused;
};

std::pair<std::shared_ptr<Net>, std::shared_ptr<Net>> twins() {
  auto one = std::make_shared<Net>();
  auto two = std::make_shared<Net>();
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < one->parameters().size(); ++i) {
    two->parameters()[i].copy_(one->parameters()[i]);
  }
  return {one, two};
}

/// Ten updates of ours and of libtorch's beside each other, at a learning rate that changes.
void compare(const TrainingOptions& options, torch::optim::Optimizer& theirs, Net& reference,
             Net& net) {
  Optimizer ours(net, options);
  for (int step = 0; step < 10; ++step) {
    const double rate = 1e-2 / (1 + step);
    const torch::Tensor x = torch::randn({7, 5});
    theirs.zero_grad();
    reference.loss(x).backward();
    const double reference_norm =
        options.clip > 0 ? torch::nn::utils::clip_grad_norm_(reference.parameters(), options.clip)
                         : torch::nn::utils::clip_grad_norm_(reference.parameters(), 1e30);
    for (auto& group : theirs.param_groups()) group.options().set_lr(rate);
    theirs.step();

    ours.zero_grad();
    net.loss(x).backward();
    const double norm = ours.gradient_norm();
    EXPECT_NEAR(norm, reference_norm, 1e-5 * reference_norm);
    ours.step(rate, norm);
  }
  const auto expected = reference.parameters();
  const auto got = net.parameters();
  for (std::size_t i = 0; i < got.size(); ++i) {
    // Two float32 evaluations of one formula in another order, ten times: a few units in the last
    // place of the update (1e-2) and of the parameter (below 1).
    EXPECT_TRUE(torch::allclose(got[i], expected[i], 1e-5, 1e-6))
        << "parameter " << i << ": " << (got[i] - expected[i]).abs().max().item<float>();
  }
}

TEST(Optimizer, EqualsTorchsAdam) {
  torch::manual_seed(0);
  for (const double clip : {0.0, 0.5, 1e6}) {
    auto [reference, net] = twins();
    TrainingOptions options;
    options.optimizer = "adam";
    options.clip = clip;
    torch::optim::Adam theirs(reference->parameters(),
                              torch::optim::AdamOptions(1e-2).betas({0.9, 0.99}).eps(1e-8));
    compare(options, theirs, *reference, *net);
  }
}

TEST(Optimizer, EqualsTorchsAdamWWithDecayOfMatrices) {
  torch::manual_seed(1);
  auto [reference, net] = twins();
  TrainingOptions options;
  options.optimizer = "adamw";
  options.beta2 = 0.98;
  options.weight_decay = 0.1;
  std::vector<torch::Tensor> matrices, others;
  for (const auto& parameter : reference->parameters()) {
    (parameter.dim() >= 2 ? matrices : others).push_back(parameter);
  }
  const auto base = torch::optim::AdamWOptions(1e-2).betas({0.9, 0.98}).eps(1e-8);
  auto decaying = std::make_unique<torch::optim::AdamWOptions>(base);
  decaying->weight_decay(0.1);
  auto plain = std::make_unique<torch::optim::AdamWOptions>(base);
  plain->weight_decay(0);
  torch::optim::AdamW theirs({torch::optim::OptimizerParamGroup(matrices, std::move(decaying)),
                              torch::optim::OptimizerParamGroup(others, std::move(plain))},
                             base);
  compare(options, theirs, *reference, *net);
}

TEST(Optimizer, LeavesParametersWithoutGradientAlone) {
  auto [reference, net] = twins();
  TrainingOptions options;
  Optimizer optimizer(*net, options);
  net->loss(torch::randn({2, 5})).backward();
  optimizer.step(0.1, optimizer.gradient_norm());
  EXPECT_TRUE(torch::equal(net->unused, torch::ones({4, 4})));
}

TEST(Optimizer, StateContinuesBitForBit) {
  torch::manual_seed(2);
  auto [one, two] = twins();
  TrainingOptions options;
  Optimizer unbroken(*one, options);
  const auto update = [](Net& net, Optimizer& optimizer, const torch::Tensor& x) {
    optimizer.zero_grad();
    net.loss(x).backward();
    optimizer.step(1e-2, optimizer.gradient_norm());
  };
  const torch::Tensor first = torch::randn({3, 5});
  const torch::Tensor second = torch::randn({3, 5});
  update(*one, unbroken, first);
  {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < two->parameters().size(); ++i) {
      two->parameters()[i].copy_(one->parameters()[i]);
    }
  }
  Optimizer resumed(*two, options);
  resumed.load(unbroken.state(), 1);
  update(*one, unbroken, second);
  update(*two, resumed, second);
  for (std::size_t i = 0; i < two->parameters().size(); ++i) {
    EXPECT_TRUE(torch::equal(two->parameters()[i], one->parameters()[i])) << i;
  }
}

/// Parameters of 1000, 900 .. 100 numbers.
struct Rows : torch::nn::Module {
  Rows() {
    for (std::int64_t i = 1; i <= 10; ++i) {
      register_parameter("row" + std::to_string(i), torch::ones({1100 - 100 * i}));
    }
  }
};
constexpr std::int64_t kNumbersOfRows = 5500;

/// Bytes that this thread has allocated for tensors and not freed.
struct HeldBytes : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void* /*ptr*/, std::int64_t change, std::size_t /*allocated*/,
                         std::size_t /*reserved*/, c10::Device /*device*/) override {
    bytes += change;
  }
  bool memoryProfilingEnabled() const override { return true; }
  std::int64_t bytes = 0;
};

TEST(Optimizer, ShardedEachProcessHoldsTheMomentsOfItsShare) {
  constexpr int kProcesses = 3;
  constexpr std::int64_t kMoments = 2 * 4 * kNumbersOfRows, kCounter = 4;
  for (const bool sharded : {false, true}) {
    TrainingOptions options;
    options.shard_optimizer = sharded;
    std::vector<std::int64_t> held(kProcesses);
    test::in_processes(kProcesses, [&](const distributed::Communicator& communicator) {
      const Rows model;
      const auto memory = std::make_shared<HeldBytes>();
      const c10::DebugInfoGuard counted(c10::DebugInfoKind::PROFILER_STATE, memory);
      const Optimizer optimizer(model, options, communicator);
      held[static_cast<std::size_t>(communicator.rank())] = memory->bytes - kCounter;
      EXPECT_EQ(optimizer.state().size(), communicator.is_main() ? 20U : 0U);
    });
    const auto total = std::accumulate(held.begin(), held.end(), std::int64_t{0});
    EXPECT_EQ(total, sharded ? kMoments : kProcesses * kMoments);
    // A third each, to within the smallest parameters.
    const std::int64_t most = sharded ? kMoments / kProcesses + 2 * 4 * 200 : kMoments;
    for (const std::int64_t bytes : held) EXPECT_LE(bytes, most);
  }
}

TEST(Optimizer, CheckNamesWhatDoesNotFit) {
  Net net;
  Optimizer optimizer(net, TrainingOptions{});
  auto state = optimizer.state();
  optimizer.check(state);
  state["exp_avg.first.bias"] = torch::zeros({2});
  EXPECT_THROW(optimizer.check(state), std::runtime_error);
  state.erase("exp_avg.first.bias");
  EXPECT_THROW(optimizer.check(state), std::runtime_error);
}

}  // namespace
}  // namespace gateloop::training
