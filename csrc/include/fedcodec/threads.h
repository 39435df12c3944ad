// Work dealt to the threads of one pool: the caller's, and some that sleep between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedcodec {

// How many threads a call may use, the caller's counted: what was set last, else
// FEDCODEC_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process may run on.
// Throws std::invalid_argument if FEDCODEC_NUM_THREADS is not a number from 1 to kMostThreads.
constexpr size_t kMostThreads = 1024;
size_t thread_count();
void set_thread_count(size_t n);  // from 1 to kMostThreads

// Less than this is done before another thread has woken up. A multiple of 8; sanitized builds have
// it small, so that small inputs meet threads.
#ifndef FEDCODEC_LEAST_RANGE
#define FEDCODEC_LEAST_RANGE 1 << 17
#endif
constexpr uint64_t kLeastRange = FEDCODEC_LEAST_RANGE;
// As much work, of positions: each takes as long as some elements that are read in order.
constexpr uint64_t kLeastPositions = kLeastRange / 8;

// [0, n) cut into ranges of equal length, not 0, but for the last.
struct Ranges {
  uint64_t n;
  uint64_t length;
  size_t threads = 1;  // at most

  uint64_t count() const { return n == 0 ? 1 : (n - 1) / length + 1; }
  uint64_t index(uint64_t begin) const { return begin / length; }
};

// As few as keep all threads busy, each of `least` elements or more but for the last; one inside
// another range. Ranges begin at multiples of `step`.
Ranges cut_ranges(uint64_t n, uint64_t step = 1, uint64_t least = kLeastRange);

// What does body(begin, end): a reference to it, which allocates nothing.
class RangeBody {
 public:
  template <class Body>
  RangeBody(const Body& body)  // NOLINT(google-explicit-constructor): lambdas stand in for it
      : body_(&body), call_([](const void* what, uint64_t begin, uint64_t end) {
          (*static_cast<const Body*>(what))(begin, end);
        }) {}
  void operator()(uint64_t begin, uint64_t end) const { call_(body_, begin, end); }

 private:
  const void* body_;
  void (*call_)(const void*, uint64_t, uint64_t);
};

// Runs the body for every range, some of them at once, in the default floating-point mode. Rethrows
// what the lowest range threw; those above may not have run. Throws nothing of its own.
void run_ranges(const Ranges& ranges, RangeBody body);

// For bodies whose result does not depend on how [0, n) is cut.
template <class Body>
void for_ranges(uint64_t n, uint64_t step, const Body& body) {
  n < 2 * kLeastRange ? body(uint64_t{0}, n) : run_ranges(cut_ranges(n, step), body);
}

}  // namespace fedcodec
