// src/model's description of a model, for the Python modules.
#include "gateloop/model.h"

#include <torch/library.h>

#include <stdexcept>
#include <string>

#include "model/provenance.h"

namespace gateloop::ops {
namespace {

/// work(), whose errors become Python's ValueError.
template <typename Work>
std::string as_value_error(const Work& work) {
  try {
    return work();
  } catch (const std::exception& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

std::string describe_model(const std::string& options) {
  return as_value_error([&] { return model::describe(options); });
}

std::string describe_layer(const std::string& layer, std::int64_t dim) {
  return as_value_error([&] { return model::describe_layer(layer, dim); });
}

/// The options as config.json holds them.
std::string stored_options(const std::string& options) {
  return as_value_error([&] { return model::to_json(model::options_from_json(options)); });
}

std::string stored_problems(const std::string& options, const std::string& tensors) {
  return as_value_error([&] { return model::stored_problems(options, tensors); });
}

}  // namespace

// Words in, words out: no tensor chooses a backend.
TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("_describe_model(str options) -> str", &describe_model);
  m.def("_describe_layer(str layer, int dim) -> str", &describe_layer);
  m.def("_stored_options(str options) -> str", &stored_options);
  m.def("_revision() -> str", [] { return std::string(model::kRevision); });
  m.def("_stored_problems(str options, str tensors) -> str", &stored_problems);
}

}  // namespace gateloop::ops
