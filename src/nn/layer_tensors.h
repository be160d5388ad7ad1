#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>

namespace gateloop::nn {

/// The tensors that the layers of a model read. torch's layers have public members, to which
/// another tensor may have been assigned after the registration as a parameter.
class LayerTensors {
 public:
  explicit LayerTensors(const torch::nn::Module& model);

  /// By the name of the parameter; undefined where the model has none.
  torch::Tensor find(const std::string& name) const;

  /// Whether a layer now reads another tensor, other memory, another dtype, or values written in
  /// place since. Writes through a raw pointer, and to tensors made in inference mode, do not show.
  bool have_changed() const;

 private:
  struct Entry {
    const torch::Tensor* now;
    torch::Tensor then;
    const void* data;
    std::int64_t version;
  };
  void add(const std::string& name, const torch::Tensor& tensor);

  std::unordered_map<std::string, Entry> entries_;
  std::deque<torch::Tensor> parameters_;  ///< of our layers, whose members are private
};

}  // namespace gateloop::nn
