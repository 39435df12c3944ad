// Tiles of an index set. Part of one stamp: see table-inl.h.

void gap_sums(const uint32_t* positions, size_t n, unsigned shift, uint64_t sums[3]) {
  uint32_t first = n == 0 ? 0 : positions[0] >> shift;
  uint32_t s0 = first;
  uint32_t s1 = first >> 1;
  uint32_t s2 = first >> 2;
  // All gaps together are less than the last position: 32 bits hold the sums.
  for (size_t i = 1; i < n; ++i) {
    const uint32_t gap = (positions[i] - positions[i - 1] - 1) >> shift;
    s0 += gap;
    s1 += gap >> 1;
    s2 += gap >> 2;
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
}

uint64_t narrow_positions(const int64_t* positions, size_t n, uint64_t start, uint32_t* out) {
  const auto from_start = [&](size_t i) { return static_cast<uint64_t>(positions[i]) - start; };
  uint64_t gaps = from_start(0);
  out[0] = static_cast<uint32_t>(from_start(0));
  for (size_t i = 1; i < n; ++i) {
    gaps |= from_start(i) - from_start(i - 1) - 1;
    out[i] = static_cast<uint32_t>(from_start(i));
  }
  return gaps;
}

// --- bit strings ---------------------------------------------------------------------------------

// Bits on their way to a string, a byte each: unlike a bit, a byte is stored without reading its
// neighbours first.
constexpr size_t kSpan = 2048;

// base + i for the first n bits i that are set. Where they are sparse, most vectors would hold few.
void find_ones(const uint8_t* bits, size_t n, uint32_t base, uint32_t* out,
               [[maybe_unused]] bool sparse = false) {
  uint32_t* const end = out + n;
#if defined(__AVX512BW__)
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(base)), iota);
  for (; !sparse && end - out >= 16; bits += 2, base += 16) {
    __mmask16 ones;
    memcpy(&ones, bits, 2);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(ones, all));
    all = _mm512_add_epi32(all, _mm512_set1_epi32(16));
    out += popcount(ones);
  }
#elif defined(__AVX2__)
  __m256i first = _mm256_set1_epi32(static_cast<int>(base));
  for (; !sparse && end - out >= 64; bits += 8, base += 64) {
    const uint64_t word = load64(bits);
    // Byte j counts the ones up to byte j.
    const uint64_t counts = ones_of_bytes(word) * 0x0101010101010101u;
    uint32_t* to = out;
    for (unsigned j = 0; j < 8; ++j) {
      const void* listed = kSetBits.of + (word >> 8 * j & 0xff);
      const __m128i ones = _mm_loadl_epi64(static_cast<const __m128i*>(listed));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm256_add_epi32(first, _mm256_cvtepu8_epi32(ones)));
      first = _mm256_add_epi32(first, _mm256_set1_epi32(8));
      to = out + (counts >> 8 * j & 0xff);
    }
    out = to;
  }
#endif
  // Where 64 are to come, the next word is all bit string.
  for (; end - out >= 64; bits += 8, base += 64) {
    for (uint64_t word = load64(bits); word != 0; word &= word - 1)
      *out++ = base + static_cast<uint32_t>(__builtin_ctzll(word));
  }
  for (; out != end; ++bits, base += 8) {
    for (unsigned ones = *bits; ones != 0 && out != end; ones &= ones - 1)
      *out++ = base + static_cast<uint32_t>(__builtin_ctz(ones));
  }
}

void pack_bitmap(const uint32_t* positions, size_t n, uint8_t* bits) {
  uint8_t span[kSpan];
  for (size_t i = 0; i < n;) {
    const size_t start = positions[i] / kSpan * kSpan;
    size_t last = 0;
    memset(span, 0, kSpan);
    for (; i < n && positions[i] - start < kSpan; ++i) {
      last = positions[i] - start;
      span[last] = 1;
    }
    pack_mask(span, i < n ? kSpan : last + 1, bits + start / 8);
  }
}

