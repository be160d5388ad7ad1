#include "gateloop/evaluation.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "nn/autocast.h"
#include "training/device.h"
#include "training/packed_rows.h"

namespace gateloop::training {
namespace {

/// Eval mode for one scope.
class EvalScope {
 public:
  explicit EvalScope(torch::nn::Module& module)
      : module_(module), was_training_(module.is_training()) {
    module_.eval();
  }
  ~EvalScope() { module_.train(was_training_); }
  EvalScope(const EvalScope&) = delete;
  EvalScope& operator=(const EvalScope&) = delete;

 private:
  torch::nn::Module& module_;
  bool was_training_;
};

void check(const nn::TransformerOptions& model, std::span<const std::uint8_t> text,
           const EvaluationOptions& options) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("evaluate: " + what);
  };
  if (options.length < 1) fail("length must be at least 1, not " + std::to_string(options.length));
  if (options.bytes_per_pass < 1)
    fail("bytes_per_pass must be at least 1, not " + std::to_string(options.bytes_per_pass));
  if (options.windows < 0)
    fail("windows must not be negative, got " + std::to_string(options.windows));
  if (text.size() < 2)
    fail("the text has " + std::to_string(text.size()) +
         " bytes; at least 2 are needed, one to read and one to predict");
  const int largest = *std::max_element(text.begin(), text.end());
  if (largest >= model.num_tokens)
    fail("the text holds byte " + std::to_string(largest) + ", the model's ids are below " +
         std::to_string(model.num_tokens));
}

struct Window {
  std::int64_t start = 0;
  std::int64_t length = 0;  // bytes predicted
};

std::vector<Window> chosen_windows(std::span<const std::uint8_t> text,
                                   const EvaluationOptions& options) {
  const std::int64_t available = window_count(text, options.length);
  std::vector<Window> windows;
  if (options.windows > 0 && options.windows < available) {
    for (std::int64_t i = 0; i < options.windows; ++i) {
      windows.push_back({i * available / options.windows * options.length, options.length});
    }
    return windows;
  }
  const std::int64_t total = std::ssize(text) - 1;
  for (std::int64_t start = 0; start < total; start += options.length) {
    windows.push_back({start, std::min(options.length, total - start)});
  }
  return windows;
}

/// Windows of one length -> ids (rows, length + 1) int64.
torch::Tensor ids_of(std::span<const std::uint8_t> text, std::span<const Window> windows,
                     torch::Device device) {
  const std::int64_t bytes = windows.front().length + 1;
  torch::Tensor ids = torch::empty({std::ssize(windows), bytes}, torch::kInt64);
  auto* out = ids.mutable_data_ptr<std::int64_t>();
  for (const Window& window : windows) {
    out = std::copy_n(text.begin() + window.start, bytes, out);
  }
  return moved(ids, device);
}

using runtime::Stretch;

/// Of stretches those that this process reads: as many bytes as the others, to within one stretch.
std::vector<Stretch> own_part(const std::vector<Stretch>& stretches,
                              const distributed::Communicator& communicator) {
  std::int64_t total = 0, before = 0;
  for (const Stretch& stretch : stretches) total += stretch.length;
  std::vector<Stretch> own;
  for (const Stretch& stretch : stretches) {
    const std::int64_t middle = before + stretch.length / 2;
    if (middle * communicator.size() / total == communicator.rank()) own.push_back(stretch);
    before += stretch.length;
  }
  return own;
}

/// Reads one stretch with all processes, blocks of at most `block` bytes one after another. Calls
/// `progress` with the bytes of each. Returns this process's share of the nats.
double read_together(nn::Transformer& model, std::span<const std::uint8_t> text,
                     const Stretch& stretch, std::int64_t block,
                     const distributed::Communicator& communicator,
                     const std::function<void(std::int64_t bytes)>& progress) {
  const torch::NoGradGuard no_grad;
  const nn::Packing packing{.time_group = communicator.time_group()};
  nn::TransformerState state;
  double nats = 0;
  for (std::int64_t begin = 0; begin < stretch.length; begin += block) {
    const std::int64_t bytes = std::min(block, stretch.length - begin);
    const auto [first, last] = communicator.part_of(bytes);
    const Window window{stretch.start + begin + first, last - first};
    const torch::Tensor ids = ids_of(text, {&window, 1}, device_of(model));
    const torch::Tensor logits =
        model->forward(ids.narrow(1, 0, window.length), &state, std::nullopt, packing);
    nats +=
        at::cross_entropy_loss(logits.flatten(0, 1).to(torch::kFloat32),
                               ids.narrow(1, 1, window.length).flatten(), {}, at::Reduction::Sum)
            .item<double>();
    progress(bytes);
  }
  return nats;
}

/// How far all processes are with what each reads alone. They exchange it while they read: so none
/// waits for another longer than that takes for a pass, and each notices soon that another ended.
class SharedProgress {
 public:
  using Report = std::function<void(std::int64_t done)>;

