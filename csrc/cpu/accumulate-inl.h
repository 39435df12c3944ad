// Weighted sums. Part of one stamp: see table-inl.h.

template <class Float, class Accumulator>
void add(const Float* x, size_t n, Accumulator weight, Accumulator* acc) {
  for_each_stretch(x, acc, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i)
      acc[i] += weight * static_cast<Accumulator>(x[i]);
  });
}

template <class Accumulator>
void add_codes_run(const int8_t* codes, size_t n, int levels, float scale, Accumulator weight,
                   Accumulator* acc) {
  for_each_stretch(codes, acc, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i)
      acc[i] += weight * static_cast<Accumulator>(fedcodec::dequantize(codes[i], levels, scale));
  });
}

template <class Accumulator>
void add_codes(const int8_t* codes, size_t n, Grid grid, int levels, const float* scales,
               Accumulator weight, Accumulator* acc) {
  if (grid.inner >= kLongRun) {
    for_each_run(n, grid, [&](size_t i, size_t count, size_t channel) {
      add_codes_run(codes + i, count, levels, scales[channel], weight, acc + i);
    });
    return;
  }
  for_each_chunk(n, grid, scales, [&](size_t i, size_t count, const float* scale) {
    for (size_t j = 0; j < count; ++j) {
      acc[i + j] +=
          weight * static_cast<Accumulator>(fedcodec::dequantize(codes[i + j], levels, scale[j]));
    }
  });
}

template <class Float, class Accumulator>
void add_at(const uint32_t* positions, const Float* x, size_t n, Accumulator weight,
            Accumulator* acc) {
  // Sums that lie apart wait for memory one by one unless asked for before.
  constexpr size_t kEarly = 64;
  size_t i = 0;
  for (; i + kEarly < n; ++i) {
    __builtin_prefetch(acc + positions[i + kEarly], 1);
    acc[positions[i]] += weight * static_cast<Accumulator>(x[i]);
  }
  for (; i < n; ++i) acc[positions[i]] += weight * static_cast<Accumulator>(x[i]);
}
