// Signs and their one magnitude. Part of one stamp: see table-inl.h.

void pack_signs(const float* x, size_t n, uint8_t* bits) {
  const size_t whole = n / 8;
  size_t done = 0;
#if defined(__AVX512BW__)
  for (; done + 2 <= whole; done += 2) {
    const __mmask16 negative =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(x + 8 * done), _mm512_setzero_ps(), _CMP_LT_OQ);
    memcpy(bits + done, &negative, 2);
  }
#elif defined(__AVX2__)
  for (; done < whole; ++done) {
    const __m256 negative =
        _mm256_cmp_ps(_mm256_loadu_ps(x + 8 * done), _mm256_setzero_ps(), _CMP_LT_OQ);
    bits[done] = static_cast<uint8_t>(_mm256_movemask_ps(negative));
  }
#endif
  for (size_t i = done; i < whole; ++i) {
    unsigned byte = 0;
    for (unsigned j = 0; j < 8; ++j) byte |= static_cast<unsigned>(x[8 * i + j] < 0.0f) << j;
    bits[i] = static_cast<uint8_t>(byte);
  }
  if (n % 8 != 0) {
    unsigned byte = 0;
    for (size_t i = 8 * whole; i < n; ++i) byte |= static_cast<unsigned>(x[i] < 0.0f) << (i % 8);
    bits[whole] = static_cast<uint8_t>(byte);
  }
}

void unpack_signs(const uint8_t* bits, size_t n, float magnitude, float* out) {
  const uint32_t plus = bit_cast<uint32_t>(magnitude);
  const auto signed_by = [plus](unsigned byte, unsigned bit) {
    return bit_cast<float>(plus ^ ((byte & bit) != 0 ? 0x80000000u : 0u));
  };
  const size_t whole = n / 8;
  size_t done = 0;
#if defined(__AVX512BW__)
  for (; done + 2 <= whole; done += 2) {
    __mmask16 negative;
    memcpy(&negative, bits + done, 2);
    const __m512 values =
        _mm512_mask_blend_ps(negative, _mm512_set1_ps(magnitude), _mm512_set1_ps(-magnitude));
    ask_to_write(out + 8 * done, sizeof(values));
    _mm512_storeu_ps(out + 8 * done, values);
  }
#elif defined(__AVX2__)
  for (; done < whole; ++done) {
    const __m256 sign =
        _mm256_and_ps(_mm256_castsi256_ps(spread_bits(bits[done])), _mm256_set1_ps(-0.0f));
    ask_to_write(out + 8 * done, sizeof(sign));
    _mm256_storeu_ps(out + 8 * done, _mm256_xor_ps(_mm256_set1_ps(magnitude), sign));
  }
#endif
  for (size_t i = done; i < whole; ++i) {
    const unsigned byte = bits[i];
    for (size_t j = 0; j < 8; ++j) out[8 * i + j] = signed_by(byte, 1u << j);
  }
  for (size_t i = 8 * whole; i < n; ++i) out[i] = signed_by(bits[whole], 1u << (i % 8));
}

uint64_t magnitude_sum(const float* x, size_t n, int exponent) {
  const double factor = power_of_two(31 - exponent);
  uint64_t sum = 0;
  for_each_stretch(x, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i) sum += scaled_magnitude(x[i], factor);
  });
  return sum;
}
