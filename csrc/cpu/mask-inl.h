// Bit strings of masks. Part of one stamp: see table-inl.h.

// How many bits are set of each byte.
[[maybe_unused]] uint64_t ones_of_bytes(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  return (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
}

int popcount(uint64_t word) {
#if defined(__POPCNT__) || defined(__aarch64__)
  return __builtin_popcountll(word);
#else
  return static_cast<int>((ones_of_bytes(word) * 0x0101010101010101u) >> 56);
#endif
}

void pack_mask(const uint8_t* mask, size_t n, uint8_t* bits) {
  const size_t whole = n / 8;
  size_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 8 <= whole; i += 8) {
    const __m512i bytes = _mm512_loadu_si512(mask + 8 * i);
    store64(bits + i, _mm512_test_epi8_mask(bytes, bytes));
  }
#elif defined(__AVX2__)
  for (; i + 4 <= whole; i += 4) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 8 * i));
    const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
    const int ones = ~zeros;
    memcpy(bits + i, &ones, 4);
  }
#endif
  for (; i < whole; ++i) bits[i] = bits_of_bytes(load64(mask + 8 * i));
  if (n % 8 != 0) {
    uint64_t last = 0;
    memcpy(&last, mask + 8 * whole, n % 8);
    bits[whole] = bits_of_bytes(last);
  }
}

void unpack_mask(const uint8_t* bits, size_t n, uint8_t* mask) {
  const size_t whole = n / 8;
  for (size_t i = 0; i < whole; ++i) store64(mask + 8 * i, bytes_of_bits(bits[i]));
  if (n % 8 != 0) {
    const uint64_t last = bytes_of_bits(bits[whole]);
    memcpy(mask + 8 * whole, &last, n % 8);
  }
}

size_t count_bits(const uint8_t* bytes, size_t n_bytes) {
  size_t count = 0;
  size_t i = 0;
  for (; i + 8 <= n_bytes; i += 8) count += static_cast<size_t>(popcount(load64(bytes + i)));
  for (; i < n_bytes; ++i) count += static_cast<size_t>(popcount(bytes[i]));
  return count;
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
// All ones in each 32-bit lane whose bit is set.
__m256i spread_bits(uint8_t byte) {
  const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit);
}
#endif

template <class Float, class Bits>
void apply_mask(const Float* x, const uint8_t* bits, size_t n, Float* out) {
  const auto masked = [](Float value, unsigned byte, unsigned bit) {
    const Bits keep = (byte & bit) != 0 ? ~Bits{0} : Bits{0};
    return bit_cast<Float>(bit_cast<Bits>(value) & keep);
  };
  const size_t whole = n / 8;
  for (size_t i = 0; i < whole; ++i) {
    const unsigned byte = bits[i];
    for (size_t j = 0; j < 8; ++j) out[8 * i + j] = masked(x[8 * i + j], byte, 1u << j);
  }
  for (size_t i = 8 * whole; i < n; ++i) out[i] = masked(x[i], bits[whole], 1u << (i % 8));
}

void apply_mask_f32(const float* x, const uint8_t* bits, size_t n, float* out) {
  size_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 16 <= n; i += 16) {
    __mmask16 keep;
    memcpy(&keep, bits + i / 8, 2);
    _mm512_storeu_ps(out + i, _mm512_maskz_loadu_ps(keep, x + i));
  }
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m256 keep = _mm256_castsi256_ps(spread_bits(bits[i / 8]));
    _mm256_storeu_ps(out + i, _mm256_and_ps(keep, _mm256_loadu_ps(x + i)));
  }
#endif
  apply_mask<float, uint32_t>(x + i, bits + i / 8, n - i, out + i);
}

void apply_mask_f64(const double* x, const uint8_t* bits, size_t n, double* out) {
  size_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 8 <= n; i += 8) {
    _mm512_storeu_pd(out + i, _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits[i / 8]), x + i));
  }
#endif
  apply_mask<double, uint64_t>(x + i, bits + i / 8, n - i, out + i);
}
