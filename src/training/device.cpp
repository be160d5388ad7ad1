#include "training/device.h"

#include <torch/cuda.h>

#include <charconv>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace gateloop::training {
namespace {

constexpr std::string_view kNumbered = "cuda:";

/// The N of "cuda:N"; -1 where it is not one.
int index_of(std::string_view name) {
  if (!name.starts_with(kNumbered)) return -1;
  name.remove_prefix(kNumbered.size());
  int number = -1;
  const char* const last = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data(), last, number);
  const bool fits = error == std::errc() && stop == last && number >= 0 &&
                    number <= std::numeric_limits<c10::DeviceIndex>::max();
  return fits ? number : -1;
}

}  // namespace

bool is_device_name(const std::string& name) {
  return name == "cpu" || name == "cuda" || name == "auto" || index_of(name) >= 0;
}

torch::Device device_of(const std::string& name, int local_rank) {
  if (!is_device_name(name))
    throw std::invalid_argument("device must be cpu, cuda, cuda:N or auto, got \"" + name + "\"");
  if (name == "cpu") return torch::kCPU;
  // NOLINTNEXTLINE(bugprone-signed-char-misuse): a count
  const auto there = static_cast<int>(torch::cuda::device_count());
  if (name == "auto" && there == 0) return torch::kCPU;
  // A scheduler may show each process a device of its own.
  const int own = there == 1 ? 0 : local_rank;
  const int index = name == "auto" || name == "cuda" ? own : index_of(name);
  if (index >= there) {
    throw std::invalid_argument("device must be one that is there: " +
                                (there == 0
                                     ? std::string("cpu, this libtorch finds no CUDA device")
                                     : "cpu or cuda:0 to cuda:" + std::to_string(there - 1)) +
                                ", got \"" + name + "\"");
  }
  return {torch::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

torch::Device device_of(const nn::Transformer& model) {
  return model->parameters().front().device();
}

torch::Tensor moved(const torch::Tensor& ids, const torch::Device& device) {
  if (device.is_cpu()) return ids;
  return (device.is_cuda() ? ids.pin_memory() : ids).to(device, /*non_blocking=*/true);
}

}  // namespace gateloop::training
