// Models on one sequence over many processes, which are threads here: the same as on all of it.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <barrier>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "compare.h"
#include "gateloop/distributed_ops.h"
#include "gateloop/nn.h"
#include "gateloop/ops.h"

namespace time_sharding_test {

using namespace gateloop::nn;
using torch::Tensor;

// In float64 the two ways differ by the order of their sums only.
constexpr double kSameTolerance = 1e-12;
constexpr std::int64_t kTime = 23;

struct Done : c10d::Work {
  bool wait(std::chrono::milliseconds) override { return true; }
};

/// What the threads of a group read of each other, between two barriers.
struct Shared {
  explicit Shared(int size)
      : meeting(size),
        sent(static_cast<std::size_t>(size)),
        sizes(static_cast<std::size_t>(size)) {}
  std::barrier<> meeting;
  std::vector<Tensor> sent;
  std::vector<std::vector<std::int64_t>> sizes;
};

/// The collectives that time sharding needs, between threads of one process.
class Threads : public c10d::Backend {
 public:
  Threads(int rank, int size, std::shared_ptr<Shared> shared)
      : Backend(rank, size), shared_(std::move(shared)) {}
  const std::string getBackendName() const override { return "threads"; }

  c10::intrusive_ptr<c10d::Work> _allgather_base(Tensor& out, Tensor& in,
                                                 const c10d::AllgatherOptions&) override {
    return exchange(in, {}, [&] { out.copy_(at::cat(shared_->sent)); });
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(Tensor& out, Tensor& in,
                                               std::vector<std::int64_t>& out_sizes,
                                               std::vector<std::int64_t>& in_sizes,
                                               const c10d::AllToAllOptions&) override {
    const auto rank = static_cast<std::size_t>(getRank());
    return exchange(in, in_sizes, [&] {
      std::vector<Tensor> parts;
      for (std::size_t i = 0; i < shared_->sent.size(); ++i) {
        parts.push_back(shared_->sent[i].split_with_sizes(shared_->sizes[i])[rank]);
        EXPECT_EQ(parts.back().numel(), out_sizes[i]);
      }
      out.copy_(at::cat(parts));
    });
  }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    return exchange(tensors[0], {}, [&] {
      if (getRank() == options.rootRank) return;
      tensors[0].copy_(shared_->sent[static_cast<std::size_t>(options.rootRank)]);
    });
  }

 private:
  template <typename Read>
  c10::intrusive_ptr<c10d::Work> exchange(const Tensor& in, const std::vector<std::int64_t>& sizes,
                                          const Read& read) {
    const auto rank = static_cast<std::size_t>(getRank());
    shared_->sent[rank] = in;
    shared_->sizes[rank] = sizes;
    shared_->meeting.arrive_and_wait();
    read();
    shared_->meeting.arrive_and_wait();
    return c10::make_intrusive<Done>();
  }
  std::shared_ptr<Shared> shared_;
};

/// run(rank, the name of its group) in a thread for each rank.
template <typename Run>
void in_group(int size, const Run& run) {
  const auto shared = std::make_shared<Shared>(size);
  std::vector<c10::intrusive_ptr<c10d::ProcessGroup>> groups;  // the registry does not own them
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    const auto name = "threads-" + std::to_string(rank);
    const auto& group = groups.emplace_back(c10::make_intrusive<c10d::ProcessGroup>(rank, size));
    group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::CUSTOM,
                      c10::make_intrusive<Threads>(rank, size, shared));
    c10d::register_process_group(name, group);
    threads.emplace_back([&run, rank, name] { run(rank, name); });
  }
  for (auto& thread : threads) thread.join();
  for (int rank = 0; rank < size; ++rank) {
    c10d::unregister_process_group("threads-" + std::to_string(rank));
  }
}

TransformerOptions options(const std::string& layers) {
  TransformerOptions o;
  o.dim = 8;
  o.num_tokens = 11;
  o.depth = 2;
  o.heads = 2;
  o.dim_head = 4;
  o.layer_pattern = layers;
  return o;
}

