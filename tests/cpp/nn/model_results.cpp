// What the C++ modules compute in float64 for the models of directories:
// tests/python/test_layers.py compares it with the Python modules. DIR/ids.safetensors holds "ids",
// (B, T); DIR/results.safetensors receives "logits", "loss" and "grad/NAME" for every weight.
#include <torch/torch.h>

#include <filesystem>

#include "gateloop/checkpoint.h"

int main(int count, char** arguments) {
  using namespace gateloop;
  for (int i = 1; i < count; ++i) {
    const std::filesystem::path dir = arguments[i];
    auto model = checkpoint::load_model(dir);
    model->to(torch::kDouble);
    const auto ids = checkpoint::load_safetensors(dir / "ids.safetensors").tensors.at("ids");
    checkpoint::SafeTensors results;
    results.tensors["logits"] = model->forward(ids).detach();
    const auto loss = model->loss(ids);
    loss.backward();
    results.tensors["loss"] = loss.detach().view({1});
    for (const auto& weight : model->named_parameters()) {
      if (weight.value().grad().defined())
        results.tensors["grad/" + weight.key()] = weight.value().grad();
    }
    checkpoint::save_safetensors(dir / "results.safetensors", results);
  }
}
