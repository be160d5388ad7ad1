// The handlers that XLA calls. Buffers are dense, sequences (B, T, D), states (B, D); the Python
// side checks shapes and dtypes at trace time and names the argument, so here a mismatch is a bug.
#include <xla/ffi/api/ffi.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
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

DType dtype_of(const AnyBuffer& sequence) {
  switch (sequence.element_type()) {
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
      throw std::invalid_argument("no kernel for this dtype");
  }
}

Shape shape_of(const AnyBuffer& sequence) {
  const auto sizes = sequence.dimensions();
  if (sizes.size() != 3) throw std::invalid_argument("a sequence is not (B, T, D)");
  return {sizes[0], sizes[1], sizes[2]};
}

void expect_sizes(const AnyBuffer& buffer, const char* name,
                  std::initializer_list<std::int64_t> expected) {
  const auto sizes = buffer.dimensions();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    throw std::invalid_argument(std::string(name) + " has another shape than its sequence");
  }
}

/// A sequence of width channels a step, checked against the shape of the call.
void* sequence(const AnyBuffer& buffer, const char* name, const Shape& s, std::int64_t width) {
  expect_sizes(buffer, name, {s.batch, s.time, width});
  return buffer.untyped_data();
}
recurrence::ConstSequence input(const AnyBuffer& buffer, const char* name, const Shape& s,
                                std::int64_t parts = 1) {
  const std::int64_t width = parts * s.channels;
  return {sequence(buffer, name, s, width), s.time * width, width};
}
/// Adds its memory to `fresh`, which the call is to write whole.
recurrence::Sequence output(Output& buffer, const char* name, const Shape& s, Fresh& fresh,
                            std::int64_t parts = 1) {
  const std::int64_t width = parts * s.channels;
  fresh.push_back({buffer->untyped_data(), buffer->size_bytes()});
  return {sequence(*buffer, name, s, width), s.time * width, width};
}
void* state(const AnyBuffer& buffer, const char* name, const Shape& s) {
  expect_sizes(buffer, name, {s.batch, s.channels});
  return buffer.untyped_data();
}
void* checkpoints(const AnyBuffer& buffer, const Shape& s) {
  expect_sizes(buffer, "checkpoints", {s.batch, recurrence::saved_state_count(s.time), s.channels});
  return buffer.untyped_data();
}

/// What every operation is told, from one of its sequences.
template <class Params>
Params sized(const AnyBuffer& sequence, bool reverse) {
  Params p;
  p.dtype = dtype_of(sequence);
  p.shape = shape_of(sequence);
  p.reverse = reverse;
  return p;
}

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
                             AnyBuffer initial_state, Output h, Output final_state, bool reverse) {
  return guarded("linear_recurrence", [&] {
    auto p = sized<recurrence::LinearRecurrence>(x, reverse);
    const Shape& s = p.shape;
    Fresh fresh;
    p.a = input(a, "a", s);
    p.x = input(x, "x", s);
    p.initial_state = state(initial_state, "initial_state", s);
    p.h = output(h, "h", s, fresh);
    p.final_state = state(*final_state, "final_state", s);
    run_linear(p, reverse, fresh, pool);
  });
}

ffi::Error linear_recurrence_backward(ffi::ThreadPool pool, AnyBuffer a, AnyBuffer h,
                                      AnyBuffer initial_state, AnyBuffer dh, AnyBuffer dfinal_state,
                                      Output da, Output dx, Output dinitial_state, bool reverse) {
  return guarded("linear_recurrence_backward", [&] {
    auto p = sized<recurrence::LinearRecurrenceBackward>(a, reverse);
    const Shape& s = p.shape;
    Fresh fresh;
    p.a = input(a, "a", s);
    p.h = input(h, "h", s);
    p.dh = input(dh, "dh", s);
    p.initial_state = state(initial_state, "initial_state", s);
    p.dfinal_state = state(dfinal_state, "dfinal_state", s);
    p.da = output(da, "da", s, fresh);
    p.dx = output(dx, "dx", s, fresh);
    p.dinitial_state = state(*dinitial_state, "dinitial_state", s);
    run_linear(p, !reverse, fresh, pool);
  });
}

/// Results: y, final_state, and `kept` the checkpoints if a backward pass follows.
ffi::Error gate_loop(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer z,
                     AnyBuffer initial_state, Output y, Output final_state, ffi::RemainingRets kept,
                     bool reverse) {
  return guarded("gate_loop", [&] {
    auto p = sized<recurrence::PolarGateLoop>(q, reverse);
    const Shape& s = p.shape;
    Fresh fresh;
    p.q = input(q, "q", s);
    p.k = input(k, "k", s);
    p.v = input(v, "v", s);
    p.z = input(z, "z", s, 2);
    p.initial_state = state(initial_state, "initial_state", s);
    p.y = output(y, "y", s, fresh);
    p.final_state = state(*final_state, "final_state", s);
    if (kept.size() > 0) p.saved_states = checkpoints(**kept.get<AnyBuffer>(0), s);
    run_gate(p, fresh, pool);
  });
}

ffi::Error gate_loop_backward(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                              AnyBuffer z, AnyBuffer kept, AnyBuffer dy, AnyBuffer dfinal_state,
                              Output dq, Output dk, Output dv, Output dz, Output dinitial_state,
                              bool reverse) {
  return guarded("gate_loop_backward", [&] {
    auto p = sized<recurrence::PolarGateLoopBackward>(q, reverse);
    const Shape& s = p.shape;
    Fresh fresh;
    p.q = input(q, "q", s);
    p.k = input(k, "k", s);
    p.v = input(v, "v", s);
    p.z = input(z, "z", s, 2);
    p.dy = input(dy, "dy", s);
    p.saved_states = checkpoints(kept, s);
    p.dfinal_state = state(dfinal_state, "dfinal_state", s);
    p.dq = output(dq, "dq", s, fresh);
    p.dk = output(dk, "dk", s, fresh);
    p.dv = output(dv, "dv", s, fresh);
    p.dz = output(dz, "dz", s, fresh, 2);
    p.dinitial_state = state(*dinitial_state, "dinitial_state", s);
    run_gate(p, fresh, pool);
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
                                  .Attr<bool>("reverse"));
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
                                  .Attr<bool>("reverse"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_gate_loop, gateloop::jax::gate_loop,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // z
                                  .Arg<xla::ffi::AnyBuffer>()  // initial_state
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // final_state
                                  .RemainingRets()             // checkpoints
                                  .Attr<bool>("reverse"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_gate_loop_backward, gateloop::jax::gate_loop_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // z
                                  .Arg<xla::ffi::AnyBuffer>()  // checkpoints
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Arg<xla::ffi::AnyBuffer>()  // dfinal_state
                                  .Ret<xla::ffi::AnyBuffer>()  // dq
                                  .Ret<xla::ffi::AnyBuffer>()  // dk
                                  .Ret<xla::ffi::AnyBuffer>()  // dv
                                  .Ret<xla::ffi::AnyBuffer>()  // dz
                                  .Ret<xla::ffi::AnyBuffer>()  // dinitial_state
                                  .Attr<bool>("reverse"));
#pragma GCC visibility pop