size_t unpack_bitmap(const uint8_t* bits, size_t length, uint32_t* positions) {
  size_t n = count_bits(bits, length / 8);
  if (length % 8 != 0)
    n += static_cast<size_t>(popcount(bits[length / 8] & ((1u << length % 8) - 1)));
  find_ones(bits, n, 0, positions, n < length / 16);
  return n;
}

size_t complement(const uint32_t* positions, size_t n, size_t length, uint32_t* out) {
  uint8_t span[kSpan];
  uint8_t bits[kSpan / 8];
  const uint32_t* const end = positions + n;
  for (size_t start = 0; start < length; start += kSpan) {
    const size_t size = length - start < kSpan ? length - start : kSpan;
    size_t others = size;
    memset(span, 1, kSpan);
    for (; positions != end && *positions - start < size; ++positions, --others)
      span[*positions - start] = 0;
    pack_mask(span, size, bits);
    find_ones(bits, others, static_cast<uint32_t>(start), out);
    out += others;
  }
  return length - n;
}

// --- Rice codes ----------------------------------------------------------------------------------

#if defined(__AVX2__)

__m128i shift_count(unsigned bits) { return _mm_cvtsi32_si128(static_cast<int>(bits)); }

// The gaps before the next eight positions; `last` holds the eight before, -1 at the start.
__m256i eight_gaps(const uint32_t* positions, __m256i& last) {
  const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions));
  const __m256i before = _mm256_alignr_epi8(here, _mm256_permute2x128_si256(last, here, 0x21), 12);
  last = here;
  return _mm256_add_epi32(_mm256_sub_epi32(here, before), _mm256_set1_epi32(-1));
}

uint64_t low_word(__m128i x) { return static_cast<uint64_t>(_mm_cvtsi128_si64(x)); }
uint64_t high_word(__m256i x) { return low_word(_mm256_extracti128_si256(x, 1)); }
uint64_t low_word(__m256i x) { return low_word(_mm256_castsi256_si128(x)); }

#endif

// Sets the ones of positions i to n, and returns the bit after the last; `next` is the bit after
// the one of position i - 1.
size_t set_ones(const uint32_t* positions, size_t i, size_t n, unsigned r, size_t next,
                uint8_t* unary) {
  for (; i < n; ++i, ++next) {
    next += (i == 0 ? positions[0] : positions[i] - positions[i - 1] - 1) >> r;
    unary[next / 8] = static_cast<uint8_t>(unary[next / 8] | 1u << next % 8);
  }
  return next;
}

void pack_unary(const uint32_t* positions, size_t n, unsigned r, uint8_t* unary,
                [[maybe_unused]] size_t unary_bytes) {
  size_t i = 0;
  size_t next = 0;
#if defined(__AVX2__)
  // Codes are joined to pairs, fours and eights. `pending` has the bits of the byte of bit `next`.
  const __m256i low = _mm256_set1_epi64x(0xffffffff);
  const __m256i one = _mm256_set1_epi64x(1);
  __m256i last = _mm256_set1_epi32(-1);
  uint64_t pending = 0;
  for (; i + 8 <= n && next / 8 + 8 <= unary_bytes; i += 8) {
    const __m256i zeros = _mm256_srl_epi32(eight_gaps(positions + i, last), shift_count(r));
    const __m256i first = _mm256_and_si256(zeros, low);
    const __m256i second =
        _mm256_add_epi64(_mm256_add_epi64(first, one), _mm256_srli_epi64(zeros, 32));
    const __m256i codes2 =
        _mm256_or_si256(_mm256_sllv_epi64(one, first), _mm256_sllv_epi64(one, second));
    const __m256i lengths2 = _mm256_add_epi64(second, one);
    const __m256i lengths4 = _mm256_add_epi64(lengths2, _mm256_bsrli_epi128(lengths2, 8));
    const __m256i codes4 =
        _mm256_or_si256(codes2, _mm256_sllv_epi64(_mm256_bsrli_epi128(codes2, 8), lengths2));
    const size_t length = low_word(lengths4) + high_word(lengths4);
    if (length > 56) {
      next = set_ones(positions, i, i + 8, r, next, unary);
      pending = next % 8 == 0 ? 0 : unary[next / 8];
      continue;
    }
    pending |= (low_word(codes4) | high_word(codes4) << low_word(lengths4)) << next % 8;
    store64(unary + next / 8, pending);
    const size_t bits = next % 8 + length;
    pending >>= bits & 56;
    next += length;
  }
#endif
  set_ones(positions, i, n, r, next, unary);
}

