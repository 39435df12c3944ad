// Vectors of keys for selection. Part of one stamp: see table-inl.h.

#if defined(__AVX512BW__)
#define FEDCODEC_LANES

template <class Float>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr size_t kCount = 16;
  static void sum(const float* a, const float* b, float* out) {
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
  }
  static __m512i keys(const float* x) {
    return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff));
  }
  static __m512i shift(__m512i keys, unsigned by) {
    return _mm512_srl_epi32(keys, _mm_cvtsi32_si128(static_cast<int>(by)));
  }
  static unsigned above(__m512i keys, uint32_t key) {
    return _mm512_cmpgt_epu32_mask(keys, _mm512_set1_epi32(static_cast<int>(key)));
  }
  static unsigned equal(__m512i keys, uint32_t key) {
    return _mm512_cmpeq_epu32_mask(keys, _mm512_set1_epi32(static_cast<int>(key)));
  }
  static void compress(unsigned keep, const float* x, uint32_t first, uint32_t* positions,
                       float* values) {
    const __mmask16 mask = static_cast<__mmask16>(keep);
    const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), iota);
    _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(mask, all));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(x)));
  }
  static void compress_pairs(unsigned keep, const uint32_t* at, const float* x, uint32_t* positions,
                             float* values) {
    const __mmask16 mask = static_cast<__mmask16>(keep);
    const __m512i kept = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(at));
    const __m512 found = _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(x));
    _mm512_storeu_si512(positions, kept);
    _mm512_storeu_ps(values, found);
  }
  static void compress_digits(unsigned keep, __m512i shifted, uint16_t* digits) {
    const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), shifted);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(digits),
        _mm512_cvtepi32_epi16(_mm512_and_si512(kept, _mm512_set1_epi32(kDigits - 1))));
  }
};

template <>
struct Lanes<double> {
  static constexpr size_t kCount = 8;
  static void sum(const double* a, const double* b, double* out) {
    _mm512_storeu_pd(out, _mm512_add_pd(_mm512_loadu_pd(a), _mm512_loadu_pd(b)));
  }
  static __m512i keys(const double* x) {
    return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi64(0x7fffffffffffffff));
  }
  static __m512i shift(__m512i keys, unsigned by) {
    return _mm512_srl_epi64(keys, _mm_cvtsi32_si128(static_cast<int>(by)));
  }
  static unsigned above(__m512i keys, uint64_t key) {
    return _mm512_cmpgt_epu64_mask(keys, _mm512_set1_epi64(static_cast<long long>(key)));
  }
  static unsigned equal(__m512i keys, uint64_t key) {
    return _mm512_cmpeq_epu64_mask(keys, _mm512_set1_epi64(static_cast<long long>(key)));
  }
  static void compress(unsigned keep, const double* x, uint32_t first, uint32_t* positions,
                       double* values) {
    const __mmask8 mask = static_cast<__mmask8>(keep);
    const __m256i all = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)),
                                         _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions),
                        _mm256_maskz_compress_epi32(mask, all));
    _mm512_storeu_pd(values, _mm512_maskz_compress_pd(mask, _mm512_loadu_pd(x)));
  }
  static void compress_pairs(unsigned keep, const uint32_t* at, const double* x,
                             uint32_t* positions, double* values) {
    const __mmask8 mask = static_cast<__mmask8>(keep);
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m512d found = _mm512_maskz_compress_pd(mask, _mm512_loadu_pd(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions),
                        _mm256_maskz_compress_epi32(mask, all));
    _mm512_storeu_pd(values, found);
  }
  static void compress_digits(unsigned keep, __m512i shifted, uint16_t* digits) {
    const __m512i kept = _mm512_maskz_compress_epi64(static_cast<__mmask8>(keep), shifted);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(digits),
                     _mm512_cvtepi64_epi16(_mm512_and_si512(kept, _mm512_set1_epi64(kDigits - 1))));
  }
};

#elif defined(__AVX2__)
#define FEDCODEC_LANES

