// Kept values among zeros. Part of one stamp: see table-inl.h.

template <class T>
void expand(const uint32_t* positions, const T* x, size_t n, size_t begin, size_t end, T* out) {
  constexpr size_t kZeroed = 1024;  // stay in cache until their values are written
  size_t next = 0;
  for (size_t start = begin; start < end; start += kZeroed) {
    const size_t stop = end - start < kZeroed ? end : start + kZeroed;
    ask_to_write(out + start, (stop - start) * sizeof(T));
    memset(out + start, 0, (stop - start) * sizeof(T));
    for (; next < n && positions[next] < stop; ++next) out[positions[next]] = x[next];
  }
}
