#pragma once

/// Feature maps of queries and keys, as recurrence::FeatureMap says what they are.
#include <ATen/ATen.h>

namespace gateloop::ops {

/// (..., K) -> its features in their order, in the accumulation type; x itself for the map "none".
at::Tensor features(const at::Tensor& x, c10::string_view map);

/// φ(q) · φ(k) of products q · k, without the features: 1 + s + s²/2 for the map "taylor".
at::Tensor products_of_features(const at::Tensor& products, c10::string_view map);

}  // namespace gateloop::ops
