#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "gateloop/runtime.h"

namespace gateloop::ops {

/// A model of weights by name that reads them in the tensors' own memory, which it holds. Throws
/// c10::ValueError for a tensor that is not dense, on the CPU and floating point; else as
/// runtime::Model.
runtime::Model model_of(const model::ModelSpec& spec, const std::vector<std::string>& names,
                        const std::vector<at::Tensor>& tensors);

/// Of the dtype of a runtime::StoredWeight. Throws c10::ValueError for a name that is none.
at::ScalarType scalar_type_of(const std::string& dtype);

}  // namespace gateloop::ops