void pack_remainders(const uint32_t* positions, size_t n, unsigned r, uint8_t* remainders) {
  size_t i = 0;
#if defined(__AVX2__)
  // Eight fill r bytes. They are joined to pairs and fours, which a word must hold.
  const size_t bytes = (n * r + 7) / 8;
  const __m256i mask8 = _mm256_set1_epi32((1 << r) - 1);
  const __m256i mask4 = _mm256_set1_epi64x((1ll << (2 * r)) - 1);
  __m256i last = _mm256_set1_epi32(-1);
  for (size_t at = 0; r <= 15 && at + 16 <= bytes; i += 8, at += r) {
    const __m256i ones = _mm256_and_si256(eight_gaps(positions + i, last), mask8);
    const __m256i twos =
        _mm256_and_si256(_mm256_or_si256(ones, _mm256_srl_epi64(ones, shift_count(32 - r))), mask4);
    const __m256i fours =
        _mm256_or_si256(twos, _mm256_sll_epi64(_mm256_bsrli_epi128(twos, 8), shift_count(2 * r)));
    store64(remainders + at, low_word(fours) | high_word(fours) << (4 * r));
    store64(remainders + at + 8, high_word(fours) >> (64 - 4 * r));
  }
  remainders += i / 8 * r;
#endif
  const uint32_t mask = (1u << r) - 1;
  uint64_t pending = 0;
  unsigned filled = 0;
  uint32_t next = i == 0 ? 0 : positions[i - 1] + 1;
  for (; i < n; ++i) {
    pending |= static_cast<uint64_t>((positions[i] - next) & mask) << filled;
    next = positions[i] + 1;
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

void pack_rice(const uint32_t* positions, size_t n, unsigned r, uint8_t* remainders, uint8_t* unary,
               size_t unary_bytes) {
  pack_unary(positions, n, r, unary, unary_bytes);
  if (r > 0) pack_remainders(positions, n, r, remainders);
}

// Calls body(i, remainder i) for those from i to n; i is a multiple of 8.
template <class Body>
void for_each_remainder(const uint8_t* remainders, size_t i, size_t n, unsigned r, Body body) {
  const uint64_t mask = (uint64_t{1} << r) - 1;
  const size_t bytes = (n * r + 7) / 8;
  size_t bit = i * r;
  for (; i < n && bit / 8 + 8 <= bytes; ++i, bit += r)
    body(i, static_cast<uint32_t>((load64(remainders + bit / 8) >> (bit % 8)) & mask));
  uint64_t rest = 0;
  memcpy(&rest, remainders + bit / 8, bytes - bit / 8);
  for (rest >>= bit % 8; i < n; ++i, rest >>= r) body(i, static_cast<uint32_t>(rest & mask));
}

#if defined(__AVX2__)

// Calls body(i, remainders i to i + 8) for as many as vectors take, and returns how many.
template <class Body>
size_t for_each_eight(const uint8_t* remainders, size_t n, unsigned r, Body body) {
  if (r == 0 || r > 25) return 0;
  // Eight fill r bytes: four lie in the 16 bytes from the first one, four in those from byte r / 2.
  const size_t half = r / 2;
  const size_t reads = half + 16;
  const auto times = [](__m256i x, size_t y) {
    return _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(y)));
  };
  const __m256i bits = _mm256_sub_epi32(times(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), r),
                                        times(_mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0), 8 * half));
  const __m256i shifts = _mm256_and_si256(bits, _mm256_set1_epi32(7));
  const __m256i bytes = _mm256_add_epi32(times(_mm256_srli_epi32(bits, 3), 0x01010101),
                                         _mm256_set1_epi32(0x03020100));
  const __m256i mask = _mm256_set1_epi32((1 << r) - 1);
  const auto load = [&](const uint8_t* at) {
    const __m256i both = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(at + half),
                                             reinterpret_cast<const __m128i*>(at));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(both, bytes), shifts), mask);
  };
  size_t i = 0;
  size_t left = (n * r + 7) / 8;
  for (; left >= reads; i += 8, remainders += r, left -= r) body(i, load(remainders));
  uint8_t last[64] = {};
  memcpy(last, remainders, left);
  for (const uint8_t* at = last; i + 8 <= n; i += 8, at += r) body(i, load(at));
  return i;
}

