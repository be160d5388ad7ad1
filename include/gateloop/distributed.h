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
#include <vector>

namespace gateloop::distributed {

/// What the launcher says of this process.
struct Launch {
  int rank = 0;
  int size = 1;        ///< processes in all
  int local_rank = 0;  ///< on this machine
  int local_size = 1;
  std::string address;           ///< where process 0, or the launcher, keeps the store
  std::uint16_t port = 0;        ///< of the store
  bool launcher_stores = false;  ///< torchrun's agent keeps the store, else process 0
  int restarts = 0;              ///< how often the launcher has begun these processes again
};

/// Of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
/// TORCHELASTIC_*), else of a SLURM step (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID,
/// SLURM_STEP_NODELIST, SLURM_JOB_ID, SLURM_RESTART_COUNT; MASTER_ADDR and MASTER_PORT overrule the
/// address), else one process. Throws std::invalid_argument naming a variable that is missing or
/// out of range.
Launch launch_from_environment();

struct JoinOptions {
  /// By which tensors on CUDA devices travel: gloo, nccl, or auto: nccl where this build and this
  /// machine have it, else gloo. CPU tensors always travel by gloo.
  std::string backend = "auto";
  /// How long a process waits for another, before it ends with an error.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
};

/// A process's connection to the others. Copies are the same connection. All processes make the
/// same calls in the same order; one process alone has its values back at once.
class Processes {
 public:
  /// One process.
  Processes() = default;
  /// Meets the others. Throws std::invalid_argument for a backend that is not there,
  /// std::runtime_error where the others do not come within the time-out.
  static Processes join(const Launch& launch, const JoinOptions& options = {});

  int rank() const;
  int size() const;
  /// Among the processes on this machine.
  int local_rank() const;
  int local_size() const;
  /// Whether this is process 0, which decides, writes and prints.
  bool is_main() const { return rank() == 0; }

  /// Of (0 .. count - 1) this process's part: [first, last). Parts differ by one at most.
  std::pair<std::int64_t, std::int64_t> part_of(std::int64_t count) const;

  /// Element r is what process r gave: n numbers each.
  std::vector<std::vector<double>> gather(const std::vector<double>& numbers) const;
  /// The number that process 0 gave.
  double of_main(double number) const;
  /// What `decide` returns on process 0, where alone it is called. Where it throws, it throws there
  /// what it threw and elsewhere std::runtime_error with the same words.
  std::string decided(const std::function<std::string()>& decide) const;
  /// `tensors` become those of process `root`. The same shapes and dtypes on every process.
  void broadcast(const std::vector<torch::Tensor>& tensors, int root = 0) const;
  /// `tensor` of process `from` is copied to that of process 0.
  void send_to_main(const torch::Tensor& tensor, int from) const;

  /// Calls `work`. Where it throws, the others learn why from process to process; where a
  /// connection is lost, std::runtime_error names the process that ended first.
  void watch(const std::function<void()>& work) const;

  struct Connection;                                                  ///< of src/distributed
  const Connection* connection() const { return connection_.get(); }  ///< null: one process

 private:
  std::shared_ptr<const Connection> connection_;
};

}  // namespace gateloop::distributed
