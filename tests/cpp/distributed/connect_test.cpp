// Processes that fail between the meeting and the connection; threads stand for them.
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <future>
#include <stdexcept>
#include <string>
#include <vector>

#include "distributed/connection.h"
#include "distributed/rendezvous.h"

namespace gateloop::distributed {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;

int free_port() {
  const int probe = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const plain = reinterpret_cast<sockaddr*>(&address);
  const bool found = ::bind(probe, plain, size) == 0 && ::getsockname(probe, plain, &size) == 0;
  ::close(probe);
  return found ? ntohs(address.sin_port) : 0;
}

class Connect : public testing::Test {
 protected:
  ~Connect() override { std::signal(SIGTERM, SIG_DFL); }

  Launch launch(int rank, int size) const {
    Launch launch;
    launch.rank = launch.local_rank = rank;
    launch.size = launch.local_size = size;
    launch.address = "127.0.0.1";
    launch.port = port_;
    return launch;
  }

  /// The error of a process that joins, or nothing. `make`: in place of gloo's.
  std::future<std::string> error_of(int rank, int size, const JoinOptions& options,
                                    const MakeBackend& make = {}) const {
    return std::async(std::launch::async, [own = launch(rank, size), options, make] {
      try {
        const auto gloo = make ? make : prepare_gloo(own, options.timeout);
        const Communicator all =
            connect(own, options, {open_store(own, options.timeout), gloo, {}});
        all.gather({0});  // process 0, which keeps the store, stays until the others have joined
        return std::string();
      } catch (const std::exception& error) {
        return first_line(error);
      }
    });
  }

 private:
  int port_ = free_port();
};

class ConnectAbsent : public Connect, public testing::WithParamInterface<int> {};

TEST_P(ConnectAbsent, ItsErrorEndsAll) {
  const std::string lack =
      "[/third_party/gloo/transport/tcp/pair.cc:1] socket: Too many open files";
  const int absent = GetParam();
  const auto began = steady_clock::now();
  JoinOptions options;
  options.timeout = seconds(30);
  std::vector<std::future<std::string>> errors;
  for (int rank = 0; rank < 3; ++rank) {
    const MakeBackend fails = [&](const auto&) -> Backend { throw std::runtime_error(lack); };
    errors.push_back(error_of(rank, 3, options, rank == absent ? fails : MakeBackend()));
  }
  const std::string told = "process " + std::to_string(absent) + " of 3 ended: " + lack;
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(errors[rank].get(), rank == absent ? lack : told);
  EXPECT_LT(steady_clock::now() - began, seconds(15));
}

INSTANTIATE_TEST_SUITE_P(Ranks, ConnectAbsent, testing::Values(0, 1));

TEST_F(Connect, OneThatMetTheOthersAndDiedIsNamed) {
  JoinOptions options;
  options.timeout = seconds(1);
  const auto began = steady_clock::now();
  std::future<std::string> first = error_of(0, 3, options);
  std::future<std::string> third = error_of(2, 3, options);
  own_keys(open_store(launch(1, 3), options.timeout), launch(1, 3), options);
  const std::string told =
      "process 1 of 3 did not answer within the time-out: it is busy, stopped, dead or cut off: "
      "Timed out connecting";
  EXPECT_EQ(first.get(), told);
  EXPECT_EQ(third.get(), told);
  EXPECT_LT(steady_clock::now() - began, seconds(20));
}

TEST_F(Connect, ThoseThatLiveUnconnectedAreNamed) {
  JoinOptions options;
  options.timeout = seconds(1);
  std::promise<void> end;
  const std::shared_future<void> ended = end.get_future().share();
  const MakeBackend waits = [ended](const auto&) -> Backend {
    ended.wait();
    throw std::runtime_error("too late");
  };
  std::future<std::string> first = error_of(0, 2, options);
  std::future<std::string> second = error_of(1, 2, options, waits);
  const std::string told = "process 0, 1 of 2 did not connect to all: Timed out connecting";
  EXPECT_EQ(first.get(), told);
  EXPECT_EQ(second.get(), told);
  end.set_value();
}

TEST_F(Connect, AllAreConnected) {
  const JoinOptions options;
  std::future<std::string> first = error_of(0, 2, options);
  EXPECT_EQ(error_of(1, 2, options).get(), "");
  EXPECT_EQ(first.get(), "");
}

}  // namespace
}  // namespace gateloop::distributed