// Inclusive sums of eight lanes.
__m256i scan(__m256i x) {
  x = _mm256_add_epi32(x, _mm256_slli_si256(x, 4));
  x = _mm256_add_epi32(x, _mm256_slli_si256(x, 8));
  const __m256i low_half = _mm256_permute2x128_si256(x, x, 0x08);
  return _mm256_add_epi32(x, _mm256_shuffle_epi32(low_half, 0xff));
}

#endif

void unpack_rice(const uint8_t* remainders, const uint8_t* unary, size_t n, unsigned r,
                 uint32_t* positions) {
  find_ones(unary, n, 0, positions);
  if (r == 0) return;
  // Position i is (bit of its one - i) << r, and i, and the remainders up to its own.
  const uint32_t one = (1u << r) - 1;
  uint32_t sum = one;
  size_t i = 0;
#if defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi32(static_cast<int>(one));
  __m256i sums = ones;
  i = for_each_eight(remainders, n, r, [&](size_t at, __m256i some) {
    __m256i* to = reinterpret_cast<__m256i*>(positions + at);
    const __m256i zeros = _mm256_sll_epi32(_mm256_loadu_si256(to), shift_count(r));
    const __m256i steps = scan(_mm256_sub_epi32(some, ones));
    _mm256_storeu_si256(to, _mm256_add_epi32(zeros, _mm256_add_epi32(sums, steps)));
    sums = _mm256_add_epi32(sums, _mm256_permutevar8x32_epi32(steps, _mm256_set1_epi32(7)));
  });
  sum = static_cast<uint32_t>(_mm256_cvtsi256_si32(sums));
#endif
  for_each_remainder(remainders, i, n, r, [&](size_t at, uint32_t remainder) {
    sum += remainder - one;
    positions[at] = (positions[at] << r) + sum;
  });
}

uint64_t sum_remainders(const uint8_t* remainders, size_t n, unsigned r) {
  uint64_t sum = 0;
  size_t i = 0;
#if defined(__AVX2__)
  __m256i sums = _mm256_setzero_si256();
  i = for_each_eight(remainders, n, r, [&](size_t, __m256i some) {
    const __m256i even = _mm256_and_si256(some, _mm256_set1_epi64x(0xffffffff));
    sums = _mm256_add_epi64(sums, _mm256_add_epi64(even, _mm256_srli_epi64(some, 32)));
  });
  uint64_t lanes[4];
  memcpy(lanes, &sums, sizeof(sums));
  sum = lanes[0] + lanes[1] + lanes[2] + lanes[3];
#endif
  for_each_remainder(remainders, i, n, r, [&](size_t, uint32_t remainder) { sum += remainder; });
  return sum;
}

template <class Float>
void gather(const Float* x, const uint32_t* positions, size_t n, Float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = x[positions[i]];
}
template <class Float>
void scatter(const uint32_t* positions, const Float* x, size_t n, Float* out) {
  // As for add_at.
  constexpr size_t kEarly = 64;
  size_t i = 0;
  for (; i + kEarly < n; ++i) {
    __builtin_prefetch(out + positions[i + kEarly], 1);
    out[positions[i]] = x[i];
  }
  for (; i < n; ++i) out[positions[i]] = x[i];
}
