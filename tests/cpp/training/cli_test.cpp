// `gateloop train` as a user meets it: exit codes, one-line messages, signals, kills, a full disk.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
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

  /// Starts `gateloop` in the directory; its output goes to files there. `prepare` runs in the new
  /// process before the program.
  pid_t start(
      const Arguments& arguments, const std::function<void()>& prepare = [] {}) {
    const pid_t child = ::fork();
    if (child != 0) return child;
    if (::chdir(dir_.path().c_str()) != 0) ::_exit(126);
    ::dup2(::open("out", O_WRONLY | O_CREAT | O_TRUNC, 0666), STDOUT_FILENO);
    ::dup2(::open("err", O_WRONLY | O_CREAT | O_TRUNC, 0666), STDERR_FILENO);
    // Whoever runs the tests may ignore some of them.
    for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
    prepare();
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
  static Arguments train(const Arguments& more, const std::string& data = "--data=text",
                         const std::string& out = "--out=run") {
    Arguments arguments = {"train",  data,
                           out,      "--preset",
                           "enwik8", "--dim",
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

  /// A run whose output is as `prepare` makes it is made to its end and saved.
  void expect_whole_run(const char* what, const std::function<void()>& prepare) {
    const Outcome outcome = finish(start(train({"--steps", "12", "--overwrite"}), prepare));
    EXPECT_EQ(outcome.code, 0) << what << ": " << outcome.err;
    EXPECT_EQ(losses_of(dir_ / "run").size(), 12U) << what;
    EXPECT_TRUE(std::filesystem::exists(dir_ / "run" / "model.safetensors")) << what;
    EXPECT_EQ(run({"info", "--checkpoint", "run"}).code, 0) << what;
  }

  /// The step of the last checkpoint, as `gateloop info` shows it.
  std::int64_t saved_step() {
    const std::string text = run({"info", "--checkpoint", "run"}).out;
    const std::size_t file = text.find("model.safetensors:");  // not that of the best weights
    return std::stoll(text.substr(text.find("step ", file) + 5));
  }

  TemporaryDirectory dir_;
};

TEST_F(CommandTest, UsageErrorsExitWithTwoAndOneLine) {
  test::write_bytes(dir_ / "short", "a few bytes");
  const std::pair<Arguments, const char*> cases[] = {
      {{}, "no command: there are train, evaluate, generate, info, quantize, watch"},
      {{"trian"}, "no command \"trian\""},
      {{"train", "--prest", "quick"}, "--prest"},
      {{"train", "--preset", "quik"}, "quik"},
      {{"train", "--data", "nowhere"}, "nowhere"},
      {{"train"}, "make corpus"},
      {{"train", "--data", "text", "--steps", "0"}, "--steps"},
      {{"train", "--data", "text", "--steps", "many"}, "--steps"},
      {{"train", "--data", "text", "--steps", "3", "--minutes", "1"}, "--minutes"},
      {{"train", "--data", "text", "--split", "1,2"}, "--split"},
      {{"train", "--data", "text", "--split", "20000,1,0"}, "larger than the text"},
      {{"train", "--data", "text", "--dtype", "int8"}, "dtype must be one of"},
      {{"train", "--data", "text", "--device", "tpu"}, "device must be cpu, cuda, cuda:N or auto"},
      {{"train", "--data", "text", "--device", "cuda:99"}, "device must be one that is there"},
      {{"train", "--data", "text", "--batch", "0"}, "batch must be 1 or more"},
      {{"train", "--data", "text", "--phase-bias", "0,1"}, "needs the magnitude_phase gate"},
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
                               "--transition-bias", "[quick 128, hybrid 128, enwik8 512]"}) {
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
  const auto lines = losses_of(dir_ / "run");
  ASSERT_EQ(lines.size(), 12U);
  const auto last = nlohmann::json::parse(lines.back());
  const auto prime = last.at("sample_prime").get<std::string>();
  EXPECT_EQ(prime.size(), 8U);
  EXPECT_NE(outcome.out.find("\n" + prime + "|"), std::string::npos) << prime << outcome.out;
  EXPECT_NE(last.at("sample"), "");

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

TEST_F(CommandTest, TrainsOnSeveralFilesAndFolders) {
  std::filesystem::create_directory(dir_ / "books");
  std::filesystem::copy_file(dir_ / "text", dir_ / "books" / "a");
  test::write_bytes(dir_ / "books" / "picture", std::string("a\0b", 3));
  test::write_bytes(dir_ / "[a, b]", test::small_text(4'000));
  const Outcome outcome = run(train({"--data", "text", "[a, b]", "--steps", "6"}, "--data=books"));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("Corpus books, text, [a, b]: 3 files, 44,000 bytes"),
            std::string::npos)
      << outcome.out;
  EXPECT_EQ(outcome.err, "gateloop: left out 1 file that is no text: books/picture\n");
  EXPECT_NE(outcome.out.find("evaluate --checkpoint run --data books text '[a, b]'"),
            std::string::npos)
      << outcome.out;
  EXPECT_EQ(run({"train", "--out", "run", "--resume", "--steps", "8"}).code, 0);
  EXPECT_EQ(losses_of(dir_ / "run").size(), 8U);

  // The order is part of the text.
  const Outcome turned =
      run({"train", "--out=run", "--resume", "--steps", "9", "--data", "[a, b]", "text", "books"});
  EXPECT_EQ(turned.code, 1);
  EXPECT_NE(turned.err.find("is not the corpus of this run, which was "), std::string::npos)
      << turned.err;
  std::filesystem::rename(dir_ / "text", dir_ / "moved");
  const Outcome gone = run({"train", "--out", "run", "--resume", "--steps", "9"});
  EXPECT_EQ(gone.code, 2);
  EXPECT_NE(gone.err.find("/text, is gone: say where it is with --data"), std::string::npos)
      << gone.err;
  const Outcome found =
      run({"train", "--out=run", "--resume", "--steps", "9", "--data", "books", "moved", "[a, b]"});
  EXPECT_EQ(found.code, 0) << found.err;

  const Outcome evaluated = run({"evaluate", "--checkpoint", "run", "--part", "valid", "--data",
                                 "books", "moved", "[a, b]", "--length", "16"});
  ASSERT_EQ(evaluated.code, 0) << evaluated.err;
  EXPECT_NE(evaluated.out.find("2199 bytes predicted"), std::string::npos) << evaluated.out;
}

TEST_F(CommandTest, ARunIsNotPartOfItsText) {
  std::filesystem::create_directory(dir_ / "books");
  std::filesystem::copy_file(dir_ / "text", dir_ / "books" / "a");
  for (const char* folder : {".", "books/.."}) {
    const Outcome outcome = run(train({"--steps", "3"}, std::string("--data=") + folder));
    EXPECT_EQ(outcome.code, 2);
    EXPECT_NE(outcome.err.find("lies in --data " + std::string(folder)), std::string::npos)
        << outcome.err;
  }
  EXPECT_EQ(run(train({"--steps", "3"}, "--data=books")).code, 0);
}

TEST_F(CommandTest, TrainsOnDocuments) {
  std::string lines;
  for (int i = 0; i < 500; ++i) {
    lines += "{\"text\": \"document " + std::to_string(i) + " of these\"}\n";
  }
  test::write_bytes(dir_ / "rows.jsonl", lines);
  const Arguments more = {"--field", "text", "--documents", "--diagnostics-every", "3"};
  Arguments whole = train(more, "--data=rows.jsonl");
  whole.insert(whole.end(), {"--steps", "9"});
  const Outcome outcome = run(whole);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("Corpus rows.jsonl: 500 documents, 10,891 bytes"), std::string::npos)
      << outcome.out;
  EXPECT_NE(outcome.out.find("--data rows.jsonl --field text --documents"), std::string::npos)
      << outcome.out;
  const auto losses = losses_of(dir_ / "run");

  Arguments part = train(more, "--data=rows.jsonl", "--out=part");
  part.insert(part.end(), {"--steps", "5"});
  ASSERT_EQ(run(part).code, 0);
  ASSERT_EQ(run({"train", "--out=part", "--resume", "--steps", "9"}).code, 0);
  EXPECT_EQ(losses_of(dir_ / "part").at(8), losses.at(8));
  // The same text without its documents is another run.
  Arguments plain = train({"--field", "text", "--steps", "9"}, "--data=rows.jsonl", "--out=plain");
  ASSERT_EQ(run(plain).code, 0);
  const Outcome other = run({"train", "--out=plain", "--resume", "--steps", "12", "--documents"});
  EXPECT_EQ(other.code, 2);
  EXPECT_NE(other.err.find("another documents"), std::string::npos) << other.err;
}

TEST_F(CommandTest, ARunGoesOnOnAnotherDeviceAndSaysSo) {
  ASSERT_EQ(run(train({"--steps", "6", "--device", "cpu"})).code, 0);
  std::string config = read_bytes(dir_ / "run" / "config.json");
  EXPECT_EQ(config.find("\"device\""), std::string::npos);
  const std::string steps = "\"steps\": 6";
  ASSERT_NE(config.find(steps), std::string::npos);
  config.replace(config.find(steps), steps.size(), steps + ", \"device\": \"cuda:99\"");
  test::write_bytes(dir_ / "run" / "config.json", config);

  const Outcome gone = run({"train", "--out", "run", "--resume"});
  EXPECT_EQ(gone.code, 2);
  EXPECT_NE(gone.err.find("got \"cuda:99\""), std::string::npos) << gone.err;
  const Outcome moved = run({"train", "--out", "run", "--resume", "--device", "cpu"});
  EXPECT_EQ(moved.code, 0) << moved.err;
  EXPECT_NE(moved.out.find("Going on on cpu, where the run was on cuda:99"), std::string::npos)
      << moved.out;
  const Outcome stayed = run({"train", "--out", "run", "--resume"});
  EXPECT_EQ(stayed.out.find("Going on on"), std::string::npos) << stayed.out;
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

TEST_F(CommandTest, EverySignalThatAsksToEndSaves) {
  for (const int signal : {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU}) {
    std::filesystem::remove_all(dir_ / "run");
    const pid_t child = start(train({"--steps", "1000000", "--checkpoint-every", "0"}));
    wait_for_lines(child, 3);
    // timeout(1) and shells signal twice: the process, then its group.
    ::kill(child, signal);
    ::kill(child, signal);
    const Outcome outcome = finish(child);
    EXPECT_EQ(outcome.code, 128 + signal) << outcome.err;
    EXPECT_NE(outcome.out.find("Stopped by SIG" + std::string(::sigabbrev_np(signal))),
              std::string::npos)
        << outcome.out;
    EXPECT_EQ(saved_step(), std::ssize(losses_of(dir_ / "run"))) << signal;
  }
}

TEST_F(CommandTest, ASignalIgnoredAtTheStartStaysIgnored) {
  const pid_t child = start(train({"--steps", "1000000"}), [] { ::signal(SIGHUP, SIG_IGN); });
  wait_for_lines(child, 3);
  ::kill(child, SIGHUP);
  wait_for_lines(child, std::ssize(losses_of(dir_ / "run")) + 20);
  ::kill(child, SIGTERM);
  EXPECT_EQ(finish(child).code, 128 + SIGTERM);
}

TEST_F(CommandTest, LostOutputDoesNotEndARun) {
  expect_whole_run("a reader that is gone", [] {
    int ends[2];
    if (::pipe(ends) != 0) ::_exit(126);
    ::close(ends[0]);
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(ends[1], STDERR_FILENO);
  });
  expect_whole_run("a full disk", [] {
    ::dup2(::open("/dev/full", O_WRONLY), STDOUT_FILENO);
    ::dup2(STDOUT_FILENO, STDERR_FILENO);
  });
  expect_whole_run("a terminal that is gone", [] {
    const int master = ::posix_openpt(O_RDWR | O_NOCTTY);
    if (::grantpt(master) != 0 || ::unlockpt(master) != 0) ::_exit(126);
    const int terminal = ::open(::ptsname(master), O_RDWR | O_NOCTTY);
    ::dup2(terminal, STDOUT_FILENO);
    ::dup2(terminal, STDERR_FILENO);
    ::close(terminal);
    ::close(master);
    if (::write(STDOUT_FILENO, "x", 1) != -1 || errno != EIO) ::_exit(126);
  });
}

TEST_F(CommandTest, ClosedDescriptorsDoNotReachTheFiles) {
  expect_whole_run("closed", [] {
    for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::close(fd);
  });
  const auto losses = losses_of(dir_ / "run");
  ASSERT_EQ(run(train({"--steps", "12", "--overwrite"})).code, 0);
  EXPECT_EQ(losses, losses_of(dir_ / "run"));
}

TEST_F(CommandTest, ATextThatShrinksDoesNotEndARun) {
  const pid_t child = start(train({"--steps", "1000000"}));
  wait_for_lines(child, 3);
  std::filesystem::resize_file(dir_ / "text", 0);
  wait_for_lines(child, std::ssize(losses_of(dir_ / "run")) + 20);
  ::kill(child, SIGTERM);
  EXPECT_EQ(finish(child).code, 128 + SIGTERM);
}

/// Any byte but zero and the slash may be in a file's name.
TEST_F(CommandTest, PrintedCommandsWorkAsTheyAre) {
  for (const std::string name :
       {"it's \"quoted\" $HOME `id` \\ *", "-dash", "line\nbreak", "not utf-8: \xFF\xFE%41"}) {
    std::filesystem::copy_file(dir_ / "text", dir_ / (name + "-text"));
    const pid_t child =
        start(train({"--steps", "1000000"}, "--data=" + name + "-text", "--out=" + name), [&] {
          std::filesystem::create_directory(name);
          std::filesystem::create_symlink(name, "run");
        });
    wait_for_lines(child, 3);
    ::kill(child, SIGTERM);
    const Outcome stopped = finish(child);
    ASSERT_EQ(stopped.code, 128 + SIGTERM) << name << stopped.err;
    const auto hint = [](const std::string& out) {
      const std::string before = "To go on:\n";
      return out.substr(out.rfind(before) + before.size());
    };
    std::string resume = hint(stopped.out);
    resume.pop_back();  // the newline
    const auto in_shell = [&](const std::string& commands) {
      test::write_bytes(dir_ / "commands", "set -e\n" + commands);
      const std::string shell = "cd " + dir_.path().string() + " && sh commands > out 2> err";
      return std::system(shell.c_str());
    };
    const auto done = std::to_string(losses_of(dir_ / "run").size());
    ASSERT_EQ(in_shell(resume + " --steps " + done), 0) << name << read_bytes(dir_ / "err");
    const std::string next = hint(read_bytes(dir_ / "out"));
    EXPECT_NE(next.find("evaluate"), std::string::npos) << next;
    EXPECT_EQ(in_shell(next), 0) << name << next << read_bytes(dir_ / "err");
    std::filesystem::remove(dir_ / "run");
  }
}

TEST_F(CommandTest, AGermanLocaleChangesNothing) {
  ASSERT_EQ(run(train({"--steps", "12"})).code, 0);
  std::filesystem::rename(dir_ / "run", dir_ / "plain");
  const std::string locales = (dir_ / "locales").string();
  std::filesystem::create_directory(locales);
  const std::string make = "localedef -i de_DE -f UTF-8 " + locales + "/de_DE.UTF-8 2> /dev/null";
  // Where the machine has no sources of locales, the program is given a name that it cannot load.
  (void)!std::system(make.c_str());
  const Outcome outcome = finish(start(train({"--steps", "12"}), [&] {
    ::setenv("LOCPATH", locales.c_str(), 1);
    ::setenv("LC_ALL", "de_DE.UTF-8", 1);
  }));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("20,000 bytes"), std::string::npos) << outcome.out;
  EXPECT_EQ(losses_of(dir_ / "run"), losses_of(dir_ / "plain"));
  EXPECT_EQ(read_bytes(dir_ / "run" / "model.safetensors"),
            read_bytes(dir_ / "plain" / "model.safetensors"));
}

TEST_F(CommandTest, AFullDiskIsOneLineAndKeepsTheCheckpoint) {
  ASSERT_EQ(run(train({"--steps", "8"})).code, 0);
  const std::filesystem::path state = dir_ / "run" / "training_state.safetensors";
  const std::string before = read_bytes(state);
  ASSERT_GT(before.size(), 30'000U);
  // Room for the log and the configuration, not for a checkpoint.
  const Outcome outcome = finish(start({"train", "--out", "run", "--resume", "--steps", "9"}, [] {
    const rlimit limit{30'000, 30'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }));
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
