// Symmetric integers. Part of one stamp: see table-inl.h.

// From this length on, a run of values with one scale is worth a loop of its own.
constexpr size_t kLongRun = 32;
constexpr size_t kChunk = 256;

// Calls body(first value, how many, channel) for each run of values with one scale.
template <class Body>
void for_each_run(size_t n, Grid grid, Body body) {
  size_t channel = 0;
  size_t count = 0;
  for (size_t i = 0; i < n; i += count) {
    count = n - i < grid.inner ? n - i : grid.inner;
    body(i, count, channel);
    if (++channel == grid.channels) channel = 0;
  }
}

// Lays out the scale of each value, a chunk at a time.
class ScaleCursor {
 public:
  ScaleCursor(Grid grid, const float* scales) : grid_(grid), scales_(scales) {}

  void next(size_t n, float* each) {
    for (size_t i = 0; i < n;) {
      size_t count = n - i;
      if (grid_.inner == 1) {
        if (count > grid_.channels - channel_) count = grid_.channels - channel_;
        for (size_t j = 0; j < count; ++j) each[i + j] = scales_[channel_ + j];
        channel_ += count;
      } else {
        if (count > grid_.inner - used_) count = grid_.inner - used_;
        const float value = scales_[channel_];
        for (size_t j = 0; j < count; ++j) each[i + j] = value;
        used_ += count;
        if (used_ == grid_.inner) {
          used_ = 0;
          ++channel_;
        }
      }
      if (channel_ == grid_.channels) channel_ = 0;
      i += count;
    }
  }

 private:
  Grid grid_;
  const float* scales_;
  size_t channel_ = 0;
  size_t used_ = 0;
};

// Calls body(first value, how many, scale of each) for chunks of values.
template <class Body>
void for_each_chunk(size_t n, Grid grid, const float* scales, Body body) {
  ScaleCursor cursor(grid, scales);
  float each[kChunk];
  for (size_t i = 0; i < n; i += kChunk) {
    const size_t count = n - i < kChunk ? n - i : kChunk;
    cursor.next(count, each);
    body(i, count, each);
  }
}

// Calls body(first value, how many, inverse scale of each) likewise.
template <class Body>
void for_each_inverse_chunk(size_t n, Grid grid, const float* scales, Body body) {
  constexpr size_t kFew = 4096;
  float inverses[kFew];
  if (grid.channels > kFew) {
    for_each_chunk(n, grid, scales, [&](size_t i, size_t count, const float* each) {
      for (size_t j = 0; j < count; ++j) inverses[j] = inverse_of_scale(each[j]);
      body(i, count, inverses);
    });
    return;
  }
  for (size_t c = 0; c < grid.channels; ++c) inverses[c] = inverse_of_scale(scales[c]);
  for_each_chunk(n, grid, inverses, body);
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
// Four times eight integers as bytes.
__m256i in_order(__m256i a, __m256i b, __m256i c, __m256i d) {
  // The packs work within halves; this puts their four-byte pieces in order.
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(halves, order);
}
#endif

void quantize_run(const float* x, size_t n, float inverse, int8_t* codes) {
  size_t i = 0;
#if defined(__AVX512BW__)
  const __m512 factor = _mm512_set1_ps(inverse);
  for (; i + 16 <= n; i += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(q));
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  const auto eight = [&](size_t at) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + at), factor));
  };
  for (; i + 32 <= n; i += 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                        in_order(eight(i), eight(i + 8), eight(i + 16), eight(i + 24)));
  }
#endif
  for (; i < n; ++i) codes[i] = fedcodec::quantize_nearest(x[i], inverse);
}

