#include <gateloop/recurrence.h>

#include <cstddef>
#include <iostream>
#include <vector>

int main() {
  constexpr int kTime = 4;
  const std::vector<float> a(kTime, 0.5f), x(kTime, 1.0f);  // one sequence of one channel
  std::vector<float> h(kTime);
  const gateloop::recurrence::LinearRecurrence scan{
      .shape = {.batch = 1, .time = kTime, .channels = 1},
      .a = {a.data(), kTime, 1},
      .x = {x.data(), kTime, 1},
      .h = {h.data(), kTime, 1}};
  struct alignas(64) CacheLine {
    std::byte bytes[64];
  };
  std::vector<CacheLine> scratch(gateloop::recurrence::scratch_bytes(scan, 1) / 64 + 1);
  gateloop::recurrence::run(scan, {}, scratch.data());
  for (const float value : h) std::cout << value << ' ';  // 1 1.5 1.75 1.875
  std::cout << '\n';
}
