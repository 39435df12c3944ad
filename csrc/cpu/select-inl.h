// Selection by magnitude. Part of one stamp: see table-inl.h.

constexpr unsigned kDigitBits = 11;
constexpr size_t kDigits = size_t{1} << kDigitBits;

#include "lanes-inl.h"

template <class Key>
struct SignedKey {
  using type = int32_t;
};
template <>
struct SignedKey<uint64_t> {
  using type = int64_t;
};
template <class Key>
using SignedOf = typename SignedKey<Key>::type;

template <class Signed, class Float>
Signed signed_key(Float x) {
  return static_cast<Signed>(
      key_of(x));  // never negative; signed maxima and comparisons vectorise everywhere
}

template <class Signed, class Float>
Signed max_key(const Float* x, size_t n) {
  Signed largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const Signed key = signed_key<Signed>(x[i]);
    largest = key > largest ? key : largest;
  }
  return largest;
}

uint32_t max_key_f32(const float* x, size_t n) {
  size_t i = 0;
  uint32_t largest = 0;
#if defined(__AVX512BW__) || defined(__AVX2__)
  // Four maxima, so that no vector waits for the one before.
#if defined(__AVX512BW__)
  if (n >= 64) {
    __m512i most[4] = {};
    for (; i + 64 <= n; i += 64) {
      ask_to_read(x + i, 64 * sizeof(float));
      for (size_t v = 0; v < 4; ++v)
        most[v] = _mm512_max_epu32(most[v], Lanes<float>::keys(x + i + 16 * v));
    }
    largest = _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  }
#else
  if (n >= 32) {
    __m256i most[4] = {};
    for (; i + 32 <= n; i += 32) {
      ask_to_read(x + i, 32 * sizeof(float));
      for (size_t v = 0; v < 4; ++v)
        most[v] = _mm256_max_epu32(most[v], Lanes<float>::keys(x + i + 8 * v));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(
        reinterpret_cast<__m256i*>(lanes),
        _mm256_max_epu32(_mm256_max_epu32(most[0], most[1]), _mm256_max_epu32(most[2], most[3])));
    for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  }
#endif
#endif
  const uint32_t last = static_cast<uint32_t>(max_key<int32_t>(x + i, n - i));
  return last > largest ? last : largest;
}
uint64_t max_key_f64(const double* x, size_t n) {
  return static_cast<uint64_t>(max_key<int64_t>(x, n));
}

template <class Signed, class Float, class Key>
size_t count_above(const Float* x, size_t n, Key threshold) {
  const Signed bound = static_cast<Signed>(threshold);
  size_t count = 0;
  // Counting in the width of a key keeps the lanes full; a stretch is too short to overflow one.
  constexpr size_t kStretch = size_t{1} << 20;
  for (size_t start = 0; start < n; start += kStretch) {
    const size_t stop = n - start < kStretch ? n : start + kStretch;
    Signed above = 0;
    for (size_t i = start; i < stop; ++i) above += signed_key<Signed>(x[i]) > bound ? 1 : 0;
    count += static_cast<size_t>(above);
  }
  return count;
}

size_t count_above_f32(const float* x, size_t n, uint32_t threshold) {
  return count_above<int32_t>(x, n, threshold);
}
size_t count_above_f64(const double* x, size_t n, uint64_t threshold) {
  return count_above<int64_t>(x, n, threshold);
}

template <class Key, class Float>
size_t matching_digits(const Float* x, size_t n, Key prefix, unsigned shift, uint16_t* digits) {
  size_t m = 0;
  const auto append = [&](size_t i) {
    const Key digit_and_above = key_of(x[i]) >> shift;
    digits[m] = static_cast<uint16_t>(digit_and_above & (kDigits - 1));
    m += static_cast<size_t>(digit_and_above >> kDigitBits == prefix);
  };
  size_t i = 0;
#if defined(FEDCODEC_LANES)
  using L = Lanes<Float>;
  // Whole vectors are stored: there is room, since no more are kept than were read.
  for (; i + L::kCount <= n; i += L::kCount) {
    const auto shifted = L::shift(L::keys(x + i), shift);
    const unsigned match = L::equal(L::shift(shifted, kDigitBits), prefix);
    if (match == 0) continue;
    L::compress_digits(match, shifted, digits + m);
    m += static_cast<size_t>(popcount(match));
  }
#else
  constexpr size_t kBlock = 16;
  for (; i + kBlock <= n; i += kBlock) {
    SignedOf<Key> matches = 0;
    for (size_t j = 0; j < kBlock; ++j)
      matches += (key_of(x[i + j]) >> (shift + kDigitBits)) == prefix ? 1 : 0;
    if (matches == 0) continue;
    for (size_t j = 0; j < kBlock; ++j) append(i + j);
  }
#endif
  for (; i < n; ++i) append(i);
  return m;
}

template <class Key, class Float>
void count_digits(const Float* x, size_t n, Key prefix, unsigned shift, uint64_t* bins) {
  constexpr size_t kStretch = 4096;
  uint16_t digits[kStretch];
  // Neighbours often share a digit; separate counters spare them waiting for each other's store.
  constexpr size_t kCopies = 4;
  constexpr size_t kFewest = 4 * kDigits;
  uint32_t counts[kCopies][kDigits];
  const bool copies = n >= kFewest;
  const bool unfiltered = shift + kDigitBits == 8 * sizeof(Key) - 1;
  size_t counted = 0;
  for (size_t start = 0; start < n; start += kStretch) {
    const size_t length = n - start < kStretch ? n - start : kStretch;
    const Float* stretch = x + start;
    size_t m = 0;
    if (unfiltered) {
      for (size_t i = 0; i < length; ++i)
        digits[i] = static_cast<uint16_t>(key_of(stretch[i]) >> shift);
      m = length;
    } else {
      m = matching_digits(stretch, length, prefix, shift, digits);
    }
    if (!copies) {
      for (size_t i = 0; i < m; ++i) ++bins[digits[i]];
      continue;
    }
    if (counted == 0) memset(counts, 0, sizeof(counts));
    size_t i = 0;
    for (; i + kCopies <= m; i += kCopies) {
      for (size_t c = 0; c < kCopies; ++c) ++counts[c][digits[i + c]];
    }
    for (; i < m; ++i) ++counts[0][digits[i]];
    counted += length;
    if (counted >= (size_t{1} << 30) || start + length == n) {
      for (size_t d = 0; d < kDigits; ++d) {
        for (size_t c = 0; c < kCopies; ++c) bins[d] += counts[c][d];
      }
      counted = 0;
    }
  }
}

void count_digits_f32(const float* x, size_t n, uint32_t prefix, unsigned shift, uint64_t* bins) {
  count_digits<uint32_t>(x, n, prefix, shift, bins);
}
void count_digits_f64(const double* x, size_t n, uint64_t prefix, unsigned shift, uint64_t* bins) {
  count_digits<uint64_t>(x, n, prefix, shift, bins);
}

#if defined(FEDCODEC_LANES)
// The lowest of these bits, as many as are left, which are counted down.
unsigned first_ties(unsigned equal, uint64_t& left) {
  const uint64_t all = static_cast<uint64_t>(popcount(equal));
  if (left >= all) {
    left -= all;
    return equal;
  }
  unsigned taken = 0;
  for (; left != 0; --left, equal &= equal - 1) taken |= equal & (0 - equal);
  return taken;
}
#endif

// Calls make(start, length) before those elements of x are read.
template <class Float, class Key, class Make>
size_t compact(const Float* x, size_t n, Key threshold, uint64_t* ties, uint32_t first,
               uint32_t* positions, Float* values, Make make) {
  uint64_t left = *ties;
  size_t kept = 0;
  const auto keep = [&](size_t i) {
    const Key key = key_of(x[i]);
    const bool tie = key == threshold && left != 0;
    positions[kept] = first + static_cast<uint32_t>(i);
    values[kept] = x[i];
    kept += static_cast<size_t>((key > threshold) | tie);
    left -= static_cast<uint64_t>(tie);
  };
  size_t i = 0;
#if defined(FEDCODEC_LANES)
  using L = Lanes<Float>;
  constexpr size_t kGroup = 4;
  if (left == 0) {
    for (; i + kGroup * L::kCount <= n; i += kGroup * L::kCount) {
      unsigned chosen[kGroup];
      unsigned any = 0;
      for (size_t v = 0; v < kGroup; ++v) {
        make(i + v * L::kCount, L::kCount);
        chosen[v] = L::above(L::keys(x + i + v * L::kCount), threshold);
        any |= chosen[v];
      }
      if (any == 0) continue;
      for (size_t v = 0; v < kGroup; ++v) {
        const size_t at = i + v * L::kCount;
        L::compress(chosen[v], x + at, first + static_cast<uint32_t>(at), positions + kept,
                    values + kept);
        kept += static_cast<size_t>(popcount(chosen[v]));
      }
    }
  }
  for (; i + L::kCount <= n; i += L::kCount) {
    make(i, L::kCount);
    const auto keys = L::keys(x + i);
    unsigned chosen = L::above(keys, threshold);
    const unsigned equal = L::equal(keys, threshold);
    if ((chosen | equal) == 0) continue;
    chosen |= first_ties(equal, left);
    L::compress(chosen, x + i, first + static_cast<uint32_t>(i), positions + kept, values + kept);
    kept += static_cast<size_t>(popcount(chosen));
  }
#else
  constexpr size_t kBlock = 16;
  for (; i + kBlock <= n; i += kBlock) {
    make(i, kBlock);
    if (static_cast<Key>(max_key<SignedOf<Key> >(x + i, kBlock)) < threshold) continue;
    for (size_t j = 0; j < kBlock; ++j) keep(i + j);
  }
#endif
  make(i, n - i);
  for (; i < n; ++i) keep(i);
  *ties = left;
  return kept;
}

template <class Float, class Key>
size_t compact_from(const Float* x, size_t n, Key threshold, uint64_t* ties, uint32_t first,
                    uint32_t* positions, Float* values) {
  return compact(x, n, threshold, ties, first, positions, values, [&](size_t start, size_t length) {
    ask_to_read(x + start, length * sizeof(Float));
  });
}

template <class Float, class Key>
size_t compact_sum(const Float* a, const Float* b, Float* out, size_t n, Key threshold,
                   uint64_t* ties, uint32_t first, uint32_t* positions, Float* values) {
  return compact<Float>(out, n, threshold, ties, first, positions, values,
                        [&](size_t start, size_t length) {
                          ask_to_read(a + start, length * sizeof(Float));
                          ask_to_read(b + start, length * sizeof(Float));
                          ask_to_write(out + start, length * sizeof(Float));
#if defined(FEDCODEC_LANES)
                          using L = Lanes<Float>;
                          if (length == L::kCount) return L::sum(a + start, b + start, out + start);
#endif
                          for (size_t i = start; i < start + length; ++i) out[i] = a[i] + b[i];
                        });
}

size_t compact_f32(const float* x, size_t n, uint32_t threshold, uint64_t* ties, uint32_t first,
                   uint32_t* positions, float* values) {
  return compact_from(x, n, threshold, ties, first, positions, values);
}
size_t compact_f64(const double* x, size_t n, uint64_t threshold, uint64_t* ties, uint32_t first,
                   uint32_t* positions, double* values) {
  return compact_from(x, n, threshold, ties, first, positions, values);
}
size_t compact_sum_f32(const float* a, const float* b, float* out, size_t n, uint32_t threshold,
                       uint64_t* ties, uint32_t first, uint32_t* positions, float* values) {
  return compact_sum(a, b, out, n, threshold, ties, first, positions, values);
}
size_t compact_sum_f64(const double* a, const double* b, double* out, size_t n, uint64_t threshold,
                       uint64_t* ties, uint32_t first, uint32_t* positions, double* values) {
  return compact_sum(a, b, out, n, threshold, ties, first, positions, values);
}

template <class Float, class Key>
size_t refine(Key threshold, uint64_t ties, uint32_t* positions, Float* values, size_t n) {
  size_t kept = 0;
  size_t i = 0;
#if defined(FEDCODEC_LANES)
  using L = Lanes<Float>;
  // Whole vectors are stored, over what was read before.
  for (; i + L::kCount <= n; i += L::kCount) {
    const auto keys = L::keys(values + i);
    const unsigned chosen = L::above(keys, threshold) | first_ties(L::equal(keys, threshold), ties);
    L::compress_pairs(chosen, positions + i, values + i, positions + kept, values + kept);
    kept += static_cast<size_t>(popcount(chosen));
  }
#endif
  for (; i < n; ++i) {
    const Float value = values[i];
    const Key key = key_of(value);
    const bool tie = key == threshold && ties != 0;
    positions[kept] = positions[i];
    values[kept] = value;
    kept += static_cast<size_t>((key > threshold) | tie);
    ties -= static_cast<uint64_t>(tie);
  }
  return kept;
}

size_t refine_f32(uint32_t threshold, uint64_t ties, uint32_t* positions, float* values, size_t n) {
  return refine(threshold, ties, positions, values, n);
}
size_t refine_f64(uint64_t threshold, uint64_t ties, uint32_t* positions, double* values,
                  size_t n) {
  return refine(threshold, ties, positions, values, n);
}
