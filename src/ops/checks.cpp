#include "ops/checks.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "gateloop/recurrence.h"

namespace gateloop::ops {

using recurrence::FeatureMap;
namespace {

using Sizes = std::vector<c10::SymInt>;

std::string names(std::initializer_list<at::ScalarType> dtypes) {
  std::ostringstream out;
  const char* separator = "";
  for (const auto dtype : dtypes) {
    out << separator << dtype;
    separator = ", ";
  }
  return out.str();
}

}  // namespace

void check_readable(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.defined(), op, ": ", name, " must be a tensor, got none");
  const bool dense = t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized();
  // Where kernels read memory by its address; they get what torch.func's transforms and Python's
  // tensors have wrapped.
  using enum c10::DispatchKey;
  const bool wrapped =
      t.key_set().has_any(c10::DispatchKeySet({FuncTorchGradWrapper, FuncTorchBatched, Python}));
  const bool addressed = (t.is_cpu() || t.is_cuda()) && !wrapped;
  TORCH_CHECK(dense && (t.has_storage() || !addressed), op, ": ", name,
              " must be a dense tensor, got ", t.toString());
  if (!addressed || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return;
  const std::size_t needed = at::detail::computeStorageNbytes(
      t.sizes(), t.strides(), t.itemsize(), static_cast<std::size_t>(t.storage_offset()));
  TORCH_CHECK(t.numel() == 0 || needed <= t.storage().nbytes(), op, ": ", name, " must lie in ",
              needed, " bytes of storage, got ", t.storage().nbytes());
}

namespace {

/// The arguments of one call, each checked against the first, a sequence (B, T, D).
class Arguments {
 public:
  Arguments(const char* op, const char* name, const at::Tensor& first,
            std::initializer_list<at::ScalarType> dtypes, const OptionalTensor& cu_seqlens)
      : op_(op), name_(name), first_(first), cu_seqlens_(cu_seqlens) {
    check_readable(op, name, first);
    TORCH_CHECK(first.dim() == 3, op, ": ", name, " must be (B, T, D), got a tensor of rank ",
                first.dim(), " with sizes ", first.sym_sizes());
    TORCH_CHECK_TYPE(std::find(dtypes.begin(), dtypes.end(), first.scalar_type()) != dtypes.end(),
                     op, ": ", name, " must be one of ", names(dtypes), ", got ",
                     first.scalar_type());
    state_type_ = accumulation_type(first.scalar_type());
    check_cu_seqlens(op, name, first, cu_seqlens);
  }

  Arguments& with_complex_states() {
    state_type_ = at::toComplexType(state_type_);
    return *this;
  }
  /// (B, T, factor D) in the dtype of the first.
  const Arguments& sequence(const char* name, const OptionalTensor& t, int factor = 1) const {
    const auto sizes = first_.sym_sizes();
    expect(name, t.value_or(at::Tensor()), first_.scalar_type(),
           {sizes[0], sizes[1], sizes[2] * factor});
    return *this;
  }
  const Arguments& optional_sequence(const char* name, const OptionalTensor& t) const {
    return is_given(t) ? sequence(name, t) : *this;
  }
  /// (B or N, D) in the dtype of states, or absent.
  const Arguments& state(const char* name, const OptionalTensor& t) const {
    if (is_given(t)) {
      expect(name, *t, state_type_, {state_count(first_, cu_seqlens_), first_.sym_size(2)});
    }
    return *this;
  }
  /// (B, blocks, D) in the dtype of states.
  void saved_states(const at::Tensor& t) const {
    const auto blocks = saved_count(first_, recurrence::kSavedStateBlock, cu_seqlens_);
    expect("saved_states", t, state_type_, {first_.sym_size(0), blocks, first_.sym_size(2)});
  }

 private:
  void expect(const char* name, const at::Tensor& t, at::ScalarType dtype,
              const Sizes& sizes) const {
    check_readable(op_, name, t);
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, op_, ": ", name, " must be ", dtype, " where ",
                     name_, " is ", first_.scalar_type(), ", got ", t.scalar_type());
    TORCH_CHECK(t.device() == first_.device(), op_, ": ", name, " must be on ", first_.device(),
                " as ", name_, " is, got ", t.device());
    TORCH_CHECK(t.sym_sizes() == c10::SymIntArrayRef(sizes), op_, ": ", name, " must be ",
                c10::SymIntArrayRef(sizes), " where ", name_, " is ", first_.sym_sizes(), ", got ",
                t.sym_sizes());
  }