std::vector<TransformerOptions> covering_options() {
  std::vector<TransformerOptions> all = {options("gate_loop")};
  all.push_back(options("gate_loop"));
  all.back().gate = Gate::kSigmoid;
  all.back().simple_gate_loop = gateloop::model::SimpleGateLoopSpec{};
  all.push_back(options("gate_loop"));
  all.back().ablate_state_transition = true;
  all.push_back(options("gate_loop"));
  all.back().gate = Gate::kMagnitudePhase;
  all.push_back(options("gate_loop"));
  all.back().gate_loop_heads = 2;
  all.push_back(options("attention,gate_loop"));
  all.back().rotary_emb = true;
  all.back().window = 5;
  all.push_back(options("attention"));
  all.back().data_dependent_rel_pos = true;
  all.back().window = 9;
  return all;
}

Transformer make(const TransformerOptions& o) {
  torch::manual_seed(0);
  Transformer model(o);
  model->to(torch::kDouble);
  return model;
}

std::vector<Tensor> gradients(Transformer& model) {
  std::vector<Tensor> all;
  for (const auto& p : model->parameters()) {
    if (p.requires_grad()) all.push_back(p.grad().defined() ? p.grad() : at::zeros_like(p));
  }
  return all;
}

/// The sum over blocks of the loss and its gradients, beside those of the whole.
void check(const TransformerOptions& o, const Packing& packing,
           const std::vector<std::int64_t>& ends) {
  auto whole = make(o);
  const auto ids = torch::randint(0, o.num_tokens, {packing.cu_seqlens ? 1 : 2, kTime});
  const auto logits = whole->forward(ids, nullptr, std::nullopt, packing).detach();
  const auto loss = whole->loss(ids, std::nullopt, packing);
  loss.backward();

  const int size = static_cast<int>(ends.size()) - 1;
  std::vector<Transformer> models;
  for (int rank = 0; rank < size; ++rank) models.push_back(make(o));
  std::vector<Tensor> shares(models.size()), blocks(models.size());
  in_group(size, [&](int rank, const std::string& group) {
    const auto i = static_cast<std::size_t>(rank);
    const auto mine = ids.slice(1, ends[i], ends[i + 1]);
    Packing here{.cu_seqlens = packing.cu_seqlens, .time_group = group};
    if (packing.mask) here.mask = packing.mask->slice(1, ends[i], ends[i + 1]);
    blocks[i] = models[i]->forward(mine, nullptr, std::nullopt, here).detach();
    shares[i] = models[i]->loss(mine, std::nullopt, here);
    shares[i].backward();
  });
  if (!packing.mask) expect_close(at::cat(blocks, 1), logits, kSameTolerance);
  expect_close(at::stack(shares).sum(), loss, kSameTolerance);
  const auto expected = gradients(whole);
  for (std::size_t p = 0; p < expected.size(); ++p) {
    Tensor sum = at::zeros_like(expected[p]);
    for (auto& model : models) sum += gradients(model)[p];
    expect_weights_close(sum, expected[p], kSameTolerance);
  }
}

TEST(TimeSharding, BlocksEqualTheWhole) {
  for (const auto& o : covering_options()) {
    for (const auto& ends :
         {std::vector<std::int64_t>{0, 12, kTime}, {0, 2, 3, kTime}, {0, 0, kTime, kTime}}) {
      check(o, {}, ends);
    }
  }
}

TEST(TimeSharding, PackedAndPadded) {
  const auto cuts = torch::tensor({0, 0, 4, 9, 9, 20, 23}, torch::kLong);
  torch::manual_seed(1);
  const auto mask = torch::rand({2, kTime}).gt(0.3);
  for (const auto& o : covering_options()) {
    check(o, {.cu_seqlens = cuts}, {0, 6, 7, kTime});
    check(o, {.cu_seqlens = cuts}, {0, 0, kTime, kTime});
    if (!o.window) check(o, {.mask = mask}, {0, 6, 6, kTime});
  }
}

