// The floating-point mode that docs/numerics.md assumes: nearest even, subnormals kept, whatever
// the caller set.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fedcodec {

// Holds the default mode for this thread; a thread inherits its creator's mode, so every worker
// needs its own.
class DefaultFloatEnv {
 public:
  DefaultFloatEnv() : saved_(read()) { write(kDefault); }
  ~DefaultFloatEnv() { write(saved_); }
  DefaultFloatEnv(const DefaultFloatEnv&) = delete;
  DefaultFloatEnv& operator=(const DefaultFloatEnv&) = delete;

 private:
#if defined(__x86_64__)
  using Control = unsigned;
  static constexpr Control kDefault = 0x1f80;
  static Control read() { return _mm_getcsr(); }
  static void write(Control control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kDefault = 0;
  static Control read() {
    Control control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void write(Control control) { asm volatile("msr fpcr, %0" : : "r"(control) : "memory"); }
#endif
  Control saved_;
};

}  // namespace fedcodec
