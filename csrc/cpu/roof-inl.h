// What kernels are measured by. Part of one stamp: see table-inl.h.

// The compiler cuts it into the instruction set's own registers.
using Line = uint64_t __attribute__((vector_size(64), aligned(1), may_alias));
static_assert(sizeof(Line) == kLine);

struct Read {
  Line mixed[4] = {};

  void lines(const uint8_t* p, size_t n) {
    for (; n >= 4 * kLine; p += 4 * kLine, n -= 4 * kLine) {
      for (size_t i = 0; i < 4; ++i) {
        __builtin_prefetch(p + kAhead + i * kLine);
        mixed[i] ^= *reinterpret_cast<const Line*>(p + i * kLine);
      }
    }
    for (; n >= kLine; p += kLine, n -= kLine) mixed[0] ^= *reinterpret_cast<const Line*>(p);
    for (; n != 0; ++p, --n) mixed[0][0] ^= *p;
  }

  uint8_t all() const {
    uint64_t word = 0;
    for (const Line& line : mixed)
      for (size_t i = 0; i < kLine / sizeof(word); ++i) word ^= line[i];
    for (int half = 32; half >= 8; half /= 2) word ^= word >> half;
    return static_cast<uint8_t>(word);
  }
};

// Not zero: some processors elide stores of zeros.
template <Store store>
void write_lines(uint8_t* p, size_t n) {
  for (; n != 0 && reinterpret_cast<uintptr_t>(p) % kLine != 0; ++p, --n) *p = kRoofByte;
  for (; n >= kLine; p += kLine, n -= kLine) {
    if constexpr (store == Store::kPrefetched) __builtin_prefetch(p + kAhead, 1);
#if defined(__AVX512F__)
    if constexpr (store == Store::kStreamed) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_set1_epi8(kRoofByte));
      continue;
    }
#elif defined(__AVX2__)
    if constexpr (store == Store::kStreamed) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set1_epi8(kRoofByte));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, _mm256_set1_epi8(kRoofByte));
      continue;
    }
#endif
    *reinterpret_cast<Line*>(p) = Line{} + kRoofByte * 0x0101010101010101u;
  }
  for (; n != 0; ++p, --n) *p = kRoofByte;
}

// Where step s of `steps` of a stream ends: at a line of memory but for the last one.
size_t roof_cut(const uint8_t* p, size_t n, size_t s, size_t steps) {
  if (s == steps) return n;
  const size_t at = n / steps * s + n % steps * s / steps;
  const size_t past = (reinterpret_cast<uintptr_t>(p) + at) % kLine;
  return past < at ? at - past : 0;
}

template <Store store>
uint8_t roof_by(const uint8_t* a, size_t n_a, const uint8_t* b, size_t n_b, uint8_t* out,
                size_t n_out) {
  constexpr size_t kStep = 4096;
  size_t widest = n_a > n_b ? n_a : n_b;
  widest = widest > n_out ? widest : n_out;
  const size_t steps = widest / kStep + 1;
  Read read;
  size_t at_a = 0, at_b = 0, at_out = 0;
  for (size_t s = 1; s <= steps; ++s) {
    const size_t end_a = roof_cut(a, n_a, s, steps);
    const size_t end_b = roof_cut(b, n_b, s, steps);
    const size_t end_out = roof_cut(out, n_out, s, steps);
    read.lines(a + at_a, end_a - at_a);
    read.lines(b + at_b, end_b - at_b);
    write_lines<store>(out + at_out, end_out - at_out);
    at_a = end_a;
    at_b = end_b;
    at_out = end_out;
  }
#if defined(__AVX2__)
  if (store == Store::kStreamed) _mm_sfence();
#endif
  return read.all();
}

uint8_t roof(const uint8_t* a, size_t n_a, const uint8_t* b, size_t n_b, uint8_t* out, size_t n_out,
             Store store) {
  switch (store) {
    case Store::kPrefetched:
      return roof_by<Store::kPrefetched>(a, n_a, b, n_b, out, n_out);
    case Store::kStreamed:
      return roof_by<Store::kStreamed>(a, n_a, b, n_b, out, n_out);
    default:
      return roof_by<Store::kPlain>(a, n_a, b, n_b, out, n_out);
  }
}
