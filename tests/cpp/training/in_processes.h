#pragma once

/// Processes of one launch, threads here.
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "gateloop/distributed.h"

namespace gateloop::test {

inline std::uint16_t free_port() {
  const int probe = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ::bind(probe, reinterpret_cast<sockaddr*>(&address), size);
  ::getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(probe);
  return ntohs(address.sin_port);
}

/// work(communicator) in a thread for each process.
template <typename Work>
void in_processes(int size, const Work& work,
                  std::chrono::milliseconds timeout = std::chrono::minutes(10)) {
  const std::uint16_t port = free_port();
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        work(distributed::Communicator::join({.rank = rank,
                                              .size = size,
                                              .local_rank = rank,
                                              .local_size = size,
                                              .address = "127.0.0.1",
                                              .port = port},
                                             {.backend = "gloo", .timeout = timeout}));
      } catch (...) {
        errors[static_cast<std::size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace gateloop::test
