// A GateLoop Transformer over bytes: ids in, logits out.
#include <gateloop/nn.h>

#include <iostream>

int main() {
  gateloop::nn::Transformer model(
      gateloop::nn::TransformerOptions{.num_tokens = 256, .dim = 624, .depth = 6});

  torch::Tensor ids = torch::randint(0, 256, {1, 1024});
  torch::Tensor logits = model->forward(ids);

  std::cout << logits.sizes() << '\n';  // [1, 1024, 256]
}
