#pragma once

/// Random models in directories, and how far logits lie from their definition.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gateloop/model.h"
#include "oracle.h"

namespace gateloop::test {

/// A model of one layer of every kind, as its options say it, with a name for messages.
struct Case {
  std::string name;
  model::ModelOptions options;
};
/// Every mixer with every option of its own, before and after norms, ablations, tied embeddings.
std::vector<Case> cases();
Case case_of(const std::string& name);
/// Drawn from all of that.
model::ModelOptions random_options(std::mt19937_64& random);

/// Random weights, rounded to float32, in a scale that keeps activations near 1.
Weights random_weights(const model::ModelSpec& spec, std::mt19937_64& random);

/// Writes config.json and model.safetensors in `dtype`: "F64", "F32", "BF16" or "F16". Rounds
/// `weights` to what was written.
void write_model(const std::string& dir, const model::ModelOptions& options, Weights& weights,
                 const std::string& dtype = "F32");

/// What a file's weights stand for, int8 with their scales.
Weights read_weights(const std::string& dir);

std::vector<std::int64_t> random_ids(const model::ModelSpec& spec, std::int64_t count,
                                     std::mt19937_64& random);

/// Of logits (rows, tokens): of each token the largest difference over its largest expected logit,
/// and of these the largest. A logit is a sum of products: where they cancel it counts as a
/// sixteenth of the largest.
template <class A, class B>
double distance(const A& actual, const B& expected, std::int64_t tokens) {
  if (std::size(actual) != std::size(expected)) return INFINITY;
  const auto width = static_cast<std::size_t>(tokens);
  std::vector<double> sizes(width), apart(width);
  for (std::size_t i = 0; i < std::size(expected); ++i) {
    const auto right = static_cast<double>(expected[i]);
    double &size = sizes[i % width], &most = apart[i % width];
    size = std::max(size, std::fabs(right));
    const double difference = std::fabs(static_cast<double>(actual[i]) - right);
    if (!(difference <= most)) most = difference;  // NaN too
  }
  const double least = *std::max_element(sizes.begin(), sizes.end()) / 16;
  double farthest = 0;
  for (std::size_t token = 0; token < width; ++token) {
    const double error = apart[token] / std::max(sizes[token], least);
    if (!(error <= farthest)) farthest = error;
  }
  return farthest;
}

}  // namespace gateloop::test
