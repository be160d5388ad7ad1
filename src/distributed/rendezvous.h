#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "gateloop/distributed.h"

namespace gateloop::distributed {

/// The store that `launch` names; process 0 serves it where the launcher does not. Throws where it
/// cannot be reached within `timeout`.
c10::intrusive_ptr<c10d::Store> open_store(const Launch& launch, std::chrono::milliseconds timeout);

/// report_absence() of gateloop/distributed.h by a store that is open; null: opens it.
void report_absence(const Launch& launch, const std::string& error,
                    const std::function<void(const std::string& text)>& on_wait,
                    const c10::intrusive_ptr<c10d::Store>& opened);

/// The keys that these processes, in this life, have to themselves. A launcher's store holds those
/// of earlier lives too, and its count of restarts differs from machine to machine.
///
/// Process 0 draws a name for the life and hands it to each process that shows a fresh token; a
/// token left by an earlier life is never answered under that name. It then lets all begin, or says
/// to all why none may. Throws LostProcess naming a process that ended before it joined. Where some
/// did not come within the time-out, the error names those: a std::runtime_error on process 0,
/// LostProcess on the others. NoAnswer where the store's machine is cut off meanwhile: within the
/// time-out and 20 s on process 0, twice the time-out and 10 s on the others.
c10::intrusive_ptr<c10d::Store> own_keys(const c10::intrusive_ptr<c10d::Store>& store,
                                         const Launch& launch, const JoinOptions& options);

}  // namespace gateloop::distributed
