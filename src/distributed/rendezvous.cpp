#include "distributed/rendezvous.h"

#include <c10/util/Logging.h>

#include <csignal>
#include <random>
#include <set>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "distributed/connection.h"

namespace gateloop::distributed {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using Store = c10::intrusive_ptr<c10d::Store>;
using OnWait = std::function<void(const std::string& text)>;

constexpr milliseconds kStorePoll(10);
constexpr std::chrono::seconds kSilence(10);
/// For how long a process that ends is there for others, which start up to this much later.
constexpr std::chrono::seconds kReportTimeout(15);
constexpr const char* kUpTo = ", for up to 15 s";
/// What listens at the store's port may be another program, which never answers; the store's own
/// time-out comes this much earlier where it is none.
constexpr std::chrono::seconds kLater(5);

std::string random_name() {
  std::random_device device;
  return std::to_string((std::uint64_t{device()} << 32) | device());
}

// Keys: a process shows a token, is given the life's name for it, and answers under that name: with
// nothing, or with the error by which it ends. Process 0's verdict follows: nothing, or why none
// may begin, which each acknowledges. It is over when all have, or do not come in time.
std::string token_key(int rank) { return "gateloop/token/" + std::to_string(rank); }
std::string life_key(int rank, const std::string& token) {
  return "gateloop/life/" + std::to_string(rank) + "/" + token;
}
std::string answer_key(int rank, const std::string& life) {
  return "gateloop/joined/" + life + "/" + std::to_string(rank);
}
std::string verdict_key(const std::string& life) { return "gateloop/verdict/" + life; }
std::string read_key(int rank, const std::string& life) {
  return "gateloop/read/" + life + "/" + std::to_string(rank);
}

std::string over_key(const std::string& life) { return "gateloop/over/" + life; }

std::string listed(const std::set<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

std::string named(const std::string& ranks, const Launch& launch) {
  return "process " + ranks + " of " + std::to_string(launch.size);
}

std::string absence(int rank, const Launch& launch, const std::string& error) {
  return named(std::to_string(rank), launch) + " ended before it joined: " + error;
}

/// A launcher that sees one process end sends SIGTERM to the others, which have yet to print why.
void outlive_launcher() { std::signal(SIGTERM, SIG_IGN); }

/// libtorch writes a page about each connection that fails, which would bury this process's error.
class QuietLibtorch {
 public:
  QuietLibtorch() { FLAGS_caffe2_log_level = 3; }  // fatal errors alone
  ~QuietLibtorch() { FLAGS_caffe2_log_level = before_; }
  QuietLibtorch(const QuietLibtorch&) = delete;
  QuietLibtorch& operator=(const QuietLibtorch&) = delete;

 private:
  int before_ = FLAGS_caffe2_log_level;
};

/// Process 0's list of the others.
class RollCall {
 public:
  RollCall(Store store, const Launch& launch) : store_(std::move(store)), launch_(launch) {
    for (int rank = 1; rank < launch.size; ++rank) absent_.insert(rank);
  }

  const std::string& life() const { return life_; }
  /// Those that have not answered.
  const std::set<int>& absent() const { return absent_; }

  /// Gives the life's name to processes that have come. Returns why one of them ended, or nothing.
  std::string call() {
    std::string failure;
    for (auto rank = absent_.begin(); rank != absent_.end();) {
      if (store_->check({token_key(*rank)})) {
        store_->set(life_key(*rank, store_->get_to_str(token_key(*rank))), life_);
      }
      if (!store_->check({answer_key(*rank, life_)})) {
        ++rank;
        continue;
      }
      const std::string error = store_->get_to_str(answer_key(*rank, life_));
      if (!error.empty() && failure.empty()) failure = absence(*rank, launch_, error);
      rank = absent_.erase(rank);
    }
    return failure;
  }

  void begin() const { store_->set(verdict_key(life_), std::string()); }

  /// Says to all why none may begin: to those of `late` too, if they come by `deadline`. Throws
  /// where the store is gone.
  void dismiss(const std::string& why, const std::set<int>& late, steady_clock::time_point deadline,
               const OnWait& on_wait) {
    outlive_launcher();
    store_->set(verdict_key(life_), why);
    std::set<int> unread = late;
    for (int rank = 1; rank < launch_.size; ++rank) {
      if (!absent_.contains(rank)) unread.insert(rank);
    }
    const auto notice = steady_clock::now() + kNotice;
    bool said = !on_wait;
    while (!unread.empty() && steady_clock::now() < deadline) {
      call();
      std::erase_if(unread, [&](int rank) { return store_->check({read_key(rank, life_)}); });
      if (!said && !unread.empty() && steady_clock::now() > notice) {
        on_wait(why + "; telling " + named(listed(unread), launch_) + kUpTo);
        said = true;
      }
      std::this_thread::sleep_for(kStorePoll);
    }
    store_->set(over_key(life_), std::string());
  }

 private:
  Store store_;
  Launch launch_;
  std::string life_ = random_name();
  std::set<int> absent_;
};

void dismiss(RollCall& roll, const std::string& why, const std::set<int>& late,
             const OnWait& on_wait) {
  try {
    roll.dismiss(why, late, steady_clock::now() + kReportTimeout, on_wait);
  } catch (const std::exception&) {  // a launcher's store that is gone; the reason stands
  }
}

/// On process 0.
std::string gather_life(const Store& store, const Launch& launch, const JoinOptions& options) {
  RollCall roll(store, launch);
  const auto began = steady_clock::now();
  bool said = false;
  while (true) {
    const std::string failure = roll.call();
    if (!failure.empty()) {
      dismiss(roll, failure, roll.absent(), options.on_wait);
      throw LostProcess(failure);
    }
    if (roll.absent().empty()) break;
    const auto waited = steady_clock::now() - began;
    const std::string absent = named(listed(roll.absent()), launch);
    if (waited > options.timeout) {
      const std::string error = absent + " did not come within the time-out";
      dismiss(roll, error, {}, options.on_wait);
      throw std::runtime_error(error);
    }
    if (!said && waited > kSilence && options.on_wait) {
      options.on_wait("waiting for " + absent);
      said = true;
    }
    std::this_thread::sleep_for(kStorePoll);
  }
  roll.begin();
  return roll.life();
}

/// What process 0 sets under `key`. Throws `failure` where that is not there by `deadline`.
std::string await(const Store& store, const std::string& key, steady_clock::time_point deadline,
                  const std::string& failure) {
  while (!store->check({key})) {
    if (steady_clock::now() > deadline) throw std::runtime_error(failure);
    std::this_thread::sleep_for(kStorePoll);
  }
  return store->get_to_str(key);
}

struct Meeting {
  std::string life;
  std::string verdict;  // why none may begin
};

/// On the others. `come`: by when process 0 must have come; `end`: by when it must have said
/// whether all begin. `error`: by which this process ends, or nothing.
Meeting meet(const Store& store, const Launch& launch, steady_clock::time_point come,
             steady_clock::time_point end, const std::string& error) {
  const std::string token = random_name();
  store->set(token_key(launch.rank), token);
  const std::string life = await(store, life_key(launch.rank, token), come,
                                 "process 0 did not come within the time-out");
  store->set(answer_key(launch.rank, life), error);
  const std::string verdict =
      await(store, verdict_key(life), end,
            "process 0 came, and did not say within the time-out whether all others did");
  if (!verdict.empty()) {
    outlive_launcher();
    store->set(read_key(launch.rank, life), std::string());
  }
  // The launcher ends all as soon as one has ended: those that are late too.
  if (!error.empty()) await(store, over_key(life), end, "process 0 ended");
  return {life, verdict};
}

std::string request_life(const Store& store, const Launch& launch, const JoinOptions& options) {
  const auto come = steady_clock::now() + options.timeout;
  // Process 0 may begin to wait as late as that, and waits as long.
  const Meeting meeting = meet(store, launch, come, come + options.timeout + kLater, "");
  if (!meeting.verdict.empty()) throw LostProcess(meeting.verdict);
  return meeting.life;
}

}  // namespace

Store open_store(const Launch& launch, milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = launch.port;
  options.isServer = launch.rank == 0 && !launch.launcher_stores;
  options.numWorkers = static_cast<std::size_t>(launch.size);
  options.waitWorkers = false;  // own_keys() waits
  options.timeout = timeout;
  return within(timeout + kLater, [address = launch.address, options] {
    return Store(c10::make_intrusive<c10d::TCPStore>(address, options));
  });
}

Store own_keys(const Store& store, const Launch& launch, const JoinOptions& options) {
  const bool is_main = launch.rank == 0;
  const milliseconds longest =
      is_main ? options.timeout + kReportTimeout : 2 * options.timeout + kLater;
  const std::string life = within(longest + kLater, [=] {
    return is_main ? gather_life(store, launch, options) : request_life(store, launch, options);
  });
  return c10::make_intrusive<c10d::PrefixStore>("gateloop/" + life, store);
}

void report_absence(const Launch& launch, const std::string& error, const OnWait& on_wait) {
  report_absence(launch, error, on_wait, nullptr);
}

void report_absence(const Launch& launch, const std::string& error, const OnWait& on_wait,
                    const Store& opened) {
  if (launch.size == 1) return;
  outlive_launcher();
  const QuietLibtorch quiet;
  const auto deadline = steady_clock::now() + kReportTimeout;
  const auto report = [launch, error, deadline, opened] {
    const Store store = opened ? opened : open_store(launch, kReportTimeout);
    if (launch.rank == 0) {
      RollCall roll(store, launch);
      roll.dismiss(absence(0, launch, error), roll.absent(), deadline, nullptr);
    } else {
      meet(store, launch, deadline, deadline, error.empty() ? "no reason given" : error);
    }
  };
  std::function<void()> notice;
  if (on_wait) notice = [&] { on_wait(std::string("telling the other processes why") + kUpTo); };
  try {
    within(kReportTimeout, report, notice);
  } catch (const std::exception&) {  // none can be reached
  }
}

}  // namespace gateloop::distributed
