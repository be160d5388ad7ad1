#pragma once

/// The operations that XLA calls, the same on every platform: which buffer is which member of a
/// kernel's struct.
///
/// In memory, sequences are dense (..., T, D), pairs (..., T, D, 2), states (..., D), saved states
/// (..., N, D). With `time_last` a program names the axes of the same memory (..., D, T). All
/// buffers then begin with the axes along which XLA may partition. The program sets layouts to
/// match, which XLA does not pass to handlers. A program may be deserialised or made by hand, so
/// every buffer's dtype and shape are checked here too.
#include <xla/ffi/api/ffi.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gateloop/recurrence.h"

namespace gateloop::jax {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Output = ffi::Result<AnyBuffer>;
struct Memory {
  void* data;
  std::size_t bytes;
};
using Fresh = std::vector<Memory>;
using recurrence::DType;
using recurrence::Shape;

using Sizes = std::vector<std::int64_t>;

inline Sizes sizes_of(const AnyBuffer& buffer) {
  const auto sizes = buffer.dimensions();
  return {sizes.begin(), sizes.end()};
}

inline std::string described(ffi::DataType type, const Sizes& sizes) {
  std::ostringstream text;
  text << type << " (";
  for (std::size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ")";
  return text.str();
}

inline DType dtype_of(ffi::DataType type, const char* name) {
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
inline ffi::DataType accumulation_of(ffi::DataType type) {
  return type == ffi::BF16 || type == ffi::F16 ? ffi::F32 : type;
}

inline void* checked(const AnyBuffer& buffer, const char* name, ffi::DataType type,
                     const Sizes& sizes) {
  const Sizes given = sizes_of(buffer);
  if (buffer.element_type() != type || given != sizes) {
    throw std::invalid_argument(std::string(name) + " must be " + described(type, sizes) +
                                ", got " + described(buffer.element_type(), given));
  }
  return buffer.untyped_data();
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
  recurrence::Sequence output(Output buffer, const char* name, std::int64_t parts = 1) {
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

/// Names are in the order of the members.
struct Attributes {
  bool reverse, time_last;
  static constexpr const char* kNames[] = {"reverse", "time_last"};
};

struct HeadsAttributes {
  bool reverse, taylor;
  static constexpr const char* kNames[] = {"reverse", "taylor"};
};

/// A call of heads wider than one channel: q (..., T, H, K), v (..., T, H, V) and a (..., T, H) or
/// (..., T, H, K), and all other buffers checked against them.
class HeadsCall {
 public:
  HeadsCall(const AnyBuffer& q, const AnyBuffer& v, const AnyBuffer& a, HeadsAttributes attributes)
      : attributes_(attributes), type_(q.element_type()), lead_(sizes_of(q)) {
    dtype_ = dtype_of(type_, "q");
    real_ = accumulation_of(type_);
    if (real_ != ffi::F32 && real_ != ffi::F64) {
      throw std::invalid_argument("q must be F32, F64, BF16 or F16, got " + described(type_, {}));
    }
    complex_ = a.element_type() == ffi::C64 || a.element_type() == ffi::C128;
    state_ = !complex_ ? real_ : real_ == ffi::F32 ? ffi::C64 : ffi::C128;
    const Sizes values = sizes_of(v);
    if (lead_.size() < 3) {
      throw std::invalid_argument("q must have 3 axes or more, got " + described(type_, lead_));
    }
    if (values.empty()) {
      throw std::invalid_argument("v must have 3 axes or more, got " +
                                  described(v.element_type(), values));
    }
    per_key_ = a.dimensions().size() == lead_.size();
    shape_ = {1, lead_[lead_.size() - 3], lead_[lead_.size() - 2], lead_.back(), values.back()};
    lead_.resize(lead_.size() - 3);
    for (const std::int64_t size : lead_) shape_.batch *= size;
  }

  template <class Params>
  Params params() const {
    Params p;
    p.dtype = dtype_;
    p.shape = shape_;
    p.complex = complex_;
    p.per_key = per_key_;
    p.feature_map = map();
    p.reverse = attributes_.reverse;
    return p;
  }
  /// What a head has at a step.
  enum class Row { kKeys, kValues, kTransitions };
  recurrence::ConstHeads input(const AnyBuffer& buffer, const char* name, Row row) const {
    return heads<recurrence::ConstHeads>(buffer, name, row);
  }
  /// Adds its memory to fresh(), which the call is to write whole.
  recurrence::Heads output(Output buffer, const char* name, Row row) {
    fresh_.push_back({buffer->untyped_data(), buffer->size_bytes()});
    return heads<recurrence::Heads>(*buffer, name, row);
  }
  void* state(const AnyBuffer& buffer, const char* name) const {
    return checked(buffer, name, state_, sizes({shape_.heads, state_keys(), shape_.values}));
  }
  void* saved_states(const AnyBuffer& buffer, const char* name) const {
    return checked(buffer, name, real_,
                   sizes({recurrence::gate_loop_chunks(shape_.time, per_key_), shape_.heads,
                          complex_ ? 2 : 1, state_keys(), shape_.values}));
  }
  const Fresh& fresh() const { return fresh_; }

 private:
  recurrence::FeatureMap map() const {
    return attributes_.taylor ? recurrence::FeatureMap::kTaylor : recurrence::FeatureMap::kNone;
  }
  std::int64_t state_keys() const { return recurrence::feature_count(map(), shape_.keys); }
  Sizes sizes(const Sizes& rest) const {
    Sizes all = lead_;
    all.insert(all.end(), rest.begin(), rest.end());
    return all;
  }
  template <class Heads>
  Heads heads(const AnyBuffer& buffer, const char* name, Row row) const {
    const bool is_transition = row == Row::kTransitions;
    const bool has_width = !is_transition || per_key_;
    const std::int64_t width = !has_width ? 1 : row == Row::kValues ? shape_.values : shape_.keys;
    Sizes rest = {shape_.time, shape_.heads};
    if (has_width) rest.push_back(width);
    return {checked(buffer, name, is_transition ? state_ : type_, sizes(rest)),
            shape_.time * shape_.heads * width, shape_.heads * width, width};
  }

  HeadsAttributes attributes_;
  ffi::DataType type_, real_, state_;
  DType dtype_;
  bool complex_, per_key_;
  Sizes lead_;
  recurrence::HeadsShape shape_;
  Fresh fresh_;
};

/// What a handler runs: a kernel's struct, and the sequences that it writes whole.
template <class Params>
struct Kernel {
  Params params;
  Fresh fresh;
};

/// The saved states, where a call has them as its third result.
inline std::optional<AnyBuffer> third_result(ffi::RemainingRets saved) {
  if (saved.size() > 1) throw std::invalid_argument("results must be 2 or 3, got more");
  if (saved.size() == 0) return {};
  auto states = saved.get<AnyBuffer>(0);
  if (!states.has_value()) throw std::invalid_argument("saved_states must be an array");
  return **states;
}

inline Kernel<recurrence::LinearRecurrence> linear_recurrence(Attributes attributes, AnyBuffer a,
                                                              AnyBuffer x, AnyBuffer initial_state,
                                                              Output h, Output final_state) {
  Call call(x, "x", attributes.time_last);
  auto p = call.params<recurrence::LinearRecurrence>(attributes.reverse);
  p.a = call.input(a, "a");
  p.x = call.input(x, "x");
  p.initial_state = call.state(initial_state, "initial_state");
  p.h = call.output(h, "h");
  p.final_state = call.state(*final_state, "final_state");
  return {p, call.fresh()};
}

inline Kernel<recurrence::LinearRecurrenceBackward> linear_recurrence_backward(
    Attributes attributes, AnyBuffer a, AnyBuffer h, AnyBuffer initial_state, AnyBuffer dh,
    AnyBuffer dfinal_state, Output da, Output dx, Output dinitial_state) {
  Call call(a, "a", attributes.time_last);
  auto p = call.params<recurrence::LinearRecurrenceBackward>(attributes.reverse);
  p.a = call.input(a, "a");
  p.h = call.input(h, "h");
  p.dh = call.input(dh, "dh");
  p.initial_state = call.state(initial_state, "initial_state");
  p.dfinal_state = call.state(dfinal_state, "dfinal_state");
  p.da = call.output(da, "da");
  p.dx = call.output(dx, "dx");
  p.dinitial_state = call.state(*dinitial_state, "dinitial_state");
  return {p, call.fresh()};
}

/// What the reads have in common. `saved`: the saved states, if a backward pass follows. `row`: of
/// wide heads, Row::kValues.
template <class AnyCall, class Params, class... Row>
Kernel<Params> read(AnyCall& call, Params p, const AnyBuffer& initial_state, Output y,
                    Output final_state, const ffi::RemainingRets& saved, Row... row) {
  p.initial_state = call.state(initial_state, "initial_state");
  p.y = call.output(y, "y", row...);
  p.final_state = call.state(*final_state, "final_state");
  if (const auto states = third_result(saved)) {
    p.saved_states = call.saved_states(*states, "saved_states");
  }
  return {p, call.fresh()};
}
template <class AnyCall, class Params, class... Row>
Kernel<Params> read_backward(AnyCall& call, Params p, const AnyBuffer& saved_states,
                             const AnyBuffer& dy, const AnyBuffer& dfinal_state,
                             Output dinitial_state, Row... row) {
  p.dy = call.input(dy, "dy", row...);
  p.saved_states = call.saved_states(saved_states, "saved_states");
  p.dfinal_state = call.state(dfinal_state, "dfinal_state");
  p.dinitial_state = call.state(*dinitial_state, "dinitial_state");
  return {p, call.fresh()};
}

/// Results: y, final_state, and `saved` the saved states if a backward pass follows.
inline Kernel<recurrence::PolarGateLoop> polar_gate_loop(Attributes attributes, AnyBuffer q,
                                                         AnyBuffer k, AnyBuffer v, AnyBuffer z,
                                                         AnyBuffer initial_state, Output y,
                                                         Output final_state,
                                                         ffi::RemainingRets saved) {
  Call call(q, "q", attributes.time_last);
  call.with_complex_states("q");
  auto p = call.params<recurrence::PolarGateLoop>(attributes.reverse);
  p.q = call.input(q, "q");
  p.k = call.input(k, "k");
  p.v = call.input(v, "v");
  p.z = call.input(z, "z", 2);
  return read(call, p, initial_state, y, final_state, saved);
}

inline Kernel<recurrence::PolarGateLoopBackward> polar_gate_loop_backward(
    Attributes attributes, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer z,
    AnyBuffer saved_states, AnyBuffer dy, AnyBuffer dfinal_state, Output dq, Output dk, Output dv,
    Output dz, Output dinitial_state) {
  Call call(q, "q", attributes.time_last);
  call.with_complex_states("q");
  auto p = call.params<recurrence::PolarGateLoopBackward>(attributes.reverse);
  p.q = call.input(q, "q");
  p.k = call.input(k, "k");
  p.v = call.input(v, "v");
  p.z = call.input(z, "z", 2);
  p.dq = call.output(dq, "dq");
  p.dk = call.output(dk, "dk");
  p.dv = call.output(dv, "dv");
  p.dz = call.output(dz, "dz", 2);
  return read_backward(call, p, saved_states, dy, dfinal_state, dinitial_state);
}

/// Results: y, final_state, and `saved` the saved states if a backward pass follows.
inline Kernel<recurrence::SimpleGateLoop> simple_gate_loop(Attributes attributes, AnyBuffer q,
                                                           AnyBuffer kv, AnyBuffer z,
                                                           AnyBuffer initial_state, Output y,
                                                           Output final_state,
                                                           ffi::RemainingRets saved) {
  Call call(q, "q", attributes.time_last);
  auto p = call.params<recurrence::SimpleGateLoop>(attributes.reverse);
  p.q = call.input(q, "q");
  p.kv = call.input(kv, "kv");
  p.z = call.input(z, "z");
  return read(call, p, initial_state, y, final_state, saved);
}

inline Kernel<recurrence::SimpleGateLoopBackward> simple_gate_loop_backward(
    Attributes attributes, AnyBuffer q, AnyBuffer kv, AnyBuffer z, AnyBuffer saved_states,
    AnyBuffer dy, AnyBuffer dfinal_state, Output dq, Output dkv, Output dz, Output dinitial_state) {
  Call call(q, "q", attributes.time_last);
  auto p = call.params<recurrence::SimpleGateLoopBackward>(attributes.reverse);
  p.q = call.input(q, "q");
  p.kv = call.input(kv, "kv");
  p.z = call.input(z, "z");
  p.dq = call.output(dq, "dq");
  p.dkv = call.output(dkv, "dkv");
  p.dz = call.output(dz, "dz");
  return read_backward(call, p, saved_states, dy, dfinal_state, dinitial_state);
}

/// Results: y, final_state, and `saved` the saved states if a backward pass follows.
inline Kernel<recurrence::GateLoop> gate_loop(HeadsAttributes attributes, AnyBuffer q, AnyBuffer k,
                                              AnyBuffer v, AnyBuffer a, AnyBuffer initial_state,
                                              Output y, Output final_state,
                                              ffi::RemainingRets saved) {
  HeadsCall call(q, v, a, attributes);
  auto p = call.params<recurrence::GateLoop>();
  p.q = call.input(q, "q", HeadsCall::Row::kKeys);
  p.k = call.input(k, "k", HeadsCall::Row::kKeys);
  p.v = call.input(v, "v", HeadsCall::Row::kValues);
  p.a = call.input(a, "a", HeadsCall::Row::kTransitions);
  return read(call, p, initial_state, y, final_state, saved, HeadsCall::Row::kValues);
}

inline Kernel<recurrence::GateLoopBackward> gate_loop_backward(
    HeadsAttributes attributes, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer a,
    AnyBuffer saved_states, AnyBuffer dy, AnyBuffer dfinal_state, Output dq, Output dk, Output dv,
    Output da, Output dinitial_state) {
  HeadsCall call(q, v, a, attributes);
  auto p = call.params<recurrence::GateLoopBackward>();
  p.q = call.input(q, "q", HeadsCall::Row::kKeys);
  p.k = call.input(k, "k", HeadsCall::Row::kKeys);
  p.v = call.input(v, "v", HeadsCall::Row::kValues);
  p.a = call.input(a, "a", HeadsCall::Row::kTransitions);
  p.dq = call.output(dq, "dq", HeadsCall::Row::kKeys);
  p.dk = call.output(dk, "dk", HeadsCall::Row::kKeys);
  p.dv = call.output(dv, "dv", HeadsCall::Row::kValues);
  p.da = call.output(da, "da", HeadsCall::Row::kTransitions);
  return read_backward(call, p, saved_states, dy, dfinal_state, dinitial_state,
                       HeadsCall::Row::kValues);
}

/// The binding of a buffer, by its type among an operation's parameters.
template <class Buffer, class Binding>
auto with_buffer(Binding&& binding) {
  if constexpr (std::is_same_v<Buffer, AnyBuffer>) {
    return std::forward<Binding>(binding).template Arg<AnyBuffer>();
  } else if constexpr (std::is_same_v<Buffer, Output>) {
    return std::forward<Binding>(binding).template Ret<AnyBuffer>();
  } else {
    static_assert(std::is_same_v<Buffer, ffi::RemainingRets>);
    return std::forward<Binding>(binding).RemainingRets();
  }
}
template <class First, class... Rest, class Binding>
auto with_buffers(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0) {
    return with_buffer<First>(std::forward<Binding>(binding));
  } else {
    return with_buffers<Rest...>(with_buffer<First>(std::forward<Binding>(binding)));
  }
}
/// A platform's binding, then the attributes and buffers of an operation in their order.
template <class Binding, class Params, class Options, class... Buffers>
auto bound(Binding&& binding, Kernel<Params> (*)(Options, Buffers...)) {
  return with_buffers<Buffers...>(std::forward<Binding>(binding)
                                      .template Attr<bool>(Options::kNames[0])
                                      .template Attr<bool>(Options::kNames[1]));
}

/// An exception of the checks or the kernels as the value that XLA takes.
template <class Body>
ffi::Error guarded(const char* name, const Body& body) {
  const auto message = [&](const std::exception& error) {
    return std::string("gateloop: ") + name + ": " + error.what();
  };
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(message(error));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(message(error));
  }
}

}  // namespace gateloop::jax
