// Counter-based random words and positions. Part of one stamp: see table-inl.h.

constexpr size_t kLanes = 64;

#if defined(__AVX2__)

// A counter word in each 64-bit lane: the 32 x 32 -> 64 bit product needs no shuffling then, and
// ignores what its upper halves hold.
#if defined(__AVX512BW__)
struct Wide {
  static constexpr size_t kBlocks = 8;
  using V = __m512i;
  static V all(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static V count() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
  static V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static V multiply(V a, V b) { return _mm512_mul_epu32(a, b); }
  static V upper(V a) { return _mm512_srli_epi64(a, 32); }
  static uint64_t keys(uint32_t now, uint32_t) { return now; }
  // c = upper half of the product ^ before ^ key; before = product.
  template <bool even>
  static void step(V product, V key, V& c, V& before) {
    c = _mm512_ternarylogic_epi64(upper(product), before, key, 0x96);
    before = product;
  }
  static void store(V c0, V c1, V c2, V c3, uint32_t* words) {
    const V even = _mm512_mask_shuffle_epi32(c0, 0xaaaa, c1, _MM_PERM_CCAA);
    const V odd = _mm512_mask_shuffle_epi32(c2, 0xaaaa, c3, _MM_PERM_CCAA);
    _mm512_storeu_si512(words, _mm512_unpacklo_epi64(even, odd));
    _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(even, odd));
  }
};
#else
struct Wide {
  static constexpr size_t kBlocks = 4;
  using V = __m256i;
  static V all(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static V count() { return _mm256_set_epi64x(3, 1, 2, 0); }
  static V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static V multiply(V a, V b) { return _mm256_mul_epu32(a, b); }
  static V upper(V a) { return _mm256_srli_epi64(a, 32); }
  static uint64_t keys(uint32_t now, uint32_t next) { return uint64_t{now} << 32 | next; }
  // In even rounds one operation brings in the key, and the next round's to where that one looks.
  template <bool even>
  static void step(V product, V both_keys, V& c, V& before) {
    if constexpr (even) product = _mm256_xor_si256(product, both_keys);
    c = _mm256_xor_si256(upper(product), before);
    before = product;
  }
  static void store(V c0, V c1, V c2, V c3, uint32_t* words) {
    constexpr int kEven = _MM_SHUFFLE(2, 0, 2, 0);
    const __m256 first = _mm256_shuffle_ps(_mm256_castsi256_ps(c0), _mm256_castsi256_ps(c1), kEven);
    const __m256 last = _mm256_shuffle_ps(_mm256_castsi256_ps(c2), _mm256_castsi256_ps(c3), kEven);
    _mm256_storeu_ps(reinterpret_cast<float*>(words), _mm256_shuffle_ps(first, last, kEven));
    _mm256_storeu_ps(reinterpret_cast<float*>(words + 8),
                     _mm256_shuffle_ps(first, last, _MM_SHUFFLE(3, 1, 3, 1)));
  }
};
#endif

// The words of kLanes counters, right as far as their upper halves are the first one's.
void philox_lanes(uint64_t key, uint64_t first_block, uint64_t call_seed, uint32_t* words) {
  using V = Wide::V;
  constexpr size_t kChains = 4;  // independent ones hide the product's latency
  V k0[kPhiloxRounds];
  V k1[kPhiloxRounds];
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t low = static_cast<uint32_t>(key) + round * kPhiloxStep0;
    const uint32_t high = static_cast<uint32_t>(key >> 32) + round * kPhiloxStep1;
    k0[round] = Wide::all(Wide::keys(low, low + kPhiloxStep0));
    k1[round] = Wide::all(Wide::keys(high, high + kPhiloxStep1));
  }
  const V m0 = Wide::all(0xd2511f53u);
  const V m1 = Wide::all(0xcd9e8d57u);
  for (size_t l = 0; l < kLanes; l += kChains * Wide::kBlocks) {
    V c0[kChains];
    V c1[kChains];
    V c2[kChains];
    V c3[kChains];
    for (size_t i = 0; i < kChains; ++i) {
      c0[i] = Wide::add(Wide::add(Wide::all(first_block + l), Wide::count()),
                        Wide::all(i * Wide::kBlocks));
      c1[i] = Wide::all(first_block >> 32);  // one for all: half of two rounds is done once
      c2[i] = Wide::all(call_seed);
      c3[i] = Wide::all(call_seed >> 32);
    }
    for (int round = 0; round < kPhiloxRounds; round += 2) {
      for (size_t i = 0; i < kChains; ++i) {
        const V p0 = Wide::multiply(c0[i], m0);
        const V p1 = Wide::multiply(c2[i], m1);
        Wide::step<true>(p1, k0[round], c0[i], c1[i]);
        Wide::step<true>(p0, k1[round], c2[i], c3[i]);
      }
      for (size_t i = 0; i < kChains; ++i) {
        const V p0 = Wide::multiply(c0[i], m0);
        const V p1 = Wide::multiply(c2[i], m1);
        Wide::step<false>(p1, k0[round + 1], c0[i], c1[i]);
        Wide::step<false>(p0, k1[round + 1], c2[i], c3[i]);
      }
    }
    for (size_t i = 0; i < kChains; ++i) {
      Wide::store(c0[i], c1[i], c2[i], c3[i], words + 4 * (l + i * Wide::kBlocks));
    }
  }
}

