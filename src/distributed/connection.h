#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>

#include "gateloop/distributed.h"

namespace gateloop::distributed {

struct Communicator::Connection {
  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection();

  Launch launch;
  std::chrono::milliseconds timeout = {};
  c10::intrusive_ptr<c10d::Store> launch_store;  // of the launcher or of process 0
  c10::intrusive_ptr<c10d::Store> store;         // the same, under keys of these processes' life
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::string group_name;  // in c10d's registry, which does not own the group
};

using Backend = c10::intrusive_ptr<c10d::Backend>;
/// Connects all processes through the store.
using MakeBackend = std::function<Backend(const c10::intrusive_ptr<c10d::Store>& store)>;

/// gloo on this machine's interfaces. Throws where GLOO_SOCKET_IFNAME names one that is not there,
/// std::invalid_argument in a build without gloo's headers.
MakeBackend prepare_gloo(const Launch& launch, std::chrono::milliseconds timeout);
/// Whether this build has NCCL.
bool has_nccl();
/// Throws std::invalid_argument in a build without it, or where libtorch finds no CUDA device.
MakeBackend prepare_nccl(const Launch& launch, std::chrono::milliseconds timeout);

/// Of the error's text: libtorch's goes on for a page.
std::string first_line(const std::exception& error);

/// What `call` returns. Throws std::runtime_error where that takes longer than `limit`: then the
/// call goes on in its thread. A store on a machine that is cut off returns from no call at all.
template <class Call>
auto within(std::chrono::milliseconds limit, Call call) {
  std::packaged_task<decltype(call())()> task(std::move(call));
  auto future = task.get_future();
  std::thread thread(std::move(task));
  if (future.wait_for(limit) != std::future_status::ready) {
    thread.detach();
    throw std::runtime_error("no answer within " + std::to_string(limit.count()) + " ms");
  }
  // What the call holds is freed in its thread, which must not go on while the process exits.
  thread.join();
  return future.get();
}

}  // namespace gateloop::distributed