void expect_same_state(const TransformerState& state, const TransformerState& expected) {
  ASSERT_EQ(state.size(), expected.size());
  for (std::size_t i = 0; i < state.size(); ++i) {
    EXPECT_EQ(state[i].position, expected[i].position);
    for (const auto field : {&MixerState::recurrence, &MixerState::keys, &MixerState::values,
                             &MixerState::simple_gate_loop}) {
      ASSERT_EQ((state[i].*field).defined(), (expected[i].*field).defined());
      if (!(state[i].*field).defined()) continue;
      ASSERT_EQ((state[i].*field).sizes(), (expected[i].*field).sizes());
      expect_close(state[i].*field, expected[i].*field, kSameTolerance);
    }
  }
}

/// Calls of the group, the blocks of each between its `calls`, and one more of a process alone.
void check_streaming(const TransformerOptions& o,
                     const std::vector<std::vector<std::int64_t>>& calls) {
  const torch::NoGradGuard no_grad;
  auto whole = make(o);
  const auto ids = torch::randint(0, o.num_tokens, {2, kTime});
  const int size = static_cast<int>(calls[0].size()) - 1;
  std::vector<TransformerState> states(static_cast<std::size_t>(size));
  std::vector<Transformer> models;
  for (int rank = 0; rank < size; ++rank) models.push_back(make(o));
  TransformerState expected_state;
  for (const auto& ends : calls) {
    const auto expected = whole->forward(ids.slice(1, ends.front(), ends.back()), &expected_state);
    std::vector<Tensor> blocks(states.size());
    in_group(size, [&](int rank, const std::string& group) {
      const torch::NoGradGuard guard;  // of this thread
      const auto i = static_cast<std::size_t>(rank);
      blocks[i] = models[i]->forward(ids.slice(1, ends[i], ends[i + 1]), &states[i], std::nullopt,
                                     {.time_group = group});
    });
    expect_close(at::cat(blocks, 1), expected, kSameTolerance);
    for (const auto& state : states) expect_same_state(state, expected_state);
  }
  const auto rest = ids.slice(1, calls.back().back());
  expect_close(models[1]->forward(rest, &states[1]), whole->forward(rest, &expected_state),
               kSameTolerance);
}

TEST(TimeSharding, StatesGoOnFromCallToCall) {
  for (const auto& o : covering_options()) {
    check_streaming(o, {{0, 1, 2}, {2, 5, 9}, {9, 20, 21}});
    check_streaming(o, {{0, 7, 7, 13}, {13, 13, 14, 14}, {14, 14, 14, 22}});
    check_streaming(o, {{0, 0, 12}, {12, 21, 21}});
  }
}

TEST(TimeSharding, ErrorsNameTheModuleAndTheArgument) {
  const auto expect_error = [](const std::string& words, const auto& call) {
    try {
      call();
      FAIL() << "no error: " << words;
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  in_group(1, [&](int, const std::string& group) {
    const auto ids = torch::zeros({1, 4}, torch::kLong);
    auto full = make(options("attention"));
    expect_error("CausalFullAttention: time_group must be empty for attention without a window",
                 [&] { full->forward(ids, nullptr, std::nullopt, {.time_group = group}); });
    auto model = make(options("gate_loop"));
    auto local_options = options("attention");
    local_options.window = 3;
    auto local = make(local_options);
    TransformerState state;
    local->forward(ids, &state);
    state[0].keys = state[0].keys.narrow(2, 0, 1);
    expect_error("CausalFullAttention: state must hold 2 keys of 1 sequences at position 4",
                 [&] { local->forward(ids, &state, std::nullopt, {.time_group = group}); });
    expect_error("group must be the name of a registered process group, got 'nobody'",
                 [&] { model->forward(ids, nullptr, std::nullopt, {.time_group = "nobody"}); });
  });
}

}  // namespace time_sharding_test
