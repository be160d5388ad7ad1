#include "gateloop/nn/feed_forward.h"

#include "nn/common.h"
#include "ops/activations.h"

namespace gateloop::nn {

FeedForwardImpl::FeedForwardImpl(std::int64_t dim, std::int64_t mult) {
  check_positive("FeedForward", "dim", dim);
  check_positive("FeedForward", "mult", mult);
  expand_ = register_module("0", Linear(dim, dim * mult));
  contract_ = register_module("2", Linear(dim * mult, dim));
}

torch::Tensor FeedForwardImpl::forward(const torch::Tensor& x) {
  return contract_(ops::gelu(expand_(x)));
}

}  // namespace gateloop::nn
