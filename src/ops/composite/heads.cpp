#include "ops/composite/heads.h"

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/composite/features.h"

namespace gateloop::ops {

at::Tensor by_head(const at::Tensor& t) {
  return t.dim() == 4 ? t.transpose(1, 2) : t.transpose(1, 2).unsqueeze(-1);
}

Turned turned(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
              bool reverse) {
  const auto real = accumulation_type(q.scalar_type());
  const auto turn = [&](const at::Tensor& t) { return reverse ? t.flip(1) : t; };
  return {turn(q.to(real)), turn(k.to(real)), turn(v.to(real)), turn(a)};
}

at::Tensor products_to(const at::Tensor& a) {
  const at::Tensor flat = a.flatten(2);
  const at::Tensor one = at::ones({flat.size(0), flat.size(2)}, a.options());
  return std::get<0>(linear_recurrence(flat, at::zeros_like(flat), one)).view_as(a);
}

at::Tensor products_after(const at::Tensor& a) {
  const at::Tensor flat = a.flatten(2);
  const at::Tensor one = at::ones({flat.size(0), 1, flat.size(2)}, a.options());
  const at::Tensor next = at::cat({flat.narrow(1, 1, flat.size(1) - 1), one}, 1);
  return std::get<0>(
             linear_recurrence(next, at::zeros_like(next), one.squeeze(1), /*reverse=*/true))
      .view_as(a);
}

namespace {

/// Π of a over the steps after s up to t, zero for s > t: (B, H, t, s), or (B, H, K, t, s).
at::Tensor products_between(const at::Tensor& a) {
  const std::int64_t steps = a.size(1);
  const at::Tensor flat = a.flatten(2);
  const at::Tensor each = flat.unsqueeze(-1).expand({-1, -1, -1, steps}).flatten(2);
  const at::Tensor start = at::eye(steps, a.options())
                               .unsqueeze(1)
                               .unsqueeze(0)
                               .expand({a.size(0), steps, flat.size(2), steps});
  const at::Tensor products = std::get<0>(linear_recurrence(each, start.flatten(2)))
                                  .unflatten(2, {flat.size(2), steps})
                                  .transpose(1, 2);
  return a.dim() == 4 ? products.unflatten(1, {a.size(2), a.size(3)}) : products;
}

}  // namespace

at::Tensor scores_inside(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& a,
                         c10::string_view map) {
  const at::Tensor decay = real_part(products_between(a));
  if (a.dim() == 3) {
    return products_of_features(at::matmul(queries, keys.transpose(-1, -2)), map) * decay;
  }
  const at::Tensor left = queries.transpose(-1, -2).unsqueeze(-1);
  const at::Tensor right = keys.transpose(-1, -2).unsqueeze(-2);
  return (left * right * decay).sum(2);
}

at::Tensor scores_of(const at::Tensor& x, const at::Tensor& y) {
  const at::Tensor across = y.transpose(-1, -2);
  if (!x.is_complex()) return at::matmul(x, across);
  return at::matmul(at::real(x), at::real(across)) - at::matmul(at::imag(x), at::imag(across));
}

at::Tensor decay_of(const at::Tensor& a) {
  return by_head(products_to(a)).select(2, a.size(1) - 1);
}

at::Tensor written(const at::Tensor& keys, const at::Tensor& values) {
  const at::Tensor across = keys.transpose(-1, -2);
  if (!across.is_complex()) return at::matmul(across, values);
  return at::complex(at::matmul(at::real(across), values), at::matmul(at::imag(across), values));
}

at::Tensor state_after(const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
                       const OptionalTensor& initial_state) {
  at::Tensor state = written(by_head(k) * by_head(products_after(a)), by_head(v));
  if (is_given(initial_state)) state = state + decay_of(a).unsqueeze(-1) * *initial_state;
  return state;
}

}  // namespace gateloop::ops
