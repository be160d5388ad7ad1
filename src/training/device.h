#pragma once

/// Where a run computes.
#include <torch/torch.h>

#include <string>

#include "gateloop/nn/transformer.h"

namespace gateloop::training {

/// "cpu", "cuda", "cuda:N" or "auto", without asking whether it is there.
bool is_device_name(const std::string& name);

/// The device of a name for process `local_rank` of those on this machine. "cuda": the CUDA device
/// of that number; "auto": the same, or the CPU where there is none. Throws std::invalid_argument
/// naming the option for another name and where the device is not there.
torch::Device device_of(const std::string& name, int local_rank = 0);

/// Where the model's parameters are.
torch::Device device_of(const nn::Transformer& model);

/// ids on the device. To a CUDA device they go from pinned memory, without waiting.
torch::Tensor moved(const torch::Tensor& ids, const torch::Device& device);

}  // namespace gateloop::training
