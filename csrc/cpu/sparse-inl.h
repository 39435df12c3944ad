// Tiles of an index set. Part of one stamp: see table-inl.h.

void gap_sums(const uint32_t* positions, size_t n, unsigned shift, uint64_t sums[3]) {
  uint64_t s0 = 0;
  uint64_t s1 = 0;
  uint64_t s2 = 0;
  if (n != 0) {
    s0 = positions[0] >> shift;
    s1 = positions[0] >> (shift + 1);
    s2 = positions[0] >> (shift + 2);
  }
  for (size_t i = 1; i < n; ++i) {
    const uint32_t gap = positions[i] - positions[i - 1] - 1;
    s0 += gap >> shift;
    s1 += gap >> (shift + 1);
    s2 += gap >> (shift + 2);
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
}

void pack_rice(const uint32_t* positions, size_t n, unsigned r, uint8_t* remainders,
               uint8_t* unary) {
  const uint32_t mask = (1u << r) - 1;
  uint64_t pending = 0;
  unsigned filled = 0;
  uint64_t one = 0;
  uint32_t next = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t gap = positions[i] - next;
    next = positions[i] + 1;
    one += gap >> r;
    unary[one >> 3] = static_cast<uint8_t>(unary[one >> 3] | 1u << (one & 7));
    ++one;
    pending |= static_cast<uint64_t>(gap & mask) << filled;
    filled += r;
    if (filled >= 32) {
      memcpy(remainders, &pending, 4);
      remainders += 4;
      pending >>= 32;
      filled -= 32;
    }
  }
  memcpy(remainders, &pending, (filled + 7) / 8);
}

// Calls body(remainder) for n remainders of r bits.
template <class Body>
void for_each_remainder(const uint8_t* remainders, size_t n, unsigned r, Body body) {
  const uint64_t mask = (uint64_t{1} << r) - 1;
  const size_t bytes = (n * r + 7) / 8;
  size_t bit = 0;
  size_t i = 0;
  for (; i < n && bit / 8 + 8 <= bytes; ++i, bit += r) {
    body(static_cast<uint32_t>((load64(remainders + bit / 8) >> (bit % 8)) & mask));
  }
  for (; i < n; ++i, bit += r) {
    uint64_t word = 0;
    memcpy(&word, remainders + bit / 8, bytes - bit / 8);
    body(static_cast<uint32_t>((word >> (bit % 8)) & mask));
  }
}

void unpack_rice(const uint8_t* remainders, const uint8_t* unary, size_t n, unsigned r,
                 uint32_t* positions) {
  uint32_t next = 0;
  size_t i = 0;
  for_each_remainder(remainders, n, r, [&](uint32_t remainder) {
    next += remainder;
    positions[i++] = next++;
  });
  // What a one at bit b adds: its position holds b - i zeros, each worth 2^r.
  size_t found = 0;
  const auto add_quotients = [&](uint64_t word, size_t first_bit) {
    for (; word != 0 && found < n; word &= word - 1, ++found) {
      const size_t bit = first_bit + static_cast<size_t>(__builtin_ctzll(word));
      positions[found] += static_cast<uint32_t>(bit - found) << r;
    }
  };
  size_t byte = 0;
  // A byte holds at most eight ones, so 57 of them to come means eight bytes to come.
  for (; n - found > 56; byte += 8) add_quotients(load64(unary + byte), 8 * byte);
  for (; found < n; ++byte) add_quotients(unary[byte], 8 * byte);
}

uint64_t sum_remainders(const uint8_t* remainders, size_t n, unsigned r) {
  uint64_t sum = 0;
  for_each_remainder(remainders, n, r, [&](uint32_t remainder) { sum += remainder; });
  return sum;
}

void pack_bitmap(const uint32_t* positions, size_t n, uint8_t* bits) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t p = positions[i];
    bits[p >> 3] = static_cast<uint8_t>(bits[p >> 3] | 1u << (p & 7));
  }
}

size_t unpack_bitmap(const uint8_t* bits, size_t length, uint32_t* positions) {
  size_t m = 0;
  const auto append = [&](uint64_t word, size_t first_bit) {
    for (; word != 0; word &= word - 1) {
      positions[m++] =
          static_cast<uint32_t>(first_bit + static_cast<size_t>(__builtin_ctzll(word)));
    }
  };
  size_t i = 0;
  for (; i + 64 <= length; i += 64) append(load64(bits + i / 8), i);
  if (i < length) {
    uint64_t last = 0;
    memcpy(&last, bits + i / 8, (length - i + 7) / 8);
    append(last & ((uint64_t{1} << (length - i)) - 1), i);
  }
  return m;
}

size_t complement(const uint32_t* positions, size_t n, size_t length, uint32_t* out) {
  size_t m = 0;
  uint32_t next = 0;
  const auto fill_until = [&](uint32_t stop) {
    for (uint32_t p = next; p < stop; ++p) out[m++] = p;
  };
  for (size_t i = 0; i < n; ++i) {
    fill_until(positions[i]);
    next = positions[i] + 1;
  }
  fill_until(static_cast<uint32_t>(length));
  return m;
}

template <class Float>
void gather(const Float* x, const uint32_t* positions, size_t n, Float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = x[positions[i]];
}
template <class Float>
void scatter(const uint32_t* positions, const Float* x, size_t n, Float* out) {
  for (size_t i = 0; i < n; ++i) out[positions[i]] = x[i];
}
