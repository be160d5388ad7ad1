// src/runtime's sessions and sampler as torch classes, for gateloop_cpp.Decoder and generate().
#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gateloop/generation.h"
#include "gateloop/runtime.h"
#include "model/machine.h"
#include "ops/tensor_model.h"

namespace gateloop::ops {
namespace {

/// work(), whose std::invalid_argument becomes Python's ValueError, of the name `function` if there
/// is one.
template <typename Work>
auto with_value_errors(const Work& work, const char* function = nullptr) {
  try {
    return work();
  } catch (const std::invalid_argument& error) {
    std::string text = error.what();
    if (function != nullptr) text.replace(0, text.find(": "), function);
    TORCH_CHECK_VALUE(false, text);
  }
}

/// ids (B, T) of int64 or int32, at least one of each.
at::Tensor checked_ids(const char* function, const at::Tensor& ids) {
  const bool fits = ids.dim() == 2 && ids.numel() > 0 && ids.is_cpu() &&
                    (ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt);
  TORCH_CHECK_VALUE(fits, function, ": ids must be (B, T) with B, T >= 1, int64 or int32 on the ",
                    "CPU, got ", ids.toString(), " of shape ", ids.sizes());
  return ids.to(at::kLong).contiguous();
}

/// Where packed sequences of ids (1, T) begin and end: (N + 1) of int64 or int32.
at::Tensor checked_cuts(const char* function, const at::Tensor& ids, const at::Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(ids.size(0) == 1, function, ": ids must be (1, T) with cu_seqlens, got ",
                    ids.sizes());
  const bool fits = cu_seqlens.dim() == 1 && cu_seqlens.is_cpu() &&
                    (cu_seqlens.scalar_type() == at::kLong || cu_seqlens.scalar_type() == at::kInt);
  TORCH_CHECK_VALUE(fits, function, ": cu_seqlens must be (N + 1), int64 or int32 on the CPU, got ",
                    cu_seqlens.toString(), " of shape ", cu_seqlens.sizes());
  return cu_seqlens.to(at::kLong).contiguous();
}

std::span<const std::int64_t> span_of(const at::Tensor& ids) {
  return {ids.const_data_ptr<std::int64_t>(), static_cast<std::size_t>(ids.numel())};
}

constexpr const char* kDecoder = "Decoder";
constexpr const char* kSampler = "Sampler";

/// What sequences carry: a value.
struct State : torch::CustomClassHolder {
  explicit State(runtime::State state) : value(std::move(state)) {}
  runtime::State value;
};

/// Calls from several threads wait for each other: Python's lock is released meanwhile.
struct Session : torch::CustomClassHolder {
  Session(const std::string& options, const std::vector<std::string>& names,
          const std::vector<at::Tensor>& tensors, std::optional<std::int64_t> threads)
      : session(with_value_errors([&] {
          // torch counts processors, whatever part of their time a container may have.
          const std::int64_t count =
              threads ? *threads : std::min(at::get_num_threads(), model::usable_cpus());
          TORCH_CHECK_VALUE(std::in_range<int>(count), "Session: threads must be an int, got ",
                            count);
          const auto spec = model::resolve(model::options_from_json(options));
          return runtime::Session(model_of(spec, names, tensors),
                                  {.threads = static_cast<int>(count)});
        })) {}

  /// ids (B, T) after a state, None at the start of a text. Returns logits (B, T, num_tokens), or
  /// (B, 1, num_tokens) of the last step; and the state after them. With cu_seqlens (N + 1) ids are
  /// (1, T), and logits (1, T, num_tokens) or (N, 1, num_tokens). `consume`: the state is used up,
  /// and nothing of it is copied.
  std::tuple<at::Tensor, c10::intrusive_ptr<State>> read(
      const at::Tensor& ids, const std::optional<c10::intrusive_ptr<State>>& before, bool last_only,
      const std::optional<at::Tensor>& cu_seqlens, bool consume) {
    const at::Tensor checked = checked_ids(kDecoder, ids);
    const at::Tensor cuts = cu_seqlens ? checked_cuts(kDecoder, ids, *cu_seqlens) : at::Tensor();
    const std::scoped_lock lock(mutex);
    const auto work = [&] {
      if (before) {
        session.set_state(consume ? std::move((*before)->value) : (*before)->value);
      } else {
        session.restart();
      }
      const std::int64_t tokens = session.model().spec().num_tokens;
      at::Tensor logits;
      if (last_only) {
        const auto last = cu_seqlens ? session.prefill_packed(span_of(checked), span_of(cuts))
                                     : session.prefill(span_of(checked), ids.size(0));
        logits = at::empty({std::ssize(last) / tokens, 1, tokens}, at::kFloat);
        std::copy(last.begin(), last.end(), logits.mutable_data_ptr<float>());
      } else {
        logits = at::empty({ids.size(0), ids.size(1), tokens}, at::kFloat);
        const std::span out(logits.mutable_data_ptr<float>(),
                            static_cast<std::size_t>(logits.numel()));
        if (cu_seqlens) {
          session.read_all_packed(span_of(checked), span_of(cuts), out);
        } else {
          session.read_all(span_of(checked), ids.size(0), out);
        }
      }
      return std::tuple(logits, c10::make_intrusive<State>(session.take_state()));
    };
    return with_value_errors(work, kDecoder);
  }

