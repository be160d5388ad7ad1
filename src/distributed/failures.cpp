// What is said where processes end early: which one was first, and why.
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <vector>

#include "distributed/connection.h"

namespace gateloop::distributed {
namespace {

using std::chrono::steady_clock;

/// After a lost connection the others notice it within one step; most steps take less than this.
constexpr std::chrono::seconds kGrace(5);
constexpr std::chrono::milliseconds kPoll(50);
/// Of what takes a few ms where all is well.
constexpr std::chrono::milliseconds kConnectingPoll(10);

// Keys of the store, followed by a process's number.
constexpr const char* kEnded = "ended/";      // its own error
constexpr const char* kWaiting = "waiting/";  // it is alive and lost a connection: the symptom
constexpr const char* kGone = "gone/";        // it reads the store no more
constexpr const char* kConnected = "connected/";
// The first of kEnded and kWaiting, of any process.
constexpr const char* kEnding = "ending";

/// By which a process waits in vain for others to connect.
struct NotConnected : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Whether the error's text is of what this machine lacks, which gloo words as it does a lost
/// connection.
bool is_of_this_machine(std::string_view text) {
  constexpr std::array kErrors = {EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, EACCES, EPERM};
  return std::any_of(kErrors.begin(), kErrors.end(), [&](int number) {
    return text.find(std::generic_category().message(number)) != text.npos;
  });
}

/// gloo's exceptions are plain std::runtime_error whose text begins with "[.../gloo/...:line] ".
bool is_lost_connection(const std::exception& error) {
  if (dynamic_cast<const c10::DistError*>(&error) != nullptr) return true;
  if (dynamic_cast<const NotConnected*>(&error) != nullptr) return true;
  if (dynamic_cast<const NoAnswer*>(&error) != nullptr) return true;
  const std::string text = first_line(error);
  if (is_of_this_machine(text)) return false;
  return text.starts_with('[') && text.substr(0, text.find(']')).find("/gloo/") != text.npos;
}

/// "[/a/file.cc:537] Read error. Advice." -> "Read error".
std::string symptom_of(const std::exception& error) {
  std::string text = first_line(error);
  const std::size_t place = text.find("] ");
  if (text.starts_with('[') && place != std::string::npos) text.erase(0, place + 2);
  return text.substr(0, text.find(". "));
}

bool is_timeout(const std::string& symptom) { return symptom.starts_with("Timed out"); }

}  // namespace

/// By the store, which is there when connections between processes are not.
class FailureReport {
 public:
  explicit FailureReport(std::shared_ptr<Communicator::Connection> connection)
      : connection_(std::move(connection)) {}

  static void report(const std::shared_ptr<Communicator::Connection>& connection,
                     const std::exception& error);

  /// Leaves this process's own error for the others.
  void publish(const std::string& error) const {
    set(kEnded, error);
    connection_->store->set(kEnding, error);
    close_connections();
    leave(/*all=*/true);
  }

  /// Which process ended first, as far as it can be told.
  std::string first_failure(const std::string& symptom) const {
    set(kWaiting, symptom);
    connection_->store->set(kEnding, symptom);
    close_connections();
    const auto deadline = steady_clock::now() + kGrace;
    std::string silent;
    std::string text;
    while (true) {
      silent.clear();
      for (int r = 0; r < size() && text.empty(); ++r) {
        if (r == connection_->launch.rank) continue;
        if (has(kEnded, r)) text = named(std::to_string(r)) + " ended: " + get(kEnded, r);
        if (!has(kWaiting, r)) silent += (silent.empty() ? "" : ", ") + std::to_string(r);
      }
      if (!text.empty() || silent.empty() || steady_clock::now() > deadline) break;
      std::this_thread::sleep_for(kPoll);
    }
    if (text.empty()) {
      text =
          silent.empty() ? failure_of_living(symptom) : named(silent) + state_of(symptom) + symptom;
    }
    leave(/*all=*/false);
    return text;
  }

  /// Returns once all processes are connected, or one cannot be: then it throws.
  void watch(const std::shared_future<Backends>& own, steady_clock::time_point began) const {
    std::vector<std::string> all;
    all.reserve(static_cast<std::size_t>(size()));
    for (int r = 0; r < size(); ++r) all.push_back(kConnected + std::to_string(r));
    const auto deadline = began + connection_->timeout;
    bool connected = false;
    while (true) {
      if (connected) {
        std::this_thread::sleep_for(kConnectingPoll);
      } else if (own.wait_for(kConnectingPoll) == std::future_status::ready) {
        try {
          own.get();
        } catch (const std::exception& error) {
          if (is_lost_connection(error) && steady_clock::now() > deadline) throw timed_out();
          throw;
        }
        set(kConnected, "");
        connected = true;
      }
      if (connected && connection_->store->check(all)) return;
      if (connection_->store->check({kEnding})) {
        throw NotConnected(connection_->store->get_to_str(kEnding));
      }
      // gloo's own time-out comes first, but where it waits five times as long.
      if (steady_clock::now() > deadline + kGrace) throw timed_out();
    }
  }

  /// gloo reports a death at once. One that comes while a message to that process is sent, it
  /// reports at the time-out.
  static std::string state_of(const std::string& symptom) {
    return is_timeout(symptom)
               ? " did not answer within the time-out: it is busy, stopped, dead or cut off: "
               : " died, or its machine cannot be reached: ";
  }

