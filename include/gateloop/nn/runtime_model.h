#pragma once

#include "gateloop/nn/transformer.h"
#include "gateloop/runtime.h"

namespace gateloop::nn {

/// The model as runtime::Session reads it, in the memory of its parameters, which must not change
/// meanwhile; float64 is copied to float32, and parameters on another device to the CPU. Decoding
/// by a session takes a fraction of the time of the modules, one operator after the other.
runtime::Model runtime_model(const Transformer& transformer);

/// The modules of a model that was opened from a directory, in eval mode. They are float32,
/// whatever the type that the session computes in. Parameters stored as float32 are in the memory
/// of `model`: read-only, and without gradients. Others are converted copies. Throws
/// std::invalid_argument for a model without options.
Transformer modules_of(const runtime::Model& model);

}  // namespace gateloop::nn