// The same, rounded up where a word is below the rest above the floor.
void quantize_run(const float* x, const uint32_t* words, size_t n, float inverse, int levels,
                  int8_t* codes) {
  size_t i = 0;
  // Words and rests are compared as multiples of 2^-24, which changes neither.
#if defined(__AVX512BW__)
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m128i most = _mm_set1_epi8(static_cast<char>(levels));
  const __m128i least = _mm_set1_epi8(static_cast<char>(-levels));
  for (; i + 16 <= n; i += 16) {
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
    const __m512 floor = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(y, floor), _mm512_set1_ps(0x1p24f));
    const __m512i word = _mm512_srli_epi32(_mm512_loadu_si512(words + i), 8);
    const __mmask16 up = _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(word), rest, _CMP_LT_OQ);
    const __m512i q = _mm512_cvtps_epi32(floor);
    const __m128i eight =
        _mm512_cvtsepi32_epi8(_mm512_mask_add_epi32(q, up, q, _mm512_set1_epi32(1)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i),
                     _mm_max_epi8(_mm_min_epi8(eight, most), least));
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i most = _mm256_set1_epi8(static_cast<char>(levels));
  const __m256i least = _mm256_set1_epi8(static_cast<char>(-levels));
  const auto eight = [&](size_t at) {
    const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + at), factor);
    const __m256 floor = _mm256_floor_ps(y);
    const __m256 rest = _mm256_mul_ps(_mm256_sub_ps(y, floor), _mm256_set1_ps(0x1p24f));
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + at));
    const __m256 word = _mm256_cvtepi32_ps(_mm256_srli_epi32(all, 8));
    const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(word, rest, _CMP_LT_OQ));
    return _mm256_sub_epi32(_mm256_cvtps_epi32(floor), up);
  };
  for (; i + 32 <= n; i += 32) {
    const __m256i q = in_order(eight(i), eight(i + 8), eight(i + 16), eight(i + 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                        _mm256_max_epi8(_mm256_min_epi8(q, most), least));
  }
#endif
  for (; i < n; ++i) codes[i] = fedcodec::quantize_stochastic(x[i], inverse, words[i], levels);
}

// Functions, since codes may alias what a lambda refers to, which would keep these loops from
// vectorising.
void quantize_each(const float* x, const float* inverses, size_t n, int8_t* codes) {
  for (size_t i = 0; i < n; ++i) codes[i] = fedcodec::quantize_nearest(x[i], inverses[i]);
}
void quantize_each(const float* x, const float* inverses, const uint32_t* words, size_t n,
                   int levels, int8_t* codes) {
  for (size_t i = 0; i < n; ++i)
    codes[i] = fedcodec::quantize_stochastic(x[i], inverses[i], words[i], levels);
}

void channel_keys(const float* x, size_t n, Grid grid, uint32_t* keys) {
  const auto raise = [keys](size_t channel, uint32_t key) {
    keys[channel] = key > keys[channel] ? key : keys[channel];
  };
  if (grid.inner == 1) {
    for (size_t row = 0; row < n; row += grid.channels) {
      const size_t count = n - row < grid.channels ? n - row : grid.channels;
      for (size_t j = 0; j < count; ++j) raise(j, key_of(x[row + j]));
    }
    return;
  }
  for_each_run(n, grid, [&](size_t i, size_t count, size_t channel) {
    raise(channel, max_key_f32(x + i, count));
  });
}

void scales_from_keys(const uint32_t* keys, size_t n, int levels, float* scales) {
  for (size_t i = 0; i < n; ++i) scales[i] = scale_from_key(keys[i], levels);
}

void quantize_nearest(const float* x, size_t n, Grid grid, int, const float* scales,
                      int8_t* codes) {
  if (grid.inner >= kLongRun) {
    for_each_run(n, grid, [&](size_t i, size_t count, size_t channel) {
      quantize_run(x + i, count, inverse_of_scale(scales[channel]), codes + i);
    });
    return;
  }
  for_each_inverse_chunk(n, grid, scales, [&](size_t i, size_t count, const float* inverse) {
    quantize_each(x + i, inverse, count, codes + i);
  });
}

void quantize_stochastic(const float* x, size_t n, Grid grid, int levels, const float* scales,
                         Draw draw, int8_t* codes) {
  uint32_t words[kChunk];
  const auto draw_words = [&](size_t i, size_t count) {
    ask_to_read(x + i, count * sizeof(float));
    ask_to_write(codes + i, count);
    random_words({draw.codec_seed, draw.call_seed, draw.first + i}, count, words);
  };
  if (grid.inner >= kLongRun) {
    for_each_run(n, grid, [&](size_t i, size_t count, size_t channel) {
      const float inverse = inverse_of_scale(scales[channel]);
      const size_t stop = i + count;
      for (size_t length = 0; i < stop; i += length) {
        const size_t used = i % kChunk;
        if (used == 0) draw_words(i, n - i < kChunk ? n - i : kChunk);
        length = stop - i < kChunk - used ? stop - i : kChunk - used;
        quantize_run(x + i, words + used, length, inverse, levels, codes + i);
      }
    });
    return;
  }
  for_each_inverse_chunk(n, grid, scales, [&](size_t i, size_t count, const float* inverse) {
    draw_words(i, count);
    quantize_each(x + i, inverse, words, count, levels, codes + i);
  });
}

