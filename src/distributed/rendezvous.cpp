#include "distributed/rendezvous.h"

#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

namespace gateloop::distributed {
namespace {

using std::chrono::steady_clock;
using Store = c10::intrusive_ptr<c10d::Store>;

constexpr std::chrono::milliseconds kStorePoll(10);
constexpr std::chrono::seconds kSilence(10);

std::string random_name() {
  std::random_device device;
  return std::to_string((std::uint64_t{device()} << 32) | device());
}

// Keys: a process shows a token, is given the life's name for it, and says that it has that.
std::string token_key(int rank) { return "gateloop/token/" + std::to_string(rank); }
std::string life_key(int rank, const std::string& token) {
  return "gateloop/life/" + std::to_string(rank) + "/" + token;
}
std::string joined_key(int rank, const std::string& life) {
  return "gateloop/joined/" + life + "/" + std::to_string(rank);
}

std::string listed(const std::set<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

/// On process 0.
std::string gather_life(const Store& store, const Launch& launch, const JoinOptions& options) {
  const std::string life = random_name();
  std::set<int> absent;
  for (int rank = 1; rank < launch.size; ++rank) absent.insert(rank);
  const auto began = steady_clock::now();
  bool said = false;
  while (!absent.empty()) {
    for (auto rank = absent.begin(); rank != absent.end();) {
      if (store->check({token_key(*rank)})) {
        store->set(life_key(*rank, store->get_to_str(token_key(*rank))), life);
      }
      rank = store->check({joined_key(*rank, life)}) ? absent.erase(rank) : std::next(rank);
    }
    const auto waited = steady_clock::now() - began;
    if (absent.empty()) break;
    if (waited > options.timeout) {
      throw std::runtime_error("process " + listed(absent) + " of " + std::to_string(launch.size) +
                               " did not come within the time-out");
    }
    if (!said && waited > kSilence && options.on_wait) {
      options.on_wait("waiting for process " + listed(absent) + " of " +
                      std::to_string(launch.size));
      said = true;
    }
    std::this_thread::sleep_for(kStorePoll);
  }
  return life;
}

/// On the others.
std::string ask_for_life(const Store& store, const Launch& launch, const JoinOptions& options) {
  const std::string token = random_name();
  store->set(token_key(launch.rank), token);
  const std::string key = life_key(launch.rank, token);
  const auto deadline = steady_clock::now() + options.timeout;
  while (!store->check({key})) {
    if (steady_clock::now() > deadline) {
      throw std::runtime_error("process 0 did not come within the time-out");
    }
    std::this_thread::sleep_for(kStorePoll);
  }
  const std::string life = store->get_to_str(key);
  store->set(joined_key(launch.rank, life), std::string());
  return life;
}

}  // namespace

Store own_keys(const Store& store, const Launch& launch, const JoinOptions& options) {
  const std::string life =
      launch.rank == 0 ? gather_life(store, launch, options) : ask_for_life(store, launch, options);
  return c10::make_intrusive<c10d::PrefixStore>("gateloop/" + life, store);
}

}  // namespace gateloop::distributed