// Entry m lists the set bits of m, a byte each.
struct SetBits {
  uint64_t of[256];
};
constexpr SetBits set_bits() {
  SetBits table = {};
  for (unsigned m = 0; m < 256; ++m) {
    unsigned found = 0;
    for (unsigned bit = 0; bit < 8; ++bit) {
      if ((m >> bit & 1) != 0) table.of[m] |= uint64_t{bit} << (8 * found++);
    }
  }
  return table;
}
constexpr SetBits kSetBits = set_bits();

template <class Float>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr size_t kCount = 8;
  static void sum(const float* a, const float* b, float* out) {
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b)));
  }
  static __m256i keys(const float* x) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                            _mm256_set1_epi32(0x7fffffff));
  }
  static __m256i shift(__m256i keys, unsigned by) {
    return _mm256_srl_epi32(keys, _mm_cvtsi32_si128(static_cast<int>(by)));
  }
  static unsigned above(__m256i keys, uint32_t key) {
    return bits(_mm256_cmpgt_epi32(keys, _mm256_set1_epi32(static_cast<int>(key))));
  }
  static unsigned equal(__m256i keys, uint32_t key) {
    return bits(_mm256_cmpeq_epi32(keys, _mm256_set1_epi32(static_cast<int>(key))));
  }
  static void compress(unsigned keep, const float* x, uint32_t first, uint32_t* positions,
                       float* values) {
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kSetBits.of[keep])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions),
                        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), lanes));
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), lanes));
  }
  static void compress_pairs(unsigned keep, const uint32_t* at, const float* x, uint32_t* positions,
                             float* values) {
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kSetBits.of[keep])));
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), lanes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions),
                        _mm256_permutevar8x32_epi32(all, lanes));
    _mm256_storeu_ps(values, found);
  }
  static void compress_digits(unsigned keep, __m256i shifted, uint16_t* digits) {
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kSetBits.of[keep])));
    const __m256i kept = _mm256_permutevar8x32_epi32(
        _mm256_and_si256(shifted, _mm256_set1_epi32(kDigits - 1)), lanes);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(digits),
        _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
  }

 private:
  static unsigned bits(__m256i mask) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  }
};

template <>
struct Lanes<double> {
  static constexpr size_t kCount = 4;
  static void sum(const double* a, const double* b, double* out) {
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_loadu_pd(a), _mm256_loadu_pd(b)));
  }
  static __m256i keys(const double* x) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                            _mm256_set1_epi64x(0x7fffffffffffffff));
  }
  static __m256i shift(__m256i keys, unsigned by) {
    return _mm256_srl_epi64(keys, _mm_cvtsi32_si128(static_cast<int>(by)));
  }
  static unsigned above(__m256i keys, uint64_t key) {
    return bits(_mm256_cmpgt_epi64(keys, _mm256_set1_epi64x(static_cast<long long>(key))));
  }
  static unsigned equal(__m256i keys, uint64_t key) {
    return bits(_mm256_cmpeq_epi64(keys, _mm256_set1_epi64x(static_cast<long long>(key))));
  }
  static void compress(unsigned keep, const double* x, uint32_t first, uint32_t* positions,
                       double* values) {
    for (; keep != 0; keep &= keep - 1) {
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(keep));
      *positions++ = first + lane;
      *values++ = x[lane];
    }
  }
  static void compress_pairs(unsigned keep, const uint32_t* at, const double* x,
                             uint32_t* positions, double* values) {
    for (; keep != 0; keep &= keep - 1) {
      *positions++ = at[__builtin_ctz(keep)];
      *values++ = x[__builtin_ctz(keep)];
    }
  }
  static void compress_digits(unsigned keep, __m256i shifted, uint16_t* digits) {
    alignas(32) uint64_t all[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), shifted);
    for (; keep != 0; keep &= keep - 1)
      *digits++ = static_cast<uint16_t>(all[__builtin_ctz(keep)] & (kDigits - 1));
  }

 private:
  static unsigned bits(__m256i mask) {
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(mask)));
  }
};

#endif
