#pragma once

#include <cstdint>
#include <span>

#include "gateloop/nn/transformer.h"

namespace gateloop::training {

/// Windows of length + 1 bytes whose predictions do not overlap.
std::int64_t window_count(std::span<const std::uint8_t> text, std::int64_t length);

/// Mean bits per byte over `windows` evenly spaced windows (at most window_count of them), each
/// from zero state, under autocast in `dtype`. The same windows at every call. The model is in eval
/// mode meanwhile.
double validate(nn::Transformer& model, std::span<const std::uint8_t> text, std::int64_t length,
                std::int64_t windows, torch::ScalarType dtype);

}  // namespace gateloop::training