  /// `report` is given the bytes that all have read, at each exchange.
  SharedProgress(const distributed::Communicator& communicator, Report report)
      : communicator_(communicator),
        report_(std::move(report)),
        interval_(std::min<std::chrono::milliseconds>(kLongest, communicator.timeout() / 4)) {}

  /// After each pass, with the bytes that this process has read.
  void update(std::int64_t own) {
    if (Clock::now() - last_ >= interval_) exchange(own, /*finished=*/false);
  }
  /// Returns once all have finished.
  void finish(std::int64_t own) {
    while (!exchange(own, /*finished=*/true)) {
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kLongest{2};

  /// Every process, in the same order: returns whether all have finished.
  bool exchange(std::int64_t own, bool finished) {
    double done = 0, waiting = 0;
    for (const auto& row : communicator_.gather({static_cast<double>(own), finished ? 1.0 : 0.0})) {
      done += row[0];
      waiting += row[1];
    }
    last_ = Clock::now();
    report_(static_cast<std::int64_t>(done));
    return waiting == communicator_.size();
  }

  const distributed::Communicator& communicator_;
  const Report report_;
  const Clock::duration interval_;
  Clock::time_point last_ = Clock::now();
};

Score sum_over(const distributed::Communicator& communicator, const Score& share) {
  Score sum;
  for (const auto& part : communicator.gather({share.nats, static_cast<double>(share.bytes)})) {
    sum.nats += part[0];
    sum.bytes += static_cast<std::int64_t>(part[1]);
  }
  return sum;
}

}  // namespace

std::int64_t window_count(std::span<const std::uint8_t> text, std::int64_t length) {
  return (std::ssize(text) - 1) / length;
}

Score evaluate_windows(nn::Transformer model, std::span<const std::uint8_t> text,
                       const EvaluationOptions& options,
                       const distributed::Communicator& communicator) {
  check(model->options(), text, options);
  const auto device = device_of(model);
  const torch::NoGradGuard no_grad;
  const EvalScope eval(*model);
  const nn::Autocast autocast(device.type(), options.dtype);

  const std::vector<Window> all = chosen_windows(text, options);
  const auto [first, last] = communicator.part_of(std::ssize(all));
  std::span<const Window> left(all.begin() + first, all.begin() + last);
  std::int64_t total = 0;
  for (const Window& window : left) total += window.length;
  const auto rows_per_pass =
      static_cast<std::size_t>(std::max<std::int64_t>(1, options.bytes_per_pass / options.length));
  Score score;
  while (!left.empty()) {
    auto pass = left.first(std::min(rows_per_pass, left.size()));
    // A shorter one, the last of the text, goes on its own.
    if (pass.size() > 1 && pass.back().length < pass.front().length) {
      pass = pass.first(pass.size() - 1);
    }
    score.nats +=
        next_byte_loss(model, ids_of(text, pass, device), options.separator, at::Reduction::Sum)
            .item<double>();
    score.bytes += std::ssize(pass) * pass.front().length;
    left = left.subspan(pass.size());
    if (options.progress) options.progress(score.bytes, total);
  }
  return sum_over(communicator, score);
}

Score evaluate_over_processes(runtime::Reader& reader,
                              const std::function<nn::Transformer()>& modules,
                              std::span<const std::uint8_t> text,
                              const runtime::EvaluateOptions& options,
                              const distributed::Communicator& communicator) {
  if (communicator.size() == 1) return runtime::evaluate(reader, text, options);
  // Windows are read by `reader`, as in one process, however long they are.
  const bool divisible = options.window == 0 && model::has_bounded_state(reader.spec());
  const std::int64_t block = communicator.size() * options.bytes_at_once;
  std::vector<Stretch> whole, divided;
  for (const Stretch& stretch : runtime::stretches(text, options)) {
    (divisible && stretch.length > block ? divided : whole).push_back(stretch);
  }
  std::int64_t done = 0;
  const auto report = [&](std::int64_t bytes) {
    done = bytes;
    if (options.progress) options.progress(done, std::ssize(text) - 1);
  };
  SharedProgress shared(communicator, report);
  runtime::EvaluateOptions alone = options;
  alone.progress = [&](std::int64_t own, std::int64_t) { shared.update(own); };
  // First, since it checks text and options.
  Score score = runtime::evaluate_stretches(reader, text, own_part(whole, communicator), alone);
  shared.finish(score.bytes);
  if (!divided.empty()) {
    nn::Transformer model = modules();
    const EvalScope eval(*model);
    for (const Stretch& stretch : divided) {
      score.nats += read_together(model, text, stretch, block, communicator,
                                  [&](auto bytes) { report(done + bytes); });
      if (communicator.is_main()) score.bytes += stretch.length;
    }
  }
  return sum_over(communicator, score);
}

}  // namespace gateloop::training
