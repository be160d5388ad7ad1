// What is said where processes end early: which one was first, and why.
#include <c10/util/Exception.h>

#include <csignal>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "distributed/connection.h"

namespace gateloop::distributed {
namespace {

using std::chrono::steady_clock;

/// After a lost connection the others notice it within one step; most steps take less than this.
constexpr std::chrono::seconds kGrace(5);
constexpr std::chrono::milliseconds kPoll(50);

// Keys of the store, followed by a process's number.
constexpr const char* kEnded = "ended/";      // its own error
constexpr const char* kWaiting = "waiting/";  // it is alive and lost a connection: the symptom
constexpr const char* kGone = "gone/";        // it reads the store no more

/// An error that names already the process that ended.
struct LostProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// gloo's exceptions are plain std::runtime_error whose text begins with "[.../gloo/...:line] ".
bool is_lost_connection(const std::exception& error) {
  if (dynamic_cast<const c10::DistError*>(&error) != nullptr) return true;
  const std::string_view text = error.what();
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

  /// Leaves this process's own error for the others.
  void publish(const std::string& error) const {
    set(kEnded, error);
    close_connections();
    leave(/*all=*/true);
  }

  /// Which process ended first, as far as it can be told.
  std::string first_failure(const std::string& symptom) const {
    set(kWaiting, symptom);
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

  static std::string state_of(const std::string& symptom) {
    return is_timeout(symptom)
               ? " did not answer within the time-out: it is busy, stopped or cut off: "
               : " died, or its machine cannot be reached: ";
  }

 private:
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

void Communicator::report_failures(const std::function<void()>& work) const {
  if (!connection_) return work();
  constexpr auto kLimit = 3 * kGrace + std::chrono::seconds(1);
  try {
    work();
  } catch (const LostProcess&) {
    throw;
  } catch (const std::exception& error) {
    // A launcher that sees one process end sends it to the others, which have yet to print why.
    std::signal(SIGTERM, SIG_IGN);
    const FailureReport report(connection_);
    if (!is_lost_connection(error)) {
      try {
        within(kLimit, [report, why = first_line(error)] { report.publish(why); });
      } catch (const std::exception&) {  // the store is gone; this process's error stands
      }
      throw;
    }
    const std::string symptom = symptom_of(error);
    std::string text;
    try {
      text = within(kLimit, [report, symptom] { return report.first_failure(symptom); });
    } catch (const std::exception&) {
      const bool launcher = connection_->launch.launcher_stores;
      text = (launcher ? "the launcher" : "process 0, which keeps the store,") +
             FailureReport::state_of(symptom) + symptom;
    }
    throw LostProcess(text);
  }
}

}  // namespace gateloop::distributed
