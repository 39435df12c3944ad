// Memory that is about to be written, of unset content.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fedcodec {

// Asks for large pages: the first touch of small ones can cost more than the work on them.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t size) {
#if defined(__linux__)
  constexpr size_t kWorthwhile = size_t{1} << 22;
  constexpr uintptr_t kPage = 4096;
  if (size < kWorthwhile) return;
  const size_t skipped = (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;
  const size_t whole = (size - skipped) / kPage * kPage;
  madvise(static_cast<char*>(data) + skipped, whole, MADV_HUGEPAGE);  // only advice: may fail
#endif
}

// Of which only what is written is ever touched.
template <class T>
std::unique_ptr<T[]> buffer(uint64_t n) {
  auto memory = std::make_unique_for_overwrite<T[]>(static_cast<size_t>(n));
  prefer_large_pages(memory.get(), static_cast<size_t>(n) * sizeof(T));
  return memory;
}

}  // namespace fedcodec
