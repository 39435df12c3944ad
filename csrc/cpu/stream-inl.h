// Long streams through memory. Part of one stamp: see table-inl.h.

// How far ahead of a stream its lines are asked for, in bytes: the processor's own prefetching
// stops at pages, and does not know that a line will be written.
constexpr size_t kAhead = 4096;
constexpr size_t kLine = 64;

void ask_to_read(const void* next, size_t bytes) {
  const char* line = static_cast<const char*>(next) + kAhead;
  for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(line + i);
}
void ask_to_write(const void* next, size_t bytes) {
  const char* line = static_cast<const char*>(next) + kAhead;
  for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(line + i, 1);
}

// Calls body(start, length) for stretches of n elements; `x` is read and `y` written alongside.
constexpr size_t kStretch = 256;
template <class X, class Y, class Body>
void for_each_stretch(const X* x, const Y* y, size_t n, Body body) {
  for (size_t i = 0; i < n; i += kStretch) {
    ask_to_read(x + i, kStretch * sizeof(X));
    ask_to_write(y + i, kStretch * sizeof(Y));
    body(i, n - i < kStretch ? n - i : kStretch);
  }
}
// The same where nothing is written.
template <class X, class Body>
void for_each_stretch(const X* x, size_t n, Body body) {
  for (size_t i = 0; i < n; i += kStretch) {
    ask_to_read(x + i, kStretch * sizeof(X));
    body(i, n - i < kStretch ? n - i : kStretch);
  }
}
