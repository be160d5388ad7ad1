#include "ops/composite/features.h"

#include <numbers>

#include "ops/checks.h"

namespace gateloop::ops {

at::Tensor features(const at::Tensor& x, c10::string_view map) {
  if (map == "none") return x;
  const at::Tensor wide = x.to(accumulation_type(x.scalar_type()));
  const std::int64_t keys = x.size(-1);
  const at::Tensor pairs =
      at::tril_indices(keys, keys, /*offset=*/-1, x.options().dtype(at::kLong));
  const auto channel = [&](std::int64_t which) { return wide.index_select(-1, pairs[which]); };
  const at::Tensor one_and_channels = at::constant_pad_nd(wide, {1, 0}, 1);
  return at::cat({one_and_channels, wide.square() / std::numbers::sqrt2, channel(0) * channel(1)},
                 -1);
}

at::Tensor products_of_features(const at::Tensor& products, c10::string_view map) {
  return map == "none" ? products : 1 + products + products.square() / 2;
}

}  // namespace gateloop::ops
