#pragma once

/// Small models.
#include <cstdint>

#include "gateloop/nn/transformer.h"

namespace gateloop::test {

inline nn::TransformerOptions small_options() {
  nn::TransformerOptions options;
  options.dim = 16;
  options.depth = 2;
  options.dim_head = 8;
  options.heads = 2;
  options.ff_mult = 2;
  return options;
}

/// In double precision: two ways to the same number then differ by far less than any mistake.
inline nn::Transformer make_model(const nn::TransformerOptions& options, std::uint64_t seed = 1) {
  // Tensors this small gain nothing from a second thread. Waiting for it on a busy machine made the
  // tests take 97 s instead of 0.4 s.
  torch::set_num_threads(1);
  torch::manual_seed(seed);
  nn::Transformer model(options);
  model->to(torch::kFloat64);
  model->eval();
  return model;
}

}  // namespace gateloop::test
