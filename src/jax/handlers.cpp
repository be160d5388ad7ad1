// The handlers that XLA calls. In memory, sequences are dense (..., T, D), pairs (..., T, D, 2),
// states (..., D), saved states (..., N, D). With `time_last` a program names the axes of the same
// memory (..., D, T), so that all buffers begin with the axes along which XLA may partition; it
// sets layouts to match, which XLA does not tell handlers. A program may be deserialised or made by
// hand, so every buffer's dtype and shape are checked here too.
#include <xla/ffi/api/ffi.h>

#include <cstdint>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "gateloop/recurrence.h"
#include "host/output_memory.h"
#include "jax/host.h"

namespace gateloop::jax {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Output = ffi::Result<AnyBuffer>;
using Fresh = std::vector<host::Memory>;
using recurrence::DType;
using recurrence::Shape;

using Sizes = std::vector<std::int64_t>;

Sizes sizes_of(const AnyBuffer& buffer) {
  const auto sizes = buffer.dimensions();
  return {sizes.begin(), sizes.end()};
}

std::string described(ffi::DataType type, const Sizes& sizes) {
  std::ostringstream text;
  text << type << " (";
  for (std::size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ")";
  return text.str();
}

DType dtype_of(ffi::DataType type, const char* name) {
  switch (type) {
    case ffi::F32:
      return DType::kFloat32;
    case ffi::F64:
      return DType::kFloat64;
    case ffi::C64:
      return DType::kComplex64;
    case ffi::C128:
      return DType::kComplex128;
    case ffi::BF16:
      return DType::kBFloat16;
    case ffi::F16:
      return DType::kFloat16;
    default:
      throw std::invalid_argument(std::string(name) +
                                  " must be F32, F64, C64, C128, BF16 or F16, got " +
                                  described(type, {}));
  }
}

/// The type of the states of such sequences.
ffi::DataType accumulation_of(ffi::DataType type) {
  return type == ffi::BF16 || type == ffi::F16 ? ffi::F32 : type;
}

/// The first sequence of a call, and all other buffers checked against it.
class Call {
 public:
  Call(const AnyBuffer& sequence, const char* name, bool time_last)
      : type_(sequence.element_type()),
        dtype_(dtype_of(type_, name)),
        state_type_(accumulation_of(type_)),
        time_last_(time_last),
        lead_(sizes_of(sequence)) {
    if (lead_.size() < 2) {
      throw std::invalid_argument(std::string(name) + " must have 2 axes or more, got " +
                                  described(type_, lead_));
    }
    const std::int64_t last = lead_.back(), before = lead_[lead_.size() - 2];
    lead_.resize(lead_.size() - 2);
    shape_ = {1, time_last ? last : before, time_last ? before : last};
    for (const std::int64_t size : lead_) shape_.batch *= size;
  }

  /// Of a call whose sequences are real and whose states are complex.
  Call& with_complex_states(const char* name) {
    switch (state_type_) {
      case ffi::F32:
        state_type_ = ffi::C64;
        return *this;
      case ffi::F64:
        state_type_ = ffi::C128;
        return *this;
      default:
        throw std::invalid_argument(std::string(name) + " must be F32, F64, BF16 or F16, got " +
                                    described(type_, {}));
    }
  }

  template <class Params>
  Params params(bool reverse) const {
    Params p;
    p.dtype = dtype_;
    p.shape = shape_;
    p.reverse = reverse;
    return p;
  }
  /// A sequence, or with two parts a channel pairs.
  recurrence::ConstSequence input(const AnyBuffer& buffer, const char* name,
                                  std::int64_t parts = 1) const {
    const std::int64_t width = parts * shape_.channels;
    return {sequence(buffer, name, parts), shape_.time * width, width};
  }
  /// Adds its memory to fresh(), which the call is to write whole.
  recurrence::Sequence output(Output& buffer, const char* name, std::int64_t parts = 1) {
    fresh_.push_back({buffer->untyped_data(), buffer->size_bytes()});
    const std::int64_t width = parts * shape_.channels;
    return {sequence(*buffer, name, parts), shape_.time * width, width};
  }
  void* state(const AnyBuffer& buffer, const char* name) const {
    Sizes expected = lead_;
    expected.push_back(shape_.channels);
    return checked(buffer, name, state_type_, expected);
  }
  void* saved_states(const AnyBuffer& buffer, const char* name) const {
    return checked(buffer, name, state_type_, sizes(recurrence::saved_state_count(shape_.time)));
  }
  const Fresh& fresh() const { return fresh_; }

 private:
  Sizes sizes(std::int64_t time) const {
    Sizes sizes = lead_;
    sizes.push_back(time_last_ ? shape_.channels : time);
    sizes.push_back(time_last_ ? time : shape_.channels);
    return sizes;
  }
  static void* checked(const AnyBuffer& buffer, const char* name, ffi::DataType type,
                       const Sizes& sizes) {
    const Sizes given = sizes_of(buffer);
    if (buffer.element_type() != type || given != sizes) {
      throw std::invalid_argument(std::string(name) + " must be " + described(type, sizes) +
                                  ", got " + described(buffer.element_type(), given));
    }
    return buffer.untyped_data();
  }
  void* sequence(const AnyBuffer& buffer, const char* name, std::int64_t parts) const {
    Sizes expected = sizes(shape_.time);
    if (parts > 1) expected.push_back(parts);
    return checked(buffer, name, type_, expected);
  }

  ffi::DataType type_;
  DType dtype_;
  ffi::DataType state_type_;
  bool time_last_;
  Sizes lead_;
  Shape shape_;
  Fresh fresh_;
};

/// A gate takes all threads: the pages of its outputs come first.
template <class Params>
void run_gate(const Params& p, const Fresh& fresh, ffi::ThreadPool& pool) {
  const recurrence::Executor executor = lend_threads(pool);
  for (const host::Memory& memory : fresh) {
    host::ready_output(memory.data, memory.bytes, p.shape.batch, executor);
  }
  run(p, executor);
}

/// `downwards`: the scan runs from the last step to the first.
template <class Params>
void run_linear(const Params& p, bool downwards, const Fresh& fresh, ffi::ThreadPool& pool) {
  host::compute_behind_pages(fresh, downwards, p.shape.batch, lend_threads(pool),
                             [&](const recurrence::Executor& executor) { run(p, executor); });
}

/// The kernels throw, XLA wants a value.
template <class Body>
ffi::Error guarded(const char* name, const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::InvalidArgument(std::string("gateloop: ") + name + ": " + error.what());
  }
}

ffi::Error linear_recurrence(ffi::ThreadPool pool, AnyBuffer a, AnyBuffer x,
                             AnyBuffer initial_state, Output h, Output final_state, bool reverse,
                             bool time_last) {
  return guarded("linear_recurrence", [&] {
    Call call(x, "x", time_last);
    auto p = call.params<recurrence::LinearRecurrence>(reverse);
    p.a = call.input(a, "a");
    p.x = call.input(x, "x");
    p.initial_state = call.state(initial_state, "initial_state");
    p.h = call.output(h, "h");
    p.final_state = call.state(*final_state, "final_state");
    run_linear(p, reverse, call.fresh(), pool);
  });
}

ffi::Error linear_recurrence_backward(ffi::ThreadPool pool, AnyBuffer a, AnyBuffer h,
                                      AnyBuffer initial_state, AnyBuffer dh, AnyBuffer dfinal_state,
                                      Output da, Output dx, Output dinitial_state, bool reverse,
                                      bool time_last) {
  return guarded("linear_recurrence_backward", [&] {
    Call call(a, "a", time_last);
    auto p = call.params<recurrence::LinearRecurrenceBackward>(reverse);
    p.a = call.input(a, "a");
    p.h = call.input(h, "h");
    p.dh = call.input(dh, "dh");
    p.initial_state = call.state(initial_state, "initial_state");
    p.dfinal_state = call.state(dfinal_state, "dfinal_state");
    p.da = call.output(da, "da");
    p.dx = call.output(dx, "dx");
    p.dinitial_state = call.state(*dinitial_state, "dinitial_state");
    run_linear(p, !reverse, call.fresh(), pool);
  });
}

/// Results: y, final_state, and `saved` the saved states if a backward pass follows.
ffi::Error polar_gate_loop(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer z,
                           AnyBuffer initial_state, Output y, Output final_state,
                           ffi::RemainingRets saved, bool reverse, bool time_last) {
  return guarded("polar_gate_loop", [&] {
    Call call(q, "q", time_last);
    call.with_complex_states("q");
    auto p = call.params<recurrence::PolarGateLoop>(reverse);
    p.q = call.input(q, "q");
    p.k = call.input(k, "k");
    p.v = call.input(v, "v");
    p.z = call.input(z, "z", 2);
    p.initial_state = call.state(initial_state, "initial_state");
    p.y = call.output(y, "y");
    p.final_state = call.state(*final_state, "final_state");
    if (saved.size() > 1) throw std::invalid_argument("results must be 2 or 3, got more");
    if (saved.size() == 1) {
      auto states = saved.get<AnyBuffer>(0);
      if (!states.has_value()) throw std::invalid_argument("saved_states must be an array");
      p.saved_states = call.saved_states(**states, "saved_states");
    }
    run_gate(p, call.fresh(), pool);
  });
}

ffi::Error polar_gate_loop_backward(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                                    AnyBuffer z, AnyBuffer saved_states, AnyBuffer dy,
                                    AnyBuffer dfinal_state, Output dq, Output dk, Output dv,
                                    Output dz, Output dinitial_state, bool reverse,
                                    bool time_last) {
  return guarded("polar_gate_loop_backward", [&] {
    Call call(q, "q", time_last);
    call.with_complex_states("q");
    auto p = call.params<recurrence::PolarGateLoopBackward>(reverse);
    p.q = call.input(q, "q");
    p.k = call.input(k, "k");
    p.v = call.input(v, "v");
    p.z = call.input(z, "z", 2);
    p.dy = call.input(dy, "dy");
    p.saved_states = call.saved_states(saved_states, "saved_states");
    p.dfinal_state = call.state(dfinal_state, "dfinal_state");
    p.dq = call.output(dq, "dq");
    p.dk = call.output(dk, "dk");
    p.dv = call.output(dv, "dv");
    p.dz = call.output(dz, "dz", 2);
    p.dinitial_state = call.state(*dinitial_state, "dinitial_state");
    run_gate(p, call.fresh(), pool);
  });
}

}  // namespace
}  // namespace gateloop::jax

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_linear_recurrence, gateloop::jax::linear_recurrence,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // initial_state
                                  .Ret<xla::ffi::AnyBuffer>()  // h
                                  .Ret<xla::ffi::AnyBuffer>()  // final_state
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_last"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_linear_recurrence_backward,
                              gateloop::jax::linear_recurrence_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // h
                                  .Arg<xla::ffi::AnyBuffer>()  // initial_state
                                  .Arg<xla::ffi::AnyBuffer>()  // dh
                                  .Arg<xla::ffi::AnyBuffer>()  // dfinal_state
                                  .Ret<xla::ffi::AnyBuffer>()  // da
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Ret<xla::ffi::AnyBuffer>()  // dinitial_state
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_last"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_polar_gate_loop, gateloop::jax::polar_gate_loop,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // z
                                  .Arg<xla::ffi::AnyBuffer>()  // initial_state
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // final_state
                                  .RemainingRets()             // saved_states
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_last"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_polar_gate_loop_backward,
                              gateloop::jax::polar_gate_loop_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // z
                                  .Arg<xla::ffi::AnyBuffer>()  // saved_states
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Arg<xla::ffi::AnyBuffer>()  // dfinal_state
                                  .Ret<xla::ffi::AnyBuffer>()  // dq
                                  .Ret<xla::ffi::AnyBuffer>()  // dk
                                  .Ret<xla::ffi::AnyBuffer>()  // dv
                                  .Ret<xla::ffi::AnyBuffer>()  // dz
                                  .Ret<xla::ffi::AnyBuffer>()  // dinitial_state
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_last"));
#pragma GCC visibility pop
