#pragma once

#include "gateloop/nn/transformer.h"
#include "gateloop/runtime.h"

namespace gateloop::nn {

/// The model as runtime::Session reads it, in the memory of its parameters, which must not change
/// meanwhile; float64 is copied to float32, and parameters on another device to the CPU. Decoding
/// by a session takes a fraction of the time of the modules, one operator after the other.
runtime::Model runtime_model(const Transformer& transformer);

}  // namespace gateloop::nn
