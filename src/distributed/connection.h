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

using Backend = c10::intrusive_ptr<c10d::Backend>;
/// Connects all processes through the store.
using MakeBackend = std::function<Backend(const c10::intrusive_ptr<c10d::Store>& store)>;

/// What a process has before it meets the others.
struct Prepared {
  c10::intrusive_ptr<c10d::Store> store;  // of the launcher or of process 0
  MakeBackend make_gloo;
  MakeBackend make_nccl;  // empty: CUDA tensors travel by gloo
};

struct Backends {
  Backend gloo;
  Backend nccl;  // or null
};

/// An error that names already the process that ended, or did not come.
struct LostProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Communicator::Connection {
  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection();

  /// By which all processes are connected, within the time-out and some 5 s. Where one of them
  /// cannot connect, all throw within seconds: that one its error, the others LostProcess. Those
  /// that are not connected at the end of the time-out are named by a LostProcess. SIGTERM is
  /// ignored then, as after Communicator::report_failures().
  static Backends connect(const std::shared_ptr<Connection>& connection, const Prepared& prepared);

  Launch launch;
  std::chrono::milliseconds timeout = {};
  c10::intrusive_ptr<c10d::Store> launch_store;  // of the launcher or of process 0
  c10::intrusive_ptr<c10d::Store> store;         // the same, under keys of these processes' life
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::string group_name;  // in c10d's registry, which does not own the group
};

/// Meets the others and connects to them. Throws LostProcess, or this process's own error.
Communicator connect(const Launch& launch, const JoinOptions& options, const Prepared& prepared);

/// gloo on this machine's interfaces. Throws where GLOO_SOCKET_IFNAME names one that is not there,
/// std::invalid_argument in a build without gloo's headers.
MakeBackend prepare_gloo(const Launch& launch, std::chrono::milliseconds timeout);
/// Whether this build has NCCL.
bool has_nccl();
/// Throws std::invalid_argument in a build without it, or where libtorch finds no CUDA device.
MakeBackend prepare_nccl(const Launch& launch, std::chrono::milliseconds timeout);

/// Of the error's text: libtorch's goes on for a page.
std::string first_line(const std::exception& error);

/// A process that ends and waits longer than this says for what.
constexpr std::chrono::seconds kNotice(1);

struct NoAnswer : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What `call` returns. Throws NoAnswer where that takes longer than `limit`: then the
/// call goes on in its thread. A store on a machine that is cut off returns from no call at all.
/// `on_wait`: called once, where it takes longer than kNotice.
template <class Call>
auto within(std::chrono::milliseconds limit, Call call,
            const std::function<void()>& on_wait = nullptr) {
  std::packaged_task<decltype(call())()> task(std::move(call));
  auto future = task.get_future();
  std::thread thread(std::move(task));
  const auto deadline = std::chrono::steady_clock::now() + limit;
  if (on_wait && limit > kNotice && future.wait_for(kNotice) != std::future_status::ready) {
    on_wait();
  }
  if (future.wait_until(deadline) != std::future_status::ready) {
    thread.detach();
    throw NoAnswer("no answer within " + std::to_string(limit.count()) + " ms");
  }
  // What the call holds is freed in its thread, which must not go on while the process exits.
  thread.join();
  return future.get();
}

}  // namespace gateloop::distributed
