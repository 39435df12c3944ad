// zlib's CRC-32. Part of one stamp: see table-inl.h.

constexpr int kSlices = 16;

struct CrcTables {
  uint32_t of[kSlices][256];
};

constexpr CrcTables crc_tables() {
  CrcTables t = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xedb88320u : 0u);
    t.of[0][byte] = crc;
  }
  for (int slice = 1; slice < kSlices; ++slice) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t crc = t.of[slice - 1][byte];
      t.of[slice][byte] = (crc >> 8) ^ t.of[0][crc & 0xff];
    }
  }
  return t;
}

constexpr CrcTables kCrc = crc_tables();

// `state` is the complement of the checksum.
[[maybe_unused]] uint32_t crc_by_tables(uint32_t state, const uint8_t* bytes, size_t n) {
  for (; n >= kSlices; n -= kSlices, bytes += kSlices) {
    const uint64_t words[2] = {load64(bytes) ^ state, load64(bytes + 8)};
    state = 0;
    for (int i = 0; i < kSlices; ++i)
      state ^= kCrc.of[kSlices - 1 - i][(words[i / 8] >> (8 * (i % 8))) & 0xff];
  }
  for (; n != 0; --n) state = (state >> 8) ^ kCrc.of[0][(state ^ *bytes++) & 0xff];
  return state;
}

#if defined(__PCLMUL__)

// x^exponent modulo the polynomial, as a factor for carry-less products of bit-reflected operands.
constexpr int64_t crc_factor(int exponent) {
  uint32_t power = 0x80000000u;
  for (int i = 0; i < exponent; ++i) power = (power >> 1) ^ ((power & 1) != 0 ? 0xedb88320u : 0u);
  return static_cast<int64_t>(uint64_t{power} << 1);
}

// Moves the 128 bits of `from` forward by the distance of the factors, onto `onto`.
__m128i crc_fold(__m128i from, __m128i factors, __m128i onto) {
  const __m128i low = _mm_clmulepi64_si128(from, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(from, factors, 0x11);
  return _mm_xor_si128(onto, _mm_xor_si128(low, high));
}

uint32_t crc_state(uint32_t state, const uint8_t* bytes, size_t n) {
  if (n < 64) return crc_by_tables(state, bytes, n);
  constexpr int64_t k512Low = crc_factor(512 + 32);
  constexpr int64_t k512High = crc_factor(512 - 32);
  constexpr int64_t k128Low = crc_factor(128 + 32);
  constexpr int64_t k128High = crc_factor(128 - 32);
  const auto load = [&](size_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at));
  };
  __m128i x0 = _mm_xor_si128(load(0), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i x1 = load(16);
  __m128i x2 = load(32);
  __m128i x3 = load(48);
  const __m128i by_512 = _mm_set_epi64x(k512High, k512Low);
  for (bytes += 64, n -= 64; n >= 64; bytes += 64, n -= 64) {
    x0 = crc_fold(x0, by_512, load(0));
    x1 = crc_fold(x1, by_512, load(16));
    x2 = crc_fold(x2, by_512, load(32));
    x3 = crc_fold(x3, by_512, load(48));
  }
  const __m128i by_128 = _mm_set_epi64x(k128High, k128Low);
  __m128i x = crc_fold(crc_fold(crc_fold(x0, by_128, x1), by_128, x2), by_128, x3);
  for (; n >= 16; bytes += 16, n -= 16) x = crc_fold(x, by_128, load(0));
  uint8_t folded[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), x);
  return crc_by_tables(crc_by_tables(0, folded, sizeof(folded)), bytes, n);
}

#elif defined(__ARM_FEATURE_CRC32)

uint32_t crc_state(uint32_t state, const uint8_t* bytes, size_t n) {
  for (; n >= 8; n -= 8, bytes += 8) state = __crc32d(state, load64(bytes));
  for (; n != 0; --n) state = __crc32b(state, *bytes++);
  return state;
}

#else

uint32_t crc_state(uint32_t state, const uint8_t* bytes, size_t n) {
  return crc_by_tables(state, bytes, n);
}

#endif

uint32_t crc32(uint32_t crc, const uint8_t* bytes, size_t n) { return ~crc_state(~crc, bytes, n); }
