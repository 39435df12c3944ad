// Conversions between floating-point types, and differences. Part of one stamp: see table-inl.h.

void f16_to_f32(const uint16_t* x, size_t n, float* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = fedcodec::f16_to_f32(x[i]);
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
void f32_to_bf16(const float* x, size_t n, uint16_t* out) {
  for_each_stretch(x, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) out[i] = fedcodec::f32_to_bf16(x[i]);
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
