#pragma once

/// A model's weights by name: mapped from a file, or in memory that the caller keeps.
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/runtime.h"
#include "model/config_file.h"
#include "runtime/formats.h"

namespace gateloop::runtime {

/// Pointers that it gives out live as long as it does.
class WeightSet {
 public:
  /// Maps the file.
  explicit WeightSet(const model::ModelFiles& files);
  /// In the memory of `owner`. Throws std::invalid_argument naming every weight that does not fit.
  WeightSet(const model::ModelSpec& spec, const std::vector<StoredWeight>& weights,
            std::shared_ptr<const void> owner);

  const model::ModelSpec& spec() const { return spec_; }
  const std::optional<model::ModelOptions>& options() const { return options_; }
  std::vector<StoredWeight> weights() const;
  const StoredWeight& weight(const std::string& name) const { return weights_.at(name); }
  StoredMatrix stored_matrix(const std::string& name) const;

  /// In place where it is stored in this format, else a copy.
  recurrence::Matrix matrix(const std::string& name, Format format);
  /// As float32; nullptr for "".
  const float* vector(const std::string& name);

  std::int64_t copied_bytes() const { return copied_bytes_; }
  /// Of what the model is and of its weights: the options, and some numbers of every tensor.
  std::uint64_t digest() const;
  /// Of the same, and all their numbers.
  std::uint64_t full_digest() const;

 private:
  model::ModelSpec spec_;
  std::optional<model::ModelOptions> options_;
  std::map<std::string, StoredWeight> weights_;
  std::shared_ptr<const void> owner_;
  std::vector<Converted> copies_;  // their buffers stay where they are when this grows
  std::int64_t copied_bytes_ = 0;
};

}  // namespace gateloop::runtime
