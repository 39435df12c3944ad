// Which table runs: the only file that looks at the processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <span>

#include "fedcodec/kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fedcodec {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("pclmul");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
#elif defined(__aarch64__)
bool has_neon() {
#if defined(__linux__)
  const unsigned long have = getauxval(AT_HWCAP);
  return (have & HWCAP_ASIMD) != 0 && (have & HWCAP_CRC32) != 0;
#else
  return true;  // every 64-bit Apple processor
#endif
}
#endif

std::span<const KernelChoice> choices() {
  static const KernelChoice all[] = {
      {&kernels_baseline, true},
#if defined(__x86_64__)
      {&kernels_avx2, has_avx2()},
      {&kernels_avx512, has_avx512()},
#elif defined(__aarch64__)
      {&kernels_neon, has_neon()},
#endif
  };
  return all;
}

const Kernels* find(const char* name) {
  for (const KernelChoice& choice : choices()) {
    if (choice.usable && std::strcmp(choice.table->name, name) == 0) return choice.table;
  }
  return nullptr;
}

const Kernels* initial() {
  const char* name = std::getenv("FEDCODEC_ISA");
  if (name != nullptr && *name != '\0') return find(name);
  const Kernels* best = nullptr;
  for (const KernelChoice& choice : choices()) best = choice.usable ? choice.table : best;
  return best;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table{initial()};
  return table;
}

}  // namespace

size_t kernel_choices(const KernelChoice** all) {
  *all = choices().data();
  return choices().size();
}

const Kernels* active_kernels() { return active().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  const Kernels* table = find(name);
  if (table != nullptr) active().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace fedcodec
