// One layer of the simplified, real GateLoop on a long sequence.
#include <gateloop/nn.h>

#include <iostream>

int main() {
  gateloop::nn::SimpleGateLoopLayer gate_loop(512);

  torch::Tensor x = torch::randn({1, 65536, 512});
  x = gate_loop->forward(x) + x;

  std::cout << x.sizes() << '\n';  // [1, 65536, 512]
}
