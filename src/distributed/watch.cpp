// What is said where processes end early: which one was first, and why.
#include <c10/util/Exception.h>

#include <future>
#include <stdexcept>
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
constexpr const char* kWaiting = "waiting/";  // it lost a connection, and is alive
constexpr const char* kGone = "gone/";        // it needs the store no more

/// An error that says already which process ended.
struct LostProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// "[/a/file.cc:537] Read error. Advice." -> "Read error".
std::string symptom_of(const std::exception& error) {
  std::string text = first_line(error);
  const std::size_t place = text.find("] ");
  if (text.starts_with('[') && place != std::string::npos) text.erase(0, place + 2);
  return text.substr(0, text.find(". "));
}

/// gloo's own exceptions are plain std::runtime_error, with the source file in their text.
bool is_lost_connection(const std::exception& error) {
  if (dynamic_cast<const c10::DistError*>(&error) != nullptr) return true;
  const std::string_view text = error.what();
  return text.find("gloo/") != std::string_view::npos ||
         text.find("NCCL") != std::string_view::npos;
}

class Inquest {
 public:
  explicit Inquest(std::shared_ptr<const Processes::Connection> connection)
      : connection_(std::move(connection)) {}

  /// Leaves this process's own error for the others.
  void record(const std::string& why) const {
    set(kEnded, why);
    leave();
  }

  /// Which process ended first, as far as it can be told.
  std::string verdict(const std::string& symptom) const {
    set(kWaiting, "");
    const auto deadline = steady_clock::now() + kGrace;
    std::string silent;
    do {
      silent.clear();
      for (int r = 0; r < size(); ++r) {
        if (r == connection_->launch.rank) continue;
        if (has(kEnded, r)) {
          const std::string why = connection_->store->get_to_str(kEnded + std::to_string(r));
          leave();
          return named(std::to_string(r)) + " ended: " + why;
        }
        if (!has(kWaiting, r)) silent += (silent.empty() ? "" : ", ") + std::to_string(r);
      }
      if (!silent.empty()) std::this_thread::sleep_for(kPoll);
    } while (!silent.empty() && steady_clock::now() < deadline);
    leave();
    if (silent.empty()) return "a connection between processes was lost: " + symptom;
    return named(silent) + " died, or its machine cannot be reached: " + symptom;
  }

 private:
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
  /// Process 0 keeps the store until the others have read why it, or another, ended.
  void leave() const {
    set(kGone, "");
    if (connection_->launch.rank != 0 || connection_->launch.launcher_stores) return;
    const auto deadline = steady_clock::now() + kGrace;
    for (int r = 1; r < size(); ++r) {
      while (is_reading(r) && steady_clock::now() < deadline) std::this_thread::sleep_for(kPoll);
    }
  }
  /// After verdict() those that are alive have said so; after record() they may come yet.
  bool is_reading(int rank) const {
    return !has(kGone, rank) && (has(kWaiting, rank) || has(kEnded, connection_->launch.rank));
  }

  std::shared_ptr<const Processes::Connection> connection_;
};

/// What `ask` returns; `otherwise` where the store does not answer.
std::string answer(const std::function<std::string()>& ask, const std::string& otherwise) {
  // In a thread: a store on a machine that is cut off answers no call at all.
  std::packaged_task<std::string()> task(ask);
  std::future<std::string> future = task.get_future();
  std::thread(std::move(task)).detach();
  if (future.wait_for(2 * kGrace + std::chrono::seconds(1)) != std::future_status::ready)
    return otherwise;
  try {
    return future.get();
  } catch (const std::exception&) {
    return otherwise;
  }
}

}  // namespace

void Processes::watch(const std::function<void()>& work) const {
  if (!connection_) return work();
  try {
    work();
  } catch (const LostProcess&) {
    throw;
  } catch (const std::exception& error) {
    const Inquest inquest(connection_);
    if (!is_lost_connection(error)) {
      const std::string why = first_line(error);
      answer([inquest, why] { return inquest.record(why), std::string(); }, "");
      throw;
    }
    const std::string symptom = symptom_of(error);
    const std::string keeper =
        connection_->launch.launcher_stores ? "the launcher" : "process 0, the store's keeper,";
    throw LostProcess(answer([inquest, symptom] { return inquest.verdict(symptom); },
                             keeper + " died, or its machine cannot be reached: " + symptom));
  }
}

}  // namespace gateloop::distributed
