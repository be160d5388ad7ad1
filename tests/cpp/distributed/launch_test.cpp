#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include "gateloop/distributed.h"

namespace gateloop::distributed {
namespace {

constexpr const char* kNames[] = {"RANK",
                                  "WORLD_SIZE",
                                  "LOCAL_RANK",
                                  "LOCAL_WORLD_SIZE",
                                  "MASTER_ADDR",
                                  "MASTER_PORT",
                                  "TORCHELASTIC_USE_AGENT_STORE",
                                  "SLURM_PROCID",
                                  "SLURM_STEP_NUM_TASKS",
                                  "SLURM_NTASKS",
                                  "SLURM_LOCALID",
                                  "SLURM_STEP_TASKS_PER_NODE",
                                  "SLURM_CPUS_PER_TASK",
                                  "SLURM_STEP_ID",
                                  "SLURM_STEP_NODELIST",
                                  "SLURM_JOB_ID"};

using Environment = std::map<std::string, std::string>;

Launch launch_in(const Environment& environment) {
  for (const char* name : kNames) ::unsetenv(name);
  for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
  const auto clear = [] {
    for (const char* name : kNames) ::unsetenv(name);
  };
  try {
    const Launch launch = launch_from_environment();
    clear();
    return launch;
  } catch (...) {
    clear();
    throw;
  }
}

TEST(Launch, OneProcessWithoutALauncher) {
  const Launch launch = launch_in({});
  EXPECT_EQ(launch.size, 1);
  EXPECT_EQ(launch.rank, 0);
  // A batch script of several tasks is itself one process; srun starts the others.
  EXPECT_EQ(launch_in({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}}).size, 1);
  // One process needs no address.
  EXPECT_EQ(launch_in({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).size, 1);
}

TEST(Launch, OfTorchrun) {
  const Launch launch = launch_in({{"RANK", "5"},
                                   {"WORLD_SIZE", "8"},
                                   {"LOCAL_RANK", "1"},
                                   {"LOCAL_WORLD_SIZE", "4"},
                                   {"MASTER_ADDR", "node-1"},
                                   {"MASTER_PORT", "29500"},
                                   {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                   {"SLURM_PROCID", "0"},
                                   {"SLURM_STEP_NUM_TASKS", "2"}});
  EXPECT_EQ(launch.rank, 5);
  EXPECT_EQ(launch.size, 8);
  EXPECT_EQ(launch.local_rank, 1);
  EXPECT_EQ(launch.local_size, 4);
  EXPECT_EQ(launch.address, "node-1");
  EXPECT_EQ(launch.port, 29500);
  EXPECT_TRUE(launch.launcher_stores);
}

Environment slurm(const std::string& hosts) {
  return {{"SLURM_PROCID", "3"},          {"SLURM_STEP_NUM_TASKS", "4"},
          {"SLURM_LOCALID", "1"},         {"SLURM_STEP_TASKS_PER_NODE", "2(x2)"},
          {"SLURM_STEP_NODELIST", hosts}, {"SLURM_JOB_ID", "1234567"}};
}

TEST(Launch, OfSlurm) {
  Launch launch = launch_in(slurm("gpu[01-03,07]"));
  EXPECT_EQ(launch.rank, 3);
  EXPECT_EQ(launch.size, 4);
  EXPECT_EQ(launch.local_rank, 1);
  EXPECT_EQ(launch.local_size, 2);
  EXPECT_EQ(launch.address, "gpu01");
  EXPECT_EQ(launch.port, 24567);
  EXPECT_FALSE(launch.launcher_stores);
  Environment second_step = slurm("gpu01");
  second_step["SLURM_STEP_ID"] = "1";
  EXPECT_NE(launch_in(second_step).port, launch.port);
  Environment with_address = slurm("gpu01");
  with_address["MASTER_ADDR"] = "other";
  with_address["MASTER_PORT"] = "1";
  launch = launch_in(with_address);
  EXPECT_EQ(launch.address, "other");
  EXPECT_EQ(launch.port, 1);
}

TEST(Launch, ProcessorsOfEachSlurmTask) {
  Environment environment = slurm("gpu01");
  EXPECT_EQ(launch_in(environment).cpus, 0);
  environment["SLURM_CPUS_PER_TASK"] = "4";
  EXPECT_EQ(launch_in(environment).cpus, 4);
  environment["SLURM_CPUS_PER_TASK"] = "0";
  EXPECT_THROW(launch_in(environment), std::invalid_argument);
  // torchrun in a batch script of one task: its processes share what that task has.
  EXPECT_EQ(launch_in({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"SLURM_CPUS_PER_TASK", "4"}}).cpus, 0);
}

TEST(Launch, FirstOfSlurmsHosts) {
  const std::map<std::string, std::string> first = {
      {"a", "a"},         {"a,b", "a"},   {"a1,b[2-3]", "a1"},
      {"n[2,4],m", "n2"}, {"n[2]", "n2"}, {"n[02-11]-ib.local,m", "n02-ib.local"}};
  for (const auto& [list, host] : first) EXPECT_EQ(launch_in(slurm(list)).address, host) << list;
  EXPECT_THROW(launch_in(slurm("n[")), std::invalid_argument);
}

TEST(Launch, NamesWhatIsMissingOrWrong) {
  const auto message = [](Environment environment) -> std::string {
    try {
      launch_in(environment);
      return "no error";
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  };
  Environment given = {{"RANK", "1"}, {"WORLD_SIZE", "2"}};
  EXPECT_EQ(message(given),
            "environment variable MASTER_ADDR: expected a value, as launchers of several processes "
            "set it, got \"\"");
  given["MASTER_ADDR"] = "a";
  given["MASTER_PORT"] = "70000";
  EXPECT_EQ(message(given),
            "environment variable MASTER_PORT: expected a number from 1 to 65535, got \"70000\"");
  given["MASTER_PORT"] = "80";
  EXPECT_EQ(message(given), "no error");
  given["RANK"] = "2";
  EXPECT_EQ(message(given), "environment variable RANK: expected a number from 0 to 1, got \"2\"");
  given["RANK"] = "-1";
  EXPECT_NE(message(given), "no error");
  given.erase("RANK");
  EXPECT_NE(message(given).find("RANK"), std::string::npos);
}

TEST(Communicator, OneProcessHasItsValuesBack) {
  const Communicator one;
  EXPECT_TRUE(one.is_main());
  EXPECT_EQ(one.size(), 1);
  EXPECT_EQ(one.part_of(7), (std::pair<std::int64_t, std::int64_t>{0, 7}));
  EXPECT_EQ(one.gather({1, 2}), (std::vector<std::vector<double>>{{1, 2}}));
  EXPECT_EQ(one.from_main(3), 3);
  EXPECT_EQ(one.from_main([] { return std::string("a"); }), "a");
  EXPECT_THROW(one.report_failures([] { throw std::invalid_argument("x"); }),
               std::invalid_argument);
  EXPECT_EQ(Communicator::join(Launch()).size(), 1);
  EXPECT_THROW(Communicator::join(Launch(), {.backend = "mpi"}), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::distributed
