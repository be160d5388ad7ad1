#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "gateloop/distributed.h"

namespace gateloop::distributed {

/// The keys that these processes, in this life, have to themselves. A launcher's store holds those
/// of earlier lives too, and its count of restarts differs from machine to machine.
///
/// Process 0 draws a name for the life and hands it to each process that shows a fresh token; a
/// token left by an earlier life is never acknowledged. Throws std::runtime_error naming the
/// processes that did not come within the time-out.
c10::intrusive_ptr<c10d::Store> own_keys(const c10::intrusive_ptr<c10d::Store>& store,
                                         const Launch& launch, const JoinOptions& options);

}  // namespace gateloop::distributed
