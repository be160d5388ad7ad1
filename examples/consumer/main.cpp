#include <gateloop/nn.h>

#include <iostream>

int main() {
  gateloop::nn::SimpleGateLoopLayer layer(8);
  const torch::Tensor y = layer->forward(torch::randn({1, 16, 8}));
  std::cout << "gateloop::torch gives " << y.sizes() << '\n';
}