  const char* op_;
  const char* name_;
  const at::Tensor& first_;
  const OptionalTensor& cu_seqlens_;
  at::ScalarType state_type_;
};

}  // namespace

at::ScalarType accumulation_type(at::ScalarType storage) {
  switch (storage) {
    case at::kBFloat16:
    case at::kHalf:
      return at::kFloat;
    case at::kFloat:
    case at::kDouble:
    case at::kComplexFloat:
    case at::kComplexDouble:
      return storage;
    default:
      TORCH_CHECK_TYPE(false, "gateloop: dtype must be one of ", names(kRecurrenceTypes), ", got ",
                       storage);
  }
}

void check_cu_seqlens(const char* op, const char* name, const at::Tensor& sequence,
                      const OptionalTensor& cu_seqlens) {
  if (!is_given(cu_seqlens)) return;
  const at::Tensor& t = *cu_seqlens;
  check_readable(op, "cu_seqlens", t);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, op,
                   ": cu_seqlens must be Int or Long, got ", t.scalar_type());
  const std::string there = sequence.is_cpu() ? "" : " or on " + sequence.device().str();
  TORCH_CHECK(t.is_cpu() || t.device() == sequence.device(), op, ": cu_seqlens must be on cpu",
              there, ", got ", t.device());
  TORCH_CHECK(t.dim() == 1 && t.sym_size(0) >= 1, op,
              ": cu_seqlens must be (N + 1) for N sequences, got ", t.sym_sizes());
  TORCH_CHECK(sequence.sym_size(0) == 1, op, ": ", name, " must be a batch of one, [1, T, ...], ",
              "beside cu_seqlens, got ", sequence.sym_sizes());
}

void check_mask(const char* op, const char* name, const at::Tensor& sequence,
                const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
  if (!is_given(mask)) return;
  const at::Tensor& t = *mask;
  check_readable(op, "mask", t);
  TORCH_CHECK(!is_given(cu_seqlens), op, ": mask must be absent beside cu_seqlens, got ",
              t.toString(), " ", t.sym_sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kBool, op, ": mask must be Bool, got ", t.scalar_type());
  TORCH_CHECK(t.device() == sequence.device(), op, ": mask must be on ", sequence.device(), " as ",
              name, " is, got ", t.device());
  TORCH_CHECK(t.sym_sizes() == sequence.sym_sizes().slice(0, 2), op,
              ": mask must be (B, T) = ", sequence.sym_sizes().slice(0, 2), " where ", name, " is ",
              sequence.sym_sizes(), ", got ", t.sym_sizes());
}

void check_linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                             const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                             const char* op) {
  Arguments(op, "x", x, kRecurrenceTypes, cu_seqlens)
      .sequence("a", a)
      .state("initial_state", initial_state);
}

void check_linear_recurrence_backward(const OptionalTensor& dh, const OptionalTensor& dfinal_state,
                                      const at::Tensor& a, const at::Tensor& h,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens) {
  Arguments("gateloop::_linear_recurrence_backward", "h", h, kRecurrenceTypes, cu_seqlens)
      .optional_sequence("dh", dh)
      .state("dfinal_state", dfinal_state)
      .sequence("a", a)
      .state("initial_state", initial_state);
}

void check_polar_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& z, const OptionalTensor& initial_state,
                           const OptionalTensor& cu_seqlens, const char* op) {
  Arguments(op, "q", q, kRealTypes, cu_seqlens)
      .with_complex_states()
      .sequence("k", k)
      .sequence("v", v)
      .sequence("z", z, 2)
      .state("initial_state", initial_state);
}

void check_polar_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const at::Tensor& z, const at::Tensor& saved_states,
                                    const OptionalTensor& cu_seqlens) {
  Arguments("gateloop::_polar_gate_loop_backward", "q", q, kRealTypes, cu_seqlens)
      .with_complex_states()
      .optional_sequence("dy", dy)
      .state("dfinal_state", dfinal_state)
      .sequence("k", k)
      .sequence("v", v)
      .sequence("z", z, 2)
      .saved_states(saved_states);
}

