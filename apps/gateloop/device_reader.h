#pragma once

/// Models on other devices than the CPU, which takes libtorch.
#include <functional>
#include <memory>

#include "gateloop/nn/transformer.h"
#include "gateloop/runtime.h"
#include "model_flags.h"

namespace gateloop::app {

/// What a command reads with on one device. The modules are of the same model: on the CPU in
/// float32 whatever --dtype, elsewhere those of the reader.
struct DeviceReader {
  torch::Device device;
  runtime::Model model;
  std::unique_ptr<runtime::Reader> reader;
  std::function<nn::Transformer()> modules;
};

/// On the device of `flags`, for process `local_rank` of those on this machine. Throws as
/// open_byte_model, and UsageError for a device that is not there or cannot have --dtype.
DeviceReader open_device_reader(ModelFlags flags, int local_rank = 0);

}  // namespace gateloop::app
