#pragma once

/// Feature maps of queries and keys, one row at a time.
#include <cstdint>
#include <numbers>

#include "gateloop/recurrence.h"

namespace gateloop::recurrence {

/// The Taylor map: 1, x_i, x_i²/√2, x_i x_j for j < i. x may be features + 1.
template <class T>
void taylor_features(const T* x, std::int64_t n, T* features) {
  *features++ = T(1);
  for (std::int64_t i = 0; i < n; ++i) *features++ = x[i];
  for (std::int64_t i = 0; i < n; ++i) *features++ = x[i] * x[i] / std::numbers::sqrt2_v<T>;
  for (std::int64_t i = 1; i < n; ++i) {
    for (std::int64_t j = 0; j < i; ++j) *features++ = x[i] * x[j];
  }
}

/// The gradient of x from that of its features; dx may be dfeatures.
template <class T>
void taylor_gradient(const T* x, const T* dfeatures, std::int64_t n, T* dx) {
  const T *linear = dfeatures + 1, *squares = linear + n, *pairs = squares + n;
  for (std::int64_t i = 0; i < n; ++i)
    dx[i] = linear[i] + std::numbers::sqrt2_v<T> * x[i] * squares[i];
  for (std::int64_t i = 1; i < n; ++i) {
    for (std::int64_t j = 0; j < i; ++j, ++pairs) {
      dx[i] += *pairs * x[j];
      dx[j] += *pairs * x[i];
    }
  }
}

}  // namespace gateloop::recurrence
