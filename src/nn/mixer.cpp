#include "gateloop/nn/mixer.h"

namespace gateloop::nn {

std::int64_t MixerState::bytes() const {
  std::int64_t total = 0;
  for (const auto& tensor : {recurrence, keys, values, simple_gate_loop}) {
    if (tensor.defined()) total += static_cast<std::int64_t>(tensor.nbytes());
  }
  return total;
}

}  // namespace gateloop::nn
