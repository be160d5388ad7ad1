#include "gateloop/nn/feed_forward.h"

#include "nn/common.h"

namespace gateloop::nn {

FeedForwardImpl::FeedForwardImpl(std::int64_t dim, std::int64_t mult) {
  check_positive("FeedForward", "dim", dim);
  check_positive("FeedForward", "mult", mult);
  expand_ = register_module("0", torch::nn::Linear(dim, dim * mult));
  contract_ = register_module("2", torch::nn::Linear(dim * mult, dim));
}

torch::Tensor FeedForwardImpl::forward(const torch::Tensor& x) {
  return contract_(at::gelu(expand_(x)));
}

}  // namespace gateloop::nn
