#include "recurrence/cpu/target.h"

#include <atomic>
#include <stdexcept>

#include "recurrence/cpu/constants.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/target.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {
const char* Name() { return hwy::TargetName(HWY_TARGET); }
}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence::cpu {
HWY_EXPORT(Name);
namespace {
std::atomic<std::int64_t> stream_bytes{kStreamBytes};
}  // namespace

const char* active_target() { return HWY_DYNAMIC_DISPATCH(Name)(); }

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    names.emplace_back(hwy::TargetName(rest & -rest));
  }
  return names;
}

void force_target(const std::string& name) {
  hwy::SetSupportedTargetsForTest(0);
  std::int64_t chosen = 0;
  for (std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    if (name == hwy::TargetName(rest & -rest)) chosen = rest & -rest;
  }
  if (chosen == 0 && !name.empty()) throw std::invalid_argument("no such target: " + name);
  hwy::SetSupportedTargetsForTest(chosen);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

bool bypasses_cache(std::int64_t output_bytes) {
  return output_bytes > stream_bytes.load(std::memory_order_relaxed);
}
void set_stream_bytes(std::int64_t bytes) { stream_bytes = bytes; }

}  // namespace gateloop::recurrence::cpu
#endif
