#pragma once

#include <torch/library.h>

namespace gateloop::ops {

/// Defines an operator that has kernels. Where a backend has none, calls are refused: the error
/// names the operator and the argument.
void define(torch::Library& m, const char* schema);

}  // namespace gateloop::ops
