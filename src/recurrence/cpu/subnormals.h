#pragma once

/// Arithmetic without subnormal numbers, which processors compute some 10 to 100 times slower.
#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace gateloop::recurrence::cpu {

/// While one exists, this thread reads and writes subnormal numbers as zeros (x86, AArch64). Its
/// end restores the thread's mode.
class FlushSubnormals {
 public:
  FlushSubnormals() { write(mode_ | kFlush); }
  ~FlushSubnormals() { write(mode_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__)
  using Mode = std::uint32_t;
  static constexpr Mode kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zeros
  static Mode read() { return _mm_getcsr(); }
  static void write(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = std::uint64_t;
  static constexpr Mode kFlush = Mode{1} << 24;  // FPCR.FZ
  static Mode read() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = std::uint32_t;
  static constexpr Mode kFlush = 0;
  static Mode read() { return 0; }
  static void write(Mode) {}
#endif

  const Mode mode_ = read();
};

}  // namespace gateloop::recurrence::cpu