  runtime::Session session;
  std::mutex mutex;
};

/// Calls from several threads wait for each other.
struct Sampler : torch::CustomClassHolder {
  Sampler(double repetition_penalty, double temperature, double filter_thres, std::int64_t top_k,
          double top_p, double min_p, std::vector<std::vector<std::int64_t>> stop,
          std::int64_t seed)
      : sampler(with_value_errors([&] {
          return generation::Sampler({.repetition_penalty = repetition_penalty,
                                      .temperature = temperature,
                                      .filter_thres = filter_thres,
                                      .top_k = top_k,
                                      .top_p = top_p,
                                      .min_p = min_p,
                                      .stop = std::move(stop)},
                                     static_cast<std::uint64_t>(seed));
        })) {}

  void read(const at::Tensor& ids, const std::optional<at::Tensor>& cu_seqlens) {
    const at::Tensor checked = checked_ids(kSampler, ids);
    const at::Tensor cuts = cu_seqlens ? checked_cuts(kSampler, ids, *cu_seqlens) : at::Tensor();
    const std::scoped_lock lock(mutex);
    with_value_errors([&] {
      if (cu_seqlens) return sampler.read_packed(span_of(checked), span_of(cuts));
      sampler.read(span_of(checked), checked.size(0));
    });
  }

  /// logits (B, num_tokens) -> tokens (B) int64, -1 where a sequence had ended.
  at::Tensor draw(const at::Tensor& logits) {
    TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(0) > 0 && logits.is_floating_point(),
                      "Sampler: logits must be (B, num_tokens), floating point, got ",
                      logits.toString(), " of shape ", logits.sizes());
    const at::Tensor plain = logits.detach().to(at::kCPU, at::kFloat).contiguous();
    const std::span numbers(plain.const_data_ptr<float>(), static_cast<std::size_t>(plain.numel()));
    const std::scoped_lock lock(mutex);
    const auto tokens = with_value_errors([&] { return sampler.draw(numbers, plain.size(0)); });
    auto drawn = at::empty({plain.size(0)}, at::kLong);
    std::copy(tokens.begin(), tokens.end(), drawn.mutable_data_ptr<std::int64_t>());
    return drawn;
  }

  bool ended() {
    const std::scoped_lock lock(mutex);
    return sampler.ended();
  }

  generation::Sampler sampler;
  std::mutex mutex;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.class_<State>("State")
      .def("batch", [](const c10::intrusive_ptr<State>& self) { return self->value.batch(); })
      .def("position", [](const c10::intrusive_ptr<State>& self) { return self->value.position(); })
      .def("positions",
           [](const c10::intrusive_ptr<State>& self) { return self->value.positions(); })
      .def("select",
           [](const c10::intrusive_ptr<State>& self, const std::vector<std::int64_t>& sequences) {
             return with_value_errors(
                 [&] { return c10::make_intrusive<State>(self->value.select(sequences)); });
           })
      .def_static("join",
                  [](const std::vector<c10::intrusive_ptr<State>>& states) {
                    std::vector<runtime::State> values;
                    for (const auto& state : states) values.push_back(state->value);
                    return with_value_errors(
                        [&] { return c10::make_intrusive<State>(runtime::State::join(values)); });
                  })
      .def("bytes", [](const c10::intrusive_ptr<State>& self) { return self->value.bytes(); })
      .def("save", [](const c10::intrusive_ptr<State>& self,
                      const std::string& file) { self->value.save(file); })
      .def_static("load", [](const std::string& file) {
        return c10::make_intrusive<State>(runtime::State::load(file));
      });
  m.class_<Session>("Session")
      .def(torch::init<std::string, std::vector<std::string>, std::vector<at::Tensor>,
                       std::optional<std::int64_t>>())
      .def("read", &Session::read);
  m.class_<Sampler>("Sampler")
      .def(torch::init<double, double, double, std::int64_t, double, double,
                       std::vector<std::vector<std::int64_t>>, std::int64_t>())
      .def("read", &Sampler::read)
      .def("draw", &Sampler::draw)
      .def("ended", &Sampler::ended);
}

}  // namespace gateloop::ops