uint32_t quantize_blocks(const float* x, size_t n, size_t block, int levels, const Draw* draw,
                         float* scales, int8_t* codes) {
  // Words are drawn for as many short blocks as stay in cache.
  constexpr size_t kCached = 4096;
  const size_t stretch = draw == nullptr || block > kCached ? block : kCached / block * block;
  uint32_t largest = 0;
  size_t count = 0;
  for (size_t i = 0; i < n; i += count) {
    count = n - i < stretch ? n - i : stretch;
    ask_to_write(codes + i, count < kCached ? count : kCached);
    const float* const first = scales;
    for (size_t at = 0, length = 0; at < count; at += length) {
      length = count - at < block ? count - at : block;
      const uint32_t key = max_key_f32(x + i + at, length);
      largest = key > largest ? key : largest;
      *scales++ = scale_from_key(key, levels);
    }
    if (draw == nullptr) {
      quantize_run(x + i, count, inverse_of_scale(*first), codes + i);
    } else {
      const Draw from = {draw->codec_seed, draw->call_seed, draw->first + i};
      const Grid grid = {block, static_cast<size_t>(scales - first)};
      quantize_stochastic(x + i, count, grid, levels, first, from, codes + i);
    }
  }
  return largest;
}

void dequantize_run(const int8_t* codes, size_t n, int levels, float scale, float* out) {
  for_each_stretch(codes, out, n, [&](size_t start, size_t length) {
    for (size_t i = start; i < start + length; ++i)
      out[i] = fedcodec::dequantize(codes[i], levels, scale);
  });
}

void dequantize(const int8_t* codes, size_t n, Grid grid, int levels, const float* scales,
                float* out) {
  if (grid.inner >= kLongRun) {
    for_each_run(n, grid, [&](size_t i, size_t count, size_t channel) {
      dequantize_run(codes + i, count, levels, scales[channel], out + i);
    });
    return;
  }
  for_each_chunk(n, grid, scales, [&](size_t i, size_t count, const float* scale) {
    for (size_t j = 0; j < count; ++j)
      out[i + j] = fedcodec::dequantize(codes[i + j], levels, scale[j]);
  });
}

void pack_codes(const int8_t* codes, size_t n, unsigned bits, uint8_t* packed) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
  const size_t whole = n / 8;
  const size_t reach = (8 + bits - 1) / bits;
  size_t g = 0;
  // A group's store reaches into the next ones' bytes, which are written after it.
  for (; g + reach <= whole; ++g)
    store64(packed + g * bits, join_codes(load64(bytes + 8 * g), bits));
  for (; g < whole; ++g) {
    const uint64_t joined = join_codes(load64(bytes + 8 * g), bits);
    memcpy(packed + g * bits, &joined, bits);
  }
  if (n % 8 != 0) {
    uint64_t last = 0;
    memcpy(&last, bytes + 8 * whole, n % 8);
    last = join_codes(last, bits);
    memcpy(packed + whole * bits, &last, (n % 8 * bits + 7) / 8);
  }
}

void unpack_codes(const uint8_t* packed, size_t n, unsigned bits, int8_t* codes) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
  const size_t whole = n / 8;
  const size_t reach = (8 + bits - 1) / bits;
  size_t g = 0;
  for (; g + reach <= whole; ++g)
    store64(bytes + 8 * g, split_codes(load64(packed + g * bits), bits));
  for (; g < whole; ++g) {
    uint64_t joined = 0;
    memcpy(&joined, packed + g * bits, bits);
    store64(bytes + 8 * g, split_codes(joined, bits));
  }
  if (n % 8 != 0) {
    uint64_t last = 0;
    memcpy(&last, packed + whole * bits, (n % 8 * bits + 7) / 8);
    last = split_codes(last, bits);
    memcpy(bytes + 8 * whole, &last, n % 8);
  }
}
