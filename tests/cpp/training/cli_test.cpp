// `gateloop train` as a user meets it: exit codes, one-line messages, signals, kills, a full disk.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include "small_run.h"
#include "temporary_directory.h"

namespace gateloop {
namespace {

using test::losses_of;
using test::read_bytes;
using test::TemporaryDirectory;

using Arguments = std::vector<std::string>;

class CommandTest : public ::testing::Test {
 protected:
  CommandTest() { test::write_bytes(dir_ / "text", test::small_text(20'000)); }

  struct Outcome {
    int code = 0;  // exit code, or 1000 + the signal that killed it
    std::string out, err;
  };

  /// Starts `gateloop` in the directory; its output goes to files there.
  pid_t start(const Arguments& arguments, rlim_t largest_file = RLIM_INFINITY) {
    const pid_t child = ::fork();
    if (child != 0) return child;
    if (::chdir(dir_.path().c_str()) != 0) ::_exit(126);
    ::dup2(::open("out", O_WRONLY | O_CREAT | O_TRUNC, 0666), STDOUT_FILENO);
    ::dup2(::open("err", O_WRONLY | O_CREAT | O_TRUNC, 0666), STDERR_FILENO);
    if (largest_file != RLIM_INFINITY) {
      const rlimit limit{largest_file, largest_file};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    std::vector<char*> argv = {const_cast<char*>(GATELOOP_BINARY)};
    for (const std::string& argument : arguments) {
      argv.push_back(const_cast<char*>(argument.c_str()));
    }
    argv.push_back(nullptr);
    ::execv(GATELOOP_BINARY, argv.data());
    ::_exit(127);
  }

  Outcome finish(pid_t child) {
    int status = 0;
    ::waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status),
            read_bytes(dir_ / "out"), read_bytes(dir_ / "err")};
  }

  Outcome run(const Arguments& arguments) { return finish(start(arguments)); }

  /// A run of a tiny model without decay, whose losses do not depend on the number of steps.
  static Arguments train(const Arguments& more) {
    Arguments arguments = {"train",  "--preset",
                           "enwik8", "--data",
                           "text",   "--out",
                           "run",    "--dim",
                           "16",     "--depth",
                           "1",      "--gate-loop-heads",
                           "16",     "--length",
                           "16",     "--batch",
                           "2",      "--accumulation",
                           "1",      "--threads",
                           "1",      "--learning-rate",
                           "0.01",   "--validate-every",
                           "10",     "--validation-windows",
                           "4",      "--sample-every",
                           "0",      "--sample-length",
                           "8",      "--sample-prime",
                           "8"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  /// Returns when `metrics.jsonl` holds this many lines, or the child has ended.
  void wait_for_lines(pid_t child, std::ptrdiff_t lines) {
    const auto enough = [&] {
      const std::string text = read_bytes(dir_ / "run" / "metrics.jsonl");
      return std::count(text.begin(), text.end(), '\n') >= lines;
    };
    while (!enough()) {
      siginfo_t ended{};
      ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOHANG | WNOWAIT);
      ASSERT_EQ(ended.si_pid, 0) << "it ended early: " << read_bytes(dir_ / "err");
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }

  TemporaryDirectory dir_;
};

TEST_F(CommandTest, UsageErrorsExitWithTwoAndOneLine) {
  test::write_bytes(dir_ / "short", "a few bytes");
  const std::pair<Arguments, const char*> cases[] = {
      {{}, "no command: there are train, evaluate, generate, info"},
      {{"trian"}, "no command \"trian\""},
      {{"train", "--prest", "quick"}, "--prest"},
      {{"train", "--preset", "quik"}, "quik"},
      {{"train", "--data", "nowhere"}, "nowhere"},
      {{"train"}, "make corpus"},
      {{"train", "--data", "text", "--steps", "0"}, "--steps"},
      {{"train", "--data", "text", "--steps", "many"}, "--steps"},
      {{"train", "--data", "text", "--steps", "3", "--minutes", "1"}, "--minutes"},
      {{"train", "--data", "text", "--split", "1,2"}, "--split"},
      {{"train", "--data", "text", "--split", "20000,1,0"}, "larger than the file"},
      {{"train", "--data", "text", "--dtype", "int8"}, "dtype must be one of"},
      {{"train", "--data", "text", "--batch", "0"}, "batch must be 1 or more"},
      {{"train", "--data", "text", "--gate", "polar", "--normalize-input"}, "sigmoid gate"},
      {{"train", "--data", "text", "--dim", "100", "--gate-loop-heads", "3"}, "heads"},
      {{"train", "--data", "short"}, "a window needs 257"},
      {{"train", "--data", "text", "--length", "1000"}, "a window needs 1001"},
      {{"train", "--data", "text", "--resume"}, "no run to resume"},
      {{"train", "--data", "text", "--resume", "--overwrite"}, "--overwrite"},
  };
  for (const auto& [arguments, expected] : cases) {
    const Outcome outcome = run(arguments);
    std::string shown;
    for (const std::string& argument : arguments) shown += argument + " ";
    EXPECT_EQ(outcome.code, 2) << shown << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << shown << outcome.err;
    EXPECT_NE(outcome.err.find(expected), std::string::npos) << shown << outcome.err;
    EXPECT_FALSE(std::filesystem::exists(dir_ / "runs")) << shown;
  }
}

TEST_F(CommandTest, HelpNamesEveryFlagAndDefault) {
  const Outcome outcome = run({"train", "--help"});
  EXPECT_EQ(outcome.code, 0);
  for (const char* expected : {"--preset", "--data", "--split", "--resume", "--minutes", "--clip",
                               "--transition-bias", "[quick 128, enwik8 512]"}) {
    EXPECT_NE(outcome.out.find(expected), std::string::npos) << expected;
  }
}

TEST_F(CommandTest, TrainsAndSaysHowToGoOn) {
  const Outcome outcome = run(train({"--steps", "12"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  for (const char* expected :
       {"Corpus text: 20,000 bytes (18,000 train, 1,000 valid, 1,000 test)", "bits per byte over",
        "run/model.safetensors", "generate --checkpoint run", "sample at step 12"}) {
    EXPECT_NE(outcome.out.find(expected), std::string::npos) << expected << "\n" << outcome.out;
  }
  EXPECT_EQ(losses_of(dir_ / "run").size(), 12U);

  const Outcome again = run(train({"--steps", "12"}));
  EXPECT_EQ(again.code, 2);
  EXPECT_NE(again.err.find("--resume"), std::string::npos) << again.err;
  EXPECT_EQ(run(train({"--steps", "12", "--overwrite"})).code, 0);
  EXPECT_EQ(run({"train", "--out", "run", "--resume"}).code, 0);  // complete: says so again
  EXPECT_EQ(run({"train", "--out", "run", "--resume", "--steps", "15"}).code, 0);
  EXPECT_EQ(losses_of(dir_ / "run").size(), 15U);

  const Outcome other = run({"train", "--out", "run", "--resume", "--dim", "32", "--seed", "5"});
  EXPECT_EQ(other.code, 2);
  EXPECT_NE(other.err.find("another dim, seed"), std::string::npos) << other.err;
}

TEST_F(CommandTest, KilledAndTerminatedRunsContinueBitForBit) {
  const pid_t killed = start(train({"--steps", "1000000", "--checkpoint-every", "7"}));
  wait_for_lines(killed, 20);
  ::kill(killed, SIGKILL);
  EXPECT_EQ(finish(killed).code, 1000 + SIGKILL);
  const auto at_kill = std::ssize(losses_of(dir_ / "run"));

  const pid_t terminated = start({"train", "--out", "run", "--resume"});
  wait_for_lines(terminated, at_kill + 20);
  ::kill(terminated, SIGTERM);
  const Outcome stopped = finish(terminated);
  EXPECT_EQ(stopped.code, 128 + SIGTERM) << stopped.err;
  EXPECT_NE(stopped.out.find("--out run --resume"), std::string::npos) << stopped.out;
  const auto resumed = losses_of(dir_ / "run");
  ASSERT_GE(std::ssize(resumed), at_kill + 20);

  // The last step of a run is validated too; there the stopped run was not.
  std::filesystem::rename(dir_ / "run", dir_ / "resumed");
  ASSERT_EQ(run(train({"--steps", std::to_string(resumed.size() + 1)})).code, 0);
  auto unbroken = losses_of(dir_ / "run");
  unbroken.pop_back();
  EXPECT_EQ(resumed, unbroken);
}

TEST_F(CommandTest, AFullDiskIsOneLineAndKeepsTheCheckpoint) {
  ASSERT_EQ(run(train({"--steps", "8"})).code, 0);
  const std::filesystem::path state = dir_ / "run" / "training_state.safetensors";
  const std::string before = read_bytes(state);
  ASSERT_GT(before.size(), 30'000U);
  // Room for the log and the configuration, not for a checkpoint.
  const Outcome outcome =
      finish(start({"train", "--out", "run", "--resume", "--steps", "9"}, 30'000));
  EXPECT_EQ(outcome.code, 1);
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_NE(outcome.err.find("safetensors: cannot write"), std::string::npos) << outcome.err;
  EXPECT_EQ(read_bytes(state), before);
  for (const auto& entry : std::filesystem::directory_iterator(dir_ / "run")) {
    EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
  }
}

TEST_F(CommandTest, AnUnreadableCheckpointIsOneLine) {
  ASSERT_EQ(run(train({"--steps", "4"})).code, 0);
  test::write_bytes(dir_ / "run" / "training_state.safetensors", "not a checkpoint");
  const Outcome outcome = run({"train", "--out", "run", "--resume", "--steps", "9"});
  EXPECT_EQ(outcome.code, 1);
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_NE(outcome.err.find("training_state.safetensors"), std::string::npos) << outcome.err;
  EXPECT_EQ(read_bytes(dir_ / "run" / "training_state.safetensors"), "not a checkpoint");
}

}  // namespace
}  // namespace gateloop
