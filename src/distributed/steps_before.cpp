#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "distributed/group.h"
#include "gateloop/distributed_ops.h"

namespace gateloop::distributed {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto kOp = "gateloop::time_sharded_steps_before";

/// Which of the last steps of each block go to which rank.
struct Exchange : torch::CustomClassHolder {
  /// `begins`: (processes + 1) of the blocks, in the whole.
  Exchange(c10::intrusive_ptr<c10d::ProcessGroup> processes,
           const std::vector<std::int64_t>& begins, std::int64_t steps)
      : group(std::move(processes)) {
    const auto rank = static_cast<std::size_t>(group->getRank());
    // What the block of `to` needs of the block of `from`, in the steps of the whole.
    const auto needed = [&](std::size_t from, std::size_t to) {
      const std::int64_t first = std::max(begins[to] - steps, begins[from]);
      return from < to ? std::pair(first, std::max(begins[from + 1] - first, std::int64_t{0}))
                       : std::pair(begins[from], std::int64_t{0});
    };
    own = std::min(steps, begins[rank + 1] - begins[rank]);
    for (std::size_t other = 0; other + 1 < begins.size(); ++other) {
      const auto [first, count] = needed(rank, other);
      offsets.push_back(count == 0 ? 0 : first - (begins[rank + 1] - own));
      sent.push_back(count);
      received.push_back(needed(other, rank).second);
    }
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::int64_t own = 0;               // how many steps of this block may travel
  std::vector<std::int64_t> offsets;  // in these, where those for each rank begin
  std::vector<std::int64_t> sent;     // how many go to each rank
  std::vector<std::int64_t> received;

  /// Parts (B, n, ...) for each rank to those of each rank, as many steps each as `counts` says.
  std::vector<at::Tensor> trade(const std::vector<at::Tensor>& parts,
                                const std::vector<std::int64_t>& counts) const {
    std::vector<at::Tensor> flat;
    std::vector<std::int64_t> out_sizes, in_sizes;
    auto sizes = parts[0].sizes().vec();
    sizes[1] = 1;
    const std::int64_t step = c10::multiply_integers(sizes);
    for (const auto& part : parts) {
      flat.push_back(part.reshape(-1));
      in_sizes.push_back(part.numel());
    }
    std::int64_t total = 0;
    for (const std::int64_t count : counts) {
      out_sizes.push_back(count * step);
      total += count * step;
    }
    at::Tensor in = at::cat(flat), out = in.new_empty({total});
    group->all_to_all_single(out, in, out_sizes, in_sizes)->wait();
    std::vector<at::Tensor> arrived;
    const auto pieces = out.split_with_sizes(out_sizes);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      sizes[1] = counts[i];
      arrived.push_back(pieces[i].view(sizes));
    }
    return arrived;
  }
};

struct StepsBeforeFunction : torch::autograd::Function<StepsBeforeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& last,
                            const c10::intrusive_ptr<Exchange>& exchange) {
    ctx->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
    std::vector<at::Tensor> parts;
    for (std::size_t i = 0; i < exchange->sent.size(); ++i) {
      parts.push_back(last.narrow(1, exchange->offsets[i], exchange->sent[i]));
    }
    return at::cat(exchange->trade(parts, exchange->received), 1);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), kOp,
                ": create_graph must be False in the backward pass, got True: there is no second "
                "derivative over processes");
    const auto exchange =
        c10::static_intrusive_pointer_cast<Exchange>(ctx->saved_data["exchange"].toCapsule());
    const auto parts = grads[0].split_with_sizes(exchange->received, 1);
    const auto arrived = exchange->trade(parts, exchange->sent);
    auto sizes = grads[0].sizes().vec();
    sizes[1] = exchange->own;
    at::Tensor sum = at::zeros(sizes, grads[0].options());
    for (std::size_t i = 0; i < arrived.size(); ++i) {
      sum.narrow(1, exchange->offsets[i], exchange->sent[i]).add_(arrived[i]);
    }
    return {sum, {}};
  }
};

std::tuple<at::Tensor, std::int64_t> checked_steps_before(const at::Tensor& last, std::int64_t time,
                                                          std::int64_t steps,
                                                          const std::string& name) {
  TORCH_CHECK_VALUE(time >= 0 && steps >= 0, kOp, ": time and steps must be 0 or more, got ", time,
                    " and ", steps);
  TORCH_CHECK_VALUE(last.dim() >= 2 && last.size(1) == std::min(time, steps), kOp,
                    ": last must be (B, min(time, steps), ...) = (B, ", std::min(time, steps),
                    ", ...), got ", last.sizes());
  const auto group = find_group(kOp, name);
  const at::Tensor length = at::full({1}, time, last.options().dtype(at::kLong));
  std::vector<std::int64_t> begins = {0};
  for (const auto& theirs : Gathering(*group, {length}).wait()) {
    begins.push_back(begins.back() + theirs[0].item().toLong());
  }
  const auto begin = begins[static_cast<std::size_t>(group->getRank())];
  if (steps == 0) return {last, begin};
  return {StepsBeforeFunction::apply(last, c10::make_intrusive<Exchange>(group, begins, steps)),
          begin};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "time_sharded_steps_before(Tensor last, int time, int steps, str group) -> (Tensor before, "
      "int begin)",
      checked_steps_before);
}

}  // namespace gateloop::distributed

std::tuple<at::Tensor, std::int64_t> gateloop::time_sharded::steps_before(
    const at::Tensor& last, std::int64_t time, std::int64_t steps, const std::string& group) {
  return distributed::checked_steps_before(last, time, steps, group);
}
