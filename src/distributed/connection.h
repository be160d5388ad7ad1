#pragma once

#include <chrono>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "gateloop/distributed.h"

namespace gateloop::distributed {

struct Processes::Connection {
  Launch launch;
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};

using Backend = c10::intrusive_ptr<c10d::Backend>;

/// gloo's, in a build with its headers; else throws std::invalid_argument.
Backend make_gloo(const c10::intrusive_ptr<c10d::Store>& store, const Launch& launch,
                  std::chrono::milliseconds timeout);
/// Whether this build has NCCL.
bool has_nccl();
/// Throws std::invalid_argument in a build without it.
Backend make_nccl(const c10::intrusive_ptr<c10d::Store>& store, const Launch& launch,
                  std::chrono::milliseconds timeout);

/// Of the error's text: libtorch's goes on for a page.
std::string first_line(const std::exception& error);

}  // namespace gateloop::distributed