void check_simple_gate_loop(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                            const char* op) {
  Arguments(op, "q", q, kRealTypes, cu_seqlens)
      .sequence("kv", kv)
      .sequence("z", z)
      .state("initial_state", initial_state);
}

void check_simple_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                     const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                                     const at::Tensor& saved_states,
                                     const OptionalTensor& cu_seqlens) {
  Arguments("gateloop::_simple_gate_loop_backward", "q", q, kRealTypes, cu_seqlens)
      .optional_sequence("dy", dy)
      .state("dfinal_state", dfinal_state)
      .sequence("kv", kv)
      .sequence("z", z)
      .saved_states(saved_states);
}

namespace {

/// The arguments of a GateLoop, each checked against q: (B, T, D), or (B, T, H, K) of wide heads.
/// Those of one step have no T.
class GateLoopArguments {
 public:
  GateLoopArguments(const char* op, const at::Tensor& q, const at::Tensor& v,
                    const OptionalTensor& cu_seqlens, FeatureMap map, bool one_step = false)
      : op_(op),
        q_(q),
        v_(v),
        cu_seqlens_(cu_seqlens),
        type_(q.scalar_type()),
        lead_(one_step ? 1 : 2),
        wide_(q.dim() == lead_ + 2),
        map_(map),
        prefix_(one_step ? "(B, " : "(B, T, ") {}

  void expect(bool shape, bool dtype, const char* name, const at::Tensor& t,
              const std::string& expected) const {
    const auto message = [&] {
      return c10::str(op_, ": ", name, " must be ", expected, " where q is ", type_, " ",
                      q_.sym_sizes(), " on ", q_.device(), ", got ", t.toString(), " ",
                      t.sym_sizes(), " on ", t.device());
    };
    TORCH_CHECK_VALUE(t.defined() && t.layout() == at::kStrided && t.device() == q_.device(),
                      message());
    TORCH_CHECK_VALUE(shape, message());
    TORCH_CHECK_TYPE(dtype, message());
  }
  void sequences(const at::Tensor& k, const at::Tensor& a) const {
    const auto sizes = q_.sym_sizes();
    const auto lead = static_cast<std::size_t>(lead_ + 1);
    expect(q_.dim() == lead_ + 1 || wide_, std::ranges::find(kRealTypes, type_) != kRealTypes.end(),
           "q", q_, c10::str(prefix_, "D) or ", prefix_, "H, K) of ", names(kRealTypes)));
    expect(k.sym_sizes() == sizes, k.scalar_type() == type_, "k", k,
           c10::str(type_, " of the shape of q"));
    const bool v_fits =
        wide_ ? v_.dim() == q_.dim() && v_.sym_sizes().slice(0, lead) == sizes.slice(0, lead)
              : v_.sym_sizes() == sizes;
    expect(v_fits, v_.scalar_type() == type_, "v", v_,
           c10::str(type_, " ", prefix_, wide_ ? "H, V)" : "D)"));
    const auto real = accumulation_type(type_), complex = at::toComplexType(real);
    const bool plain = map_ == FeatureMap::kNone;
    TORCH_CHECK_VALUE(wide_ || plain, op_, ": feature_map must be none without heads ", prefix_,
                      "H, K)");
    const bool per_key = wide_ && plain && a.sym_sizes() == sizes;
    expect(per_key || a.sym_sizes() == sizes.slice(0, lead),
           a.scalar_type() == real || a.scalar_type() == complex, "a", a,
           wide_ ? c10::str(complex, " or ", real, " ", prefix_, "H)",
                            plain ? c10::str(" or ", prefix_, "H, K)") : "")
                 : c10::str(complex, " or ", real, " ", prefix_, "D)"));
    check_cu_seqlens(op_, "q", q_, cu_seqlens_);
  }
  void only_wide() const { expect(wide_, true, "q", q_, c10::str(prefix_, "H, K)")); }
  /// In the dtype of a; may be absent.
  void state(const char* name, const OptionalTensor& t, const at::Tensor& a) const {
    if (!t.has_value() || !t->defined()) return;
    Sizes sizes = {state_count(q_, cu_seqlens_)};
    for (std::int64_t i = lead_; i < q_.dim(); ++i) sizes.push_back(q_.sym_size(i));
    if (wide_) {
      sizes.back() = state_keys(q_, map_);
      sizes.push_back(v_.sym_size(-1));
    }
    tensor(name, *t, a.scalar_type(), sizes);
  }
  void tensor(const char* name, const at::Tensor& t, at::ScalarType type,
              const Sizes& sizes) const {
    const c10::SymIntArrayRef expected(sizes);
    expect(t.sym_sizes() == expected, t.scalar_type() == type, name, t,
           c10::str(type, " ", expected));
  }