 private:
  static NotConnected timed_out() { return NotConnected("Timed out connecting"); }

  /// So that a process that waits for this one notices, not the neighbours of the ended one alone.
  void close_connections() const {
    try {
      // Waits for the collectives under way: they end with the connections of the ended process.
      within(kGrace, [connection = connection_] { connection->group.reset(); });
    } catch (const std::exception&) {  // they are closed when this process ends
    }
  }

  /// Where all are alive, one was slower than another would wait.
  std::string failure_of_living(const std::string& symptom) const {
    std::string slow;
    std::string unconnected;
    for (int r = 0; r < size(); ++r) {
      if (!has(kConnected, r)) unconnected += (unconnected.empty() ? "" : ", ") + std::to_string(r);
    }
    if (!unconnected.empty()) return named(unconnected) + " did not connect to all: " + symptom;
    for (int r = 0; r < size(); ++r) {
      if (r == connection_->launch.rank) continue;
      const bool gave_up = is_timeout(get(kWaiting, r));
      if (gave_up && !is_timeout(symptom)) {
        return named(std::to_string(r)) + " ended: it waited longer than the time-out for this one";
      }
      if (!gave_up) slow += (slow.empty() ? "" : ", ") + std::to_string(r);
    }
    if (is_timeout(symptom) && !slow.empty()) return named(slow) + state_of(symptom) + symptom;
    return "a connection between processes was lost: " + symptom;
  }

  /// Process 0 keeps the store until the others have read it: all, or those that said they do.
  void leave(bool all) const {
    set(kGone, "");
    if (connection_->launch.rank != 0 || connection_->launch.launcher_stores) return;
    const auto deadline = steady_clock::now() + kGrace;
    for (int r = 1; r < size(); ++r) {
      while (!has(kGone, r) && (all || has(kWaiting, r)) && steady_clock::now() < deadline) {
        std::this_thread::sleep_for(kPoll);
      }
    }
  }

  int size() const { return connection_->launch.size; }
  std::string named(const std::string& rank) const {
    return "process " + rank + " of " + std::to_string(size());
  }
  void set(const char* key, const std::string& value) const {
    connection_->store->set(key + std::to_string(connection_->launch.rank), value);
  }
  bool has(const char* key, int rank) const {
    return connection_->store->check({key + std::to_string(rank)});
  }
  std::string get(const char* key, int rank) const {
    return connection_->store->get_to_str(key + std::to_string(rank));
  }

  std::shared_ptr<Communicator::Connection> connection_;
};

/// To be called where `error` ends this process: says so to the others, or throws LostProcess where
/// another ended first.
void FailureReport::report(const std::shared_ptr<Communicator::Connection>& connection,
                           const std::exception& error) {
  constexpr auto kLimit = 3 * kGrace + std::chrono::seconds(1);
  // A launcher that sees one process end sends it to the others, which have yet to print why.
  std::signal(SIGTERM, SIG_IGN);
  const FailureReport report(connection);
  if (!is_lost_connection(error)) {
    try {
      within(kLimit, [report, why = first_line(error)] { report.publish(why); });
    } catch (const std::exception&) {  // the store is gone; this process's error stands
    }
    return;
  }
  const std::string symptom = symptom_of(error);
  std::string text;
  try {
    text = within(kLimit, [report, symptom] { return report.first_failure(symptom); });
  } catch (const std::exception&) {
    const bool launcher = connection->launch.launcher_stores;
    text = (launcher ? "the launcher" : "process 0, which keeps the store,") + state_of(symptom) +
           symptom;
  }
  throw LostProcess(text);
}

Backends Communicator::Connection::connect(const std::shared_ptr<Connection>& connection,
                                           const Prepared& prepared) {
  const auto began = steady_clock::now();
  // Its own connection to the store: one that waits for a key answers nothing else meanwhile.
  std::packaged_task<Backends()> task([prepared, store = connection->store] {
    const auto own = store->clone();
    const auto prefixed = [&](const char* name) {
      return c10::make_intrusive<c10d::PrefixStore>(name, own);
    };
    Backends backends;
    backends.gloo = prepared.make_gloo(prefixed("gloo"));
    if (prepared.make_nccl) backends.nccl = prepared.make_nccl(prefixed("nccl"));
    return backends;
  });
  const std::shared_future<Backends> backends = task.get_future().share();
  std::thread thread(std::move(task));
  const auto release = [&] {
    // gloo's wait for the others cannot be ended: it holds what it needs.
    const bool ended = backends.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    ended ? thread.join() : thread.detach();
  };
  try {
    const FailureReport report(connection);
    within(connection->timeout + 2 * kGrace,
           [report, backends, began] { report.watch(backends, began); });
  } catch (const std::exception& error) {
    release();
    FailureReport::report(connection, error);
    throw;
  }
  release();
  return backends.get();
}

void Communicator::report_failures(const std::function<void()>& work) const {
  if (!connection_) return work();
  try {
    work();
  } catch (const LostProcess&) {
    throw;
  } catch (const std::exception& error) {
    FailureReport::report(connection_, error);
    throw;
  }
}

}  // namespace gateloop::distributed