#else

// philox() of kLanes counters side by side, so that it vectorises.
void philox_lanes(uint64_t key, uint64_t first_block, uint64_t call_seed, uint32_t* words) {
  uint32_t c0[kLanes];
  uint32_t c1[kLanes];
  uint32_t c2[kLanes];
  uint32_t c3[kLanes];
  for (size_t l = 0; l < kLanes; ++l) {
    c0[l] = static_cast<uint32_t>(first_block + l);
    c1[l] = static_cast<uint32_t>((first_block + l) >> 32);
    c2[l] = static_cast<uint32_t>(call_seed);
    c3[l] = static_cast<uint32_t>(call_seed >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (size_t l = 0; l < kLanes; ++l) philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  for (size_t l = 0; l < kLanes; ++l) {
    words[4 * l] = c0[l];
    words[4 * l + 1] = c1[l];
    words[4 * l + 2] = c2[l];
    words[4 * l + 3] = c3[l];
  }
}

#endif

void random_words(Draw draw, size_t n, uint32_t* words) {
  // Cut where the counters' upper half changes: philox_lanes takes it for one.
  constexpr uint64_t kOneUpperHalf = uint64_t{4} << 32;
  const uint64_t left = kOneUpperHalf - draw.first % kOneUpperHalf;
  if (n > left) {
    random_words(draw, left, words);
    random_words({draw.codec_seed, draw.call_seed, draw.first + left}, n - left, words + left);
    return;
  }
  size_t i = 0;
  const auto partial = [&] {
    const Words block = philox(draw.codec_seed, (draw.first + i) >> 2, draw.call_seed);
    unsigned j = static_cast<unsigned>((draw.first + i) & 3);
    for (; j < 4 && i < n; ++j) words[i++] = block.word[j];
  };
  if ((draw.first & 3) != 0) partial();
  for (; n - i >= 4 * kLanes; i += 4 * kLanes) {
    philox_lanes(draw.codec_seed, (draw.first + i) >> 2, draw.call_seed, words + i);
  }
  if (n - i > kLanes / 2) {
    uint32_t last[4 * kLanes];
    philox_lanes(draw.codec_seed, (draw.first + i) >> 2, draw.call_seed, last);
    memcpy(words + i, last, (n - i) * sizeof(uint32_t));
    return;
  }
  while (i < n) partial();
}

void random_positions(uint64_t seed, uint64_t n, uint64_t first, uint64_t k, uint64_t* positions) {
  const Permutation p = permutation(seed, n);
  constexpr size_t kChunk = 256;
  uint64_t x[kChunk];
  uint16_t slot[kChunk];
  for (uint64_t start = 0; start < k; start += kChunk) {
    const size_t length = k - start < kChunk ? static_cast<size_t>(k - start) : kChunk;
    for (size_t i = 0; i < length; ++i) {
      x[i] = first + start + i;
      slot[i] = static_cast<uint16_t>(i);
    }
    // All walk one pass together; those still outside [0, n) walk on.
    for (size_t walking = length; walking != 0;) {
      for (size_t i = 0; i < walking; ++i) x[i] = permutation_pass(p, x[i]);
      size_t still = 0;
      for (size_t i = 0; i < walking; ++i) {
        positions[start + slot[i]] = x[i];
        const bool outside = x[i] >= n;
        x[still] = x[i];
        slot[still] = slot[i];
        still += static_cast<size_t>(outside);
      }
      walking = still;
    }
  }
}
