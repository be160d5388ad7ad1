#pragma once

/// The processes that train one model together, on torch's c10d: gloo between CPUs, NCCL between
/// GPUs. A launcher starts them (torchrun, SLURM's srun) and says in the environment which is
/// which.
#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/launch.h"

namespace gateloop::distributed {

struct Prepared;  // of src/distributed

struct JoinOptions {
  /// By which tensors on CUDA devices travel: gloo, nccl, or auto: nccl where this build and this
  /// machine have it, else gloo. CPU tensors always travel by gloo.
  std::string backend = "auto";
  /// How long a process waits for another, before it ends with an error: longer than process 0
  /// takes to validate, sample and save.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
  /// Called on process 0, once, where others are missing after 10 s; and where this process ends,
  /// if it takes longer than 1 s to say why to others.
  std::function<void(const std::string& text)> on_wait = {};
};

/// A process's connection to the others. Copies are the same connection. All processes make the
/// same calls in the same order; one process alone has its values back at once.
class Communicator {
 public:
  /// Of one process.
  Communicator() = default;
  /// Connects all processes. Throws std::invalid_argument for a backend that is not there. Throws
  /// std::runtime_error naming those that do not come or connect within the time-out. Where a
  /// process ended before it joined (report_absence()) or could not connect, the message names it
  /// and its error. Where it throws, SIGTERM is ignored from then on, as after report_failures().
  static Communicator join(const Launch& launch, const JoinOptions& options = {});

  int rank() const;
  int size() const;
  /// Among the processes on this machine.
  int local_rank() const;
  int local_size() const;
  /// How long a process waits for another; 0 of one process.
  std::chrono::milliseconds timeout() const;
  /// Whether this is process 0, which decides, writes and prints.
  bool is_main() const { return rank() == 0; }

  /// Of (0 .. count - 1) this process's part: [first, last). Parts differ by one at most.
  std::pair<std::int64_t, std::int64_t> part_of(std::int64_t count) const;

  /// Element r is what process r gave: n numbers each.
  std::vector<std::vector<double>> gather(const std::vector<double>& numbers) const;
  /// The number that process 0 gave.
  double from_main(double number) const;
  /// What `decide` returns on process 0, where alone it is called. Where it throws, it throws there
  /// what it threw and elsewhere std::runtime_error with the same words.
  std::string from_main(const std::function<std::string()>& decide) const;
  /// `tensors` become those of process `root`. The same shapes and dtypes on every process.
  void broadcast(const std::vector<torch::Tensor>& tensors, int root = 0) const;
  /// `tensor` of process `from` is copied to that of process 0.
  void send_to_main(const torch::Tensor& tensor, int from) const;

  /// Of these processes' group, as gateloop/distributed_ops.h takes it; empty of one process.
  std::string time_group() const;

  /// A note that outlives these processes where their launcher keeps the store (torchrun): those
  /// that it starts in their place read it. Empty where there is none.
  void leave_note(const std::string& name, const std::string& text) const;
  std::string note(const std::string& name) const;

  /// Calls `work`. Where it throws, the other processes are told the error; where a connection is
  /// lost, std::runtime_error names the process that ended first. After that the group is closed,
  /// and SIGTERM is ignored: launchers send it before this process has printed the error.
  void report_failures(const std::function<void()>& work) const;

 private:
  friend Communicator connect(const Launch& launch, const JoinOptions& options,
                              const Prepared& prepared);
  friend class GradientReduction;
  friend class FailureReport;
  struct Connection;  // of src/distributed
  std::shared_ptr<Connection> connection_;
};

/// In place of Communicator::join, where this process ends by `error`: the join of the others
/// throws an error that names this process and `error`. Returns once they have it, at the latest
/// after 15 s, and throws nothing: where they cannot be reached, they wait until their time-out.
/// SIGTERM is ignored from then on, as after Communicator::report_failures(). `on_wait`: called
/// once, where this takes longer than 1 s.
void report_absence(const Launch& launch, const std::string& error,
                    const std::function<void(const std::string& text)>& on_wait = {});

}  // namespace gateloop::distributed
