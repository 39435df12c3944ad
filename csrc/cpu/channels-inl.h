// Norms of channels. Part of one stamp: see table-inl.h.

template <int kOrder, class Float>
uint64_t norm_term(Float x, double factor) {
  const uint64_t q = scaled_magnitude(x, factor);
  // A product of two numbers of 32 bits is one instruction, of 64 bits it is several.
  return kOrder == 1 ? q : (q & 0xffffffffu) * (q & 0xffffffffu);
}

template <int kOrder, class Float>
uint64_t norm_of(const Float* x, size_t n, double factor) {
  uint64_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += norm_term<kOrder>(x[i], factor);
  return sum;
}

template <int kOrder, class Float>
void add_norms_of(const Float* x, size_t n, Grid grid, double factor, uint64_t* norms) {
  if (grid.inner == 1) {
    for (size_t row = 0; row < n; row += grid.channels) {
      const size_t count = n - row < grid.channels ? n - row : grid.channels;
      for (size_t j = 0; j < count; ++j) norms[j] += norm_term<kOrder>(x[row + j], factor);
    }
    return;
  }
  for_each_run(n, grid, [&](size_t start, size_t count, size_t channel) {
    if (count < kStretch) {
      norms[channel] += norm_of<kOrder>(x + start, count, factor);
      return;
    }
    for_each_stretch(x + start, count, [&](size_t begin, size_t length) {
      norms[channel] += norm_of<kOrder>(x + start + begin, length, factor);
    });
  });
}

template <class Float>
void add_norms(const Float* x, size_t n, Grid grid, int order, double factor, uint64_t* norms) {
  order == 1 ? add_norms_of<1>(x, n, grid, factor, norms)
             : add_norms_of<2>(x, n, grid, factor, norms);
}

template <class Float>
bool any_used(const Float* x, size_t n) {
  constexpr size_t kFew = 64;
  for (size_t i = 0; i < n; i += kFew) {
    decltype(key_of(x[0])) all = 0;
    const size_t stop = n - i < kFew ? n : i + kFew;
    for (size_t j = i; j < stop; ++j) all |= key_of(x[j]);
    if (all != 0) return true;
  }
  return false;
}

template <class Float>
void mark_used(const Float* x, size_t n, Grid grid, uint8_t* used) {
  if (grid.inner == 1) {
    constexpr size_t kRows = 16;  // after which all may be
    uint8_t all = 0;
    for (size_t row = 0, rows = 0; row < n && all == 0; row += grid.channels, ++rows) {
      const size_t count = n - row < grid.channels ? n - row : grid.channels;
      for (size_t j = 0; j < count; ++j) used[j] |= key_of(x[row + j]) != 0;
      if (rows % kRows != kRows - 1) continue;
      all = 1;
      for (size_t j = 0; j < grid.channels; ++j) all &= used[j];
    }
    return;
  }
  for_each_run(n, grid, [&](size_t start, size_t count, size_t channel) {
    if (used[channel] == 0) used[channel] = any_used(x + start, count);
  });
}