 private:
  const char* op_;
  const at::Tensor &q_, &v_;
  const OptionalTensor cu_seqlens_;
  at::ScalarType type_;
  std::int64_t lead_;  // dimensions before the heads
  bool wide_;
  FeatureMap map_;
  const char* prefix_;
};

}  // namespace

void check_all_readable(const char* op, std::initializer_list<NamedTensor> all) {
  for (const auto& [name, tensor] : all) {
    if (is_given(tensor)) check_readable(op, name, *tensor);
  }
}

c10::SymInt state_count(const at::Tensor& sequence, const OptionalTensor& cu_seqlens) {
  return is_given(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : sequence.sym_size(0);
}

c10::SymInt saved_count(const at::Tensor& sequence, std::int64_t block,
                        const OptionalTensor& cu_seqlens) {
  const c10::SymInt time = sequence.sym_size(1);
  if (is_given(cu_seqlens)) return time / block + state_count(sequence, cu_seqlens);
  return (time + (block - 1)) / block;
}

c10::SymInt saved_chunk_count(const at::Tensor& a, const OptionalTensor& cu_seqlens) {
  return saved_count(a, recurrence::gate_loop_chunk(/*per_key=*/a.dim() == 4), cu_seqlens);
}

FeatureMap feature_map_of(const char* op, c10::string_view name) {
  if (name == "none") return FeatureMap::kNone;
  TORCH_CHECK_VALUE(name == "taylor", op, ": feature_map must be none or taylor, got ", name);
  return FeatureMap::kTaylor;
}

c10::SymInt state_keys(const at::Tensor& q, FeatureMap map) {
  return recurrence::feature_count(map, q.sym_size(-1));
}

void check_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& a, const OptionalTensor& initial_state,
                     const OptionalTensor& cu_seqlens, FeatureMap map, const char* op) {
  const GateLoopArguments arguments(op, q, v, cu_seqlens, map);
  arguments.sequences(k, a);
  arguments.state("initial_state", initial_state, a);
}

void check_gate_loop_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& a, const at::Tensor& state, FeatureMap map) {
  const GateLoopArguments arguments("gateloop::gate_loop_step", q, v, /*cu_seqlens=*/{}, map,
                                    /*one_step=*/true);
  arguments.sequences(k, a);
  arguments.state("state", state, a);
}

void check_wide_gate_loop(const char* op, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v, const at::Tensor& a,
                          const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                          FeatureMap map) {
  check_all_readable(op,
                     {{"q", q}, {"k", k}, {"v", v}, {"a", a}, {"initial_state", initial_state}});
  const GateLoopArguments arguments(op, q, v, cu_seqlens, map);
  arguments.only_wide();
  arguments.sequences(k, a);
  arguments.state("initial_state", initial_state, a);
}

void check_chunked_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                      const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& a, const at::Tensor& saved_states,
                                      const OptionalTensor& cu_seqlens, FeatureMap map) {
  constexpr auto kOp = "gateloop::_chunked_gate_loop_backward";
  check_all_readable(kOp, {{"dy", dy},
                           {"dfinal_state", dfinal_state},
                           {"q", q},
                           {"k", k},
                           {"v", v},
                           {"a", a},
                           {"saved_states", saved_states}});
  const GateLoopArguments arguments(kOp, q, v, cu_seqlens, map);
  arguments.only_wide();
  arguments.sequences(k, a);
  const auto type = q.scalar_type();
  const auto sizes = v.sym_sizes();
  if (is_given(dy)) {
    arguments.tensor("dy", *dy, type, Sizes(sizes.begin(), sizes.end()));
  }
  arguments.state("dfinal_state", dfinal_state, a);
  arguments.tensor("saved_states", saved_states, accumulation_type(type),
                   {q.sym_size(0), saved_chunk_count(a, cu_seqlens), q.sym_size(2),
                    a.is_complex() ? 2 : 1, state_keys(q, map), v.sym_size(3)});
}

}  // namespace gateloop::ops
