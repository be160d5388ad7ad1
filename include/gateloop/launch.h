#pragma once

/// Which process of several this one is, as its launcher (torchrun, SLURM's srun) says in the
/// environment.
#include <cstdint>
#include <string>

namespace gateloop::distributed {

/// This process's place, from its launcher.
struct Launch {
  int rank = 0;
  int size = 1;        ///< processes in all
  int local_rank = 0;  ///< on this machine
  int local_size = 1;
  int cpus = 0;                  ///< that the launcher gives each process; 0: it does not say
  std::string address;           ///< of the machine with the store, through which processes meet
  std::uint16_t port = 0;        ///< of the store
  bool launcher_stores = false;  ///< torchrun's agent keeps the store, else process 0
};

/// Of torchrun, else of a SLURM step, else one process. torchrun sets RANK, WORLD_SIZE, LOCAL_RANK,
/// LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE. SLURM sets
/// SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE,
/// SLURM_CPUS_PER_TASK, SLURM_STEP_NODELIST, SLURM_JOB_ID and SLURM_STEP_ID; MASTER_ADDR and
/// MASTER_PORT overrule its address. Throws std::invalid_argument naming a variable that is missing
/// or out of range.
Launch launch_from_environment();

}  // namespace gateloop::distributed
