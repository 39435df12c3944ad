// Conversions between floating-point types, and differences. Part of one stamp: see table-inl.h.

void f16_to_f32(const uint16_t* x, size_t n, float* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    const size_t stop = start + length;
    size_t i = start;
#if defined(__F16C__)
    for (; i + 8 <= stop; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
    }
#endif
    for (; i < stop; ++i) out[i] = fedcodec::f16_to_f32(x[i]);
  });
}
void bf16_to_f32(const uint16_t* x, size_t n, float* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = fedcodec::bf16_to_f32(x[i]);
  });
}
void f64_to_f32(const double* x, size_t n, float* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = static_cast<float>(x[i]);
  });
}
void f32_to_f16(const float* x, size_t n, uint16_t* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    const size_t stop = start + length;
    size_t i = start;
#if defined(__F16C__)
    for (; i + 8 <= stop; i += 8) {
      const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
    }
#endif
    for (; i < stop; ++i) out[i] = fedcodec::f32_to_f16(x[i]);
  });
}
#if defined(__AVX2__) && !defined(__AVX512BW__)
// bfloat16 of eight values, each in a lane of 32 bits.
__m256i bf16_lanes(const float* x) {
  const __m256 value = _mm256_loadu_ps(x);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 either = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet),
                                         _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_castps_si256(either), 16);
}
#endif
void f32_to_bf16(const float* x, size_t n, uint16_t* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    const size_t stop = start + length;
    size_t i = start;
#if defined(__AVX2__) && !defined(__AVX512BW__)
    for (; i + 16 <= stop; i += 16) {
      const __m256i all = _mm256_packus_epi32(bf16_lanes(x + i), bf16_lanes(x + i + 8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(all, 0xd8));
    }
#endif
    for (; i < stop; ++i) out[i] = fedcodec::f32_to_bf16(x[i]);
  });
}
void f32_to_f64(const float* x, size_t n, double* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = static_cast<double>(x[i]);
  });
}
void f64_to_f16(const double* x, size_t n, uint16_t* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = fedcodec::f64_to_f16(x[i]);
  });
}
void f64_to_bf16(const double* x, size_t n, uint16_t* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = fedcodec::f64_to_bf16(x[i]);
  });
}

uint32_t max_key_u16(const uint16_t* x, size_t n) {
  int16_t largest = 0;
  for_each_stretch(x, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) {
      const int16_t key = static_cast<int16_t>(x[i] & 0x7fff);
      largest = key > largest ? key : largest;
    }
  });
  return static_cast<uint32_t>(largest);
}

void sum_f32(const float* a, const float* b, size_t n, float* out) {
  for_each_stretch(a, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = a[i] + b[i];
  });
}
void sum_f64(const double* a, const double* b, size_t n, double* out) {
  for_each_stretch(a, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = a[i] + b[i];
  });
}
void subtract_f32(const float* a, const float* b, size_t n, float* out) {
  for_each_stretch(a, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = a[i] - b[i];
  });
}
void subtract_f64(const double* a, const double* b, size_t n, double* out) {
  for_each_stretch(a, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = a[i] - b[i];
  });
}
