#include "device_reader.h"

#include <stdexcept>
#include <utility>

#include "commands.h"
#include "gateloop/nn/runtime_model.h"
#include "training/device.h"

namespace gateloop::app {
namespace {

torch::Device device_of(const std::string& name, int local_rank) {
  try {
    return training::device_of(name, local_rank);
  } catch (const std::invalid_argument& error) {
    throw UsageError(std::string("--") + error.what());
  }
}

torch::ScalarType type_of(runtime::Format format) {
  switch (format) {
    case runtime::Format::kFile:
    case runtime::Format::kFloat32:
      return torch::kFloat32;
    case runtime::Format::kBFloat16:
      return torch::kBFloat16;
    case runtime::Format::kFloat16:
      return torch::kHalf;
    case runtime::Format::kInt8:
      break;
  }
  throw UsageError("--dtype int8 needs --device cpu");
}

}  // namespace

DeviceReader open_device_reader(ModelFlags flags, int local_rank) {
  const torch::Device device = device_of(flags.device, local_rank);
  if (device.is_cpu()) flags.device = kCpu;
  if (flags.threads > 0) torch::set_num_threads(flags.threads);
  const runtime::Model model = open_byte_model(flags);
  if (device.is_cpu()) {
    return {device, model,
            std::make_unique<runtime::Session>(model, runtime::SessionOptions{flags.threads}),
            [model] { return nn::modules_of(model); }};
  }
  nn::Transformer modules = nn::modules_of(model);
  modules->to(device, type_of(flags.format));
  return {device, model, std::make_unique<nn::ModuleReader>(modules),
          [modules] { return modules; }};
}

std::unique_ptr<runtime::Reader> open_byte_reader(const ModelFlags& flags) {
  return open_device_reader(flags).reader;
}

}  // namespace gateloop::app
