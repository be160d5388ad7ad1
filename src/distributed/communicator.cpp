#include <atomic>
#include <cstring>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include "distributed/connection.h"
#include "distributed/rendezvous.h"

namespace gateloop::distributed {
namespace {

using c10d::ProcessGroup;

/// No other group of this process has it.
std::string new_group_name() {
  static std::atomic<int> groups = 0;
  return "gateloop-" + std::to_string(groups++);
}

torch::Tensor tensor_of(const std::vector<double>& numbers) {
  return torch::tensor(numbers, torch::kFloat64);
}

std::runtime_error unreached(const Launch& launch, const std::exception& error) {
  return std::runtime_error("process " + std::to_string(launch.rank) + " of " +
                            std::to_string(launch.size) + " did not reach the others at " +
                            launch.address + ":" + std::to_string(launch.port) + ": " +
                            first_line(error));
}

}  // namespace

Communicator::Connection::~Connection() {
  if (!group_name.empty()) c10d::unregister_process_group(group_name);
}

Communicator Communicator::join(const Launch& launch, const JoinOptions& options) {
  const std::string& backend = options.backend;
  if (backend != "auto" && backend != "gloo" && backend != "nccl") {
    const std::string error = "backend must be auto, gloo or nccl, got " + backend;
    report_absence(launch, error, options.on_wait);
    throw std::invalid_argument(error);
  }
  if (launch.size == 1) return {};
  Prepared prepared;
  try {  // first: CUDA may take seconds to start, while others report by the store
    prepared.store = open_store(launch, options.timeout);
  } catch (const std::exception& error) {
    throw unreached(launch, error);
  }
  try {  // all that fails on this machine alone, before the others begin to connect
    prepared.make_gloo = prepare_gloo(launch, options.timeout);
    if (backend == "nccl" || (backend == "auto" && has_nccl() && torch::cuda::is_available())) {
      prepared.make_nccl = prepare_nccl(launch, options.timeout);
    }
  } catch (const std::exception& error) {
    report_absence(launch, first_line(error), options.on_wait, prepared.store);
    throw;
  }
  try {
    return connect(launch, options, prepared);
  } catch (const LostProcess&) {
    throw;
  } catch (const std::exception& error) {
    throw unreached(launch, error);
  }
}

Communicator connect(const Launch& launch, const JoinOptions& options, const Prepared& prepared) {
  auto connection = std::make_shared<Communicator::Connection>();
  connection->launch = launch;
  connection->timeout = options.timeout;
  connection->launch_store = prepared.store;
  connection->store = own_keys(prepared.store, launch, options);
  connection->group =
      c10::make_intrusive<ProcessGroup>(connection->store, launch.rank, launch.size);
  const Backends backends = Communicator::Connection::connect(connection, prepared);
  ProcessGroup& group = *connection->group;
  group.setBackend(torch::kCPU, ProcessGroup::BackendType::GLOO, backends.gloo);
  group.setDefaultBackend(ProcessGroup::BackendType::GLOO);
  if (backends.nccl) {
    group.setBackend(torch::kCUDA, ProcessGroup::BackendType::NCCL, backends.nccl);
  } else if (torch::cuda::is_available()) {
    group.setBackend(torch::kCUDA, ProcessGroup::BackendType::GLOO, backends.gloo);
  }
  const std::string name = new_group_name();
  c10d::register_process_group(name, connection->group);
  connection->group_name = name;
  Communicator communicator;
  communicator.connection_ = std::move(connection);
  return communicator;
}

std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

int Communicator::rank() const { return connection_ ? connection_->launch.rank : 0; }
int Communicator::size() const { return connection_ ? connection_->launch.size : 1; }
int Communicator::local_rank() const { return connection_ ? connection_->launch.local_rank : 0; }
int Communicator::local_size() const { return connection_ ? connection_->launch.local_size : 1; }
std::chrono::milliseconds Communicator::timeout() const {
  return connection_ ? connection_->timeout : std::chrono::milliseconds(0);
}

std::pair<std::int64_t, std::int64_t> Communicator::part_of(std::int64_t count) const {
  return {count * rank() / size(), count * (rank() + 1) / size()};
}

std::vector<std::vector<double>> Communicator::gather(const std::vector<double>& numbers) const {
  if (!connection_) return {numbers};
  std::vector<torch::Tensor> mine = {tensor_of(numbers)};
  std::vector<std::vector<torch::Tensor>> all(1);
  for (int r = 0; r < size(); ++r) all[0].push_back(torch::empty_like(mine[0]));
  connection_->group->allgather(all, mine)->wait();
  std::vector<std::vector<double>> rows;
  for (const torch::Tensor& row : all[0]) {
    const auto* begin = row.const_data_ptr<double>();
    rows.emplace_back(begin, begin + row.numel());
  }
  return rows;
}

double Communicator::from_main(double number) const {
  if (!connection_) return number;
  const torch::Tensor tensor = tensor_of({number});
  broadcast({tensor});
  return tensor.item<double>();
}

std::string Communicator::from_main(const std::function<std::string()>& decide) const {
  if (!connection_) return decide();
  std::string text;
  std::exception_ptr error;
  if (is_main()) {
    try {
      text = decide();
    } catch (const std::exception& thrown) {
      error = std::current_exception();
      text = first_line(thrown);
    }
  }
  const torch::Tensor header =
      torch::tensor({std::ssize(text), std::int64_t{error != nullptr}}, torch::kInt64);
  broadcast({header});
  const torch::Tensor bytes = torch::empty({header[0].item<std::int64_t>()}, torch::kUInt8);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  broadcast({bytes});
  if (error) std::rethrow_exception(error);
  text.assign(static_cast<const char*>(bytes.const_data_ptr()),
              static_cast<std::size_t>(bytes.numel()));
  if (header[1].item<std::int64_t>() != 0) throw std::runtime_error("process 0: " + text);
  return text;
}

void Communicator::broadcast(const std::vector<torch::Tensor>& tensors, int root) const {
  if (!connection_) return;
  // Several small tensors travel as one message; larger buffers gain nothing.
  constexpr std::size_t kBufferBytes = 25 << 20;
  const torch::NoGradGuard no_grad;
  c10d::broadcast_coalesced(connection_->group, tensors, kBufferBytes, root);
}

void Communicator::send_to_main(const torch::Tensor& tensor, int from) const {
  if (from == 0 || (rank() != 0 && rank() != from)) return;
  constexpr int kTag = 0;
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> message = {tensor};
  (is_main() ? connection_->group->recv(message, from, kTag)
             : connection_->group->send(message, 0, kTag))
      ->wait();
}

std::string Communicator::time_group() const {
  return connection_ ? connection_->group_name : std::string();
}

void Communicator::leave_note(const std::string& name, const std::string& text) const {
  if (connection_) connection_->launch_store->set("gateloop/note/" + name, text);
}

std::string Communicator::note(const std::string& name) const {
  const std::string key = "gateloop/note/" + name;
  if (!connection_ || !connection_->launch_store->check({key})) return "";
  return connection_->launch_store->get_to_str(key);
}

}  // namespace gateloop::distributed
