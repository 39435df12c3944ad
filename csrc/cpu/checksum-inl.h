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
  // As many as hide the latency of a product.
  constexpr int kLanes = 8;
  constexpr size_t kStep = 16 * kLanes;
  constexpr int64_t kAllLow = crc_factor(128 * kLanes + 32);
  constexpr int64_t kAllHigh = crc_factor(128 * kLanes - 32);
  constexpr int64_t kOneLow = crc_factor(128 + 32);
  constexpr int64_t kOneHigh = crc_factor(128 - 32);
  if (n < 64) return crc_by_tables(state, bytes, n);
  const auto load = [&](size_t lane) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * lane));
  };
  const __m128i by_one = _mm_set_epi64x(kOneHigh, kOneLow);
  __m128i x = _mm_xor_si128(load(0), _mm_cvtsi32_si128(static_cast<int>(state)));
  if (n >= kStep) {
    const __m128i by_all = _mm_set_epi64x(kAllHigh, kAllLow);
    __m128i lanes[kLanes] = {x};
    for (size_t i = 1; i < kLanes; ++i) lanes[i] = load(i);
    for (bytes += kStep, n -= kStep; n >= kStep; bytes += kStep, n -= kStep) {
      if (n > kAhead) ask_to_read(bytes, kStep);
      for (size_t i = 0; i < kLanes; ++i) lanes[i] = crc_fold(lanes[i], by_all, load(i));
    }
    x = lanes[0];
    for (size_t i = 1; i < kLanes; ++i) x = crc_fold(x, by_one, lanes[i]);
  } else {
    bytes += 16;
    n -= 16;
  }
  for (; n >= 16; bytes += 16, n -= 16) x = crc_fold(x, by_one, load(0));
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
