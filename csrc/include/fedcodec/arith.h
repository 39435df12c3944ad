// What is done to one element, for every CPU instruction set and for CUDA: docs/numerics.md, to the
// bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Internal linkage on the host: a weak copy out of an AVX object could end up in code for any
// processor.
#if defined(__CUDACC__)
#define FEDCODEC_HD static __host__ __device__ __forceinline__
#else
#define FEDCODEC_HD static inline __attribute__((always_inline))
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "bit strings are read and written as little-endian words");

namespace fedcodec {

template <class To, class From>
FEDCODEC_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// --- keys ----------------------------------------------------------------------------------------

constexpr uint32_t kInfinityKey32 = 0x7f800000;
constexpr uint64_t kInfinityKey64 = 0x7ff0000000000000;

FEDCODEC_HD uint32_t key_of(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
FEDCODEC_HD uint64_t key_of(double x) { return bit_cast<uint64_t>(x) & 0x7fffffffffffffffu; }
FEDCODEC_HD float magnitude_of(uint32_t key) { return bit_cast<float>(key); }
FEDCODEC_HD double magnitude_of(uint64_t key) { return bit_cast<double>(key); }

// e with 2^e <= magnitude < 2^(e + 1); the key is finite and not 0.
FEDCODEC_HD int exponent_of(uint32_t key) {
  if (key >= 0x00800000u) return static_cast<int>(key >> 23) - 127;
  int e = -149;
  while (key >>= 1) ++e;
  return e;
}

// --- exact steps between floating-point and integer ----------------------------------------------

// 1.5 * 2^23: adding it rounds |y| < 2^22 to integer, half to even, and leaves the integer in the
// low bits.
constexpr float kRound32 = 12582912.0f;
constexpr int32_t kRound32Bits = 0x4b400000;
// 2^52: the same for 0 <= y < 2^52.
constexpr double kRound64 = 4503599627370496.0;
constexpr uint64_t kRound64Mask = 0x000fffffffffffffu;

FEDCODEC_HD int32_t round_even(float y) { return bit_cast<int32_t>(y + kRound32) - kRound32Bits; }

// Exact for exponents from -1022 to 1023.
FEDCODEC_HD double power_of_two(int exponent) {
  return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// a / b rounded toward zero, for a >= 0 and b > 0.
FEDCODEC_HD float divide_toward_zero(float a, float b) {
  const float r = a / b;
  const bool above = static_cast<double>(r) * static_cast<double>(b) > static_cast<double>(a);
  return bit_cast<float>(bit_cast<uint32_t>(r) - static_cast<uint32_t>(above));
}

// --- symmetric integers --------------------------------------------------------------------------

constexpr uint32_t kLeastScaleKey = 0x00800000;  // 2^-126

// Branch-free so that loops over scales vectorise.
FEDCODEC_HD float scale_from_key(uint32_t key, int levels) {
  const uint32_t quotient =
      bit_cast<uint32_t>(divide_toward_zero(magnitude_of(key), static_cast<float>(levels)));
  const uint32_t scale = quotient < kLeastScaleKey ? kLeastScaleKey : quotient;
  return bit_cast<float>(key == 0 ? 0u : scale);
}

FEDCODEC_HD float inverse_of_scale(float scale) {
  const bool zero = scale == 0.0f;
  const float inverse = divide_toward_zero(1.0f, zero ? 1.0f : scale);
  return zero ? 0.0f : inverse;
}

FEDCODEC_HD int8_t quantize_nearest(float x, float inverse) {
  return static_cast<int8_t>(round_even(x * inverse));
}

FEDCODEC_HD int8_t quantize_stochastic(float x, float inverse, uint32_t word, int levels) {
  const float y = x * inverse;
  const int32_t nearest = round_even(y);
  int32_t q = nearest - static_cast<int32_t>(static_cast<float>(nearest) > y);
  const float u = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
  q += static_cast<int32_t>(u < y - static_cast<float>(q));
  q = q > levels ? levels : q;
  q = q < -levels ? -levels : q;
  return static_cast<int8_t>(q);
}

FEDCODEC_HD float dequantize(int8_t code, int levels, float scale) {
  const int q = code < -levels ? -levels : code;
  return static_cast<float>(q) * scale;
}

// --- sign and magnitude --------------------------------------------------------------------------

// |x| * factor rounded to integer; factor = 2^(places - exponent) with |x| < 2^(exponent + 1) and
// places from 0 to 31.
template <class Float>
FEDCODEC_HD uint64_t scaled_magnitude(Float x, double factor) {
  const double scaled = static_cast<double>(magnitude_of(key_of(x))) * factor;
  return bit_cast<uint64_t>(scaled + kRound64) & kRound64Mask;
}

// The mean of `count` > 0 magnitudes from the sum of their scaled ones.
FEDCODEC_HD float mean_magnitude(uint64_t sum, uint64_t count, int exponent) {
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(count) *
                            power_of_two(exponent - 31));
}

// --- norms of channels ---------------------------------------------------------------------------

// What |x| is multiplied by, for channels of so many elements and the largest magnitude of all, so
// that their sums (order 1) or sums of squares (order 2) are at most 2^63.
FEDCODEC_HD double norm_factor(double largest, uint64_t elements, int order) {
  constexpr int kLeastExponent = -990;  // of which the factor is finite
  const int e = static_cast<int>(key_of(largest) >> 52) - 1023;
  int length = 0;
  while (length < 62 && (1ull << length) < elements) ++length;
  const int most = 62 - length < 31 ? 62 - length : 31;
  const int places = order == 1 ? most : (61 - length) / 2;
  return power_of_two(places - (e < kLeastExponent ? kLeastExponent : e));
}

// --- conversions, nearest even -------------------------------------------------------------------

FEDCODEC_HD float f16_to_f32(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  // 2^112 moves float16's exponent bias to float32's; subnormals become normal on the way.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
  return bit_cast<float>(sign | scaled | special | quiet);
}

FEDCODEC_HD uint16_t f32_to_f16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t key = bits & 0x7fffffffu;
  // Below 2^-14 the sum's last place is float16's least step: the addition rounds to it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(key) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (key + 0xfffu + ((key >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t nan = 0x7e00u | ((key >> 13) & 0x3ffu);
  uint32_t h = key < 0x38800000u ? subnormal : normal;
  h = key >= 0x477ff000u ? 0x7c00u : h;
  h = key > kInfinityKey32 ? nan : h;
  return static_cast<uint16_t>(h | ((bits >> 16) & 0x8000u));
}

FEDCODEC_HD float bf16_to_f32(uint16_t x) {
  return bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

FEDCODEC_HD uint16_t f32_to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfinityKey32 ? nan : rounded);
}

// From float64 in one step: through float32 would round twice.
FEDCODEC_HD uint16_t f64_to_f16(double x) {
  const uint64_t key = key_of(x);
  const uint64_t subnormal =
      bit_cast<uint64_t>(magnitude_of(key) + 0x1p28) - bit_cast<uint64_t>(0x1p28);
  const uint64_t normal =
      (key + 0x1ffffffffffu + ((key >> 42) & 1u) - (uint64_t{1008} << 52)) >> 42;
  uint64_t h = key < bit_cast<uint64_t>(0x1p-14) ? subnormal : normal;
  h = key >= bit_cast<uint64_t>(65520.0) ? 0x7c00u : h;
  h = key > kInfinityKey64 ? 0x7e00u | ((key >> 42) & 0x3ffu) : h;
  return static_cast<uint16_t>(h | ((bit_cast<uint64_t>(x) >> 48) & 0x8000u));
}

FEDCODEC_HD uint16_t f64_to_bf16(double x) {
  const uint64_t key = key_of(x);
  const uint64_t subnormal =
      bit_cast<uint64_t>(magnitude_of(key) + 0x1p-81) - bit_cast<uint64_t>(0x1p-81);
  const uint64_t normal = (key + 0xfffffffffffu + ((key >> 45) & 1u) - (uint64_t{896} << 52)) >> 45;
  uint64_t h = key < bit_cast<uint64_t>(0x1p-126) ? subnormal : normal;
  h = key >= bit_cast<uint64_t>(0x1.ffp127) ? 0x7f80u : h;
  h = key > kInfinityKey64 ? 0x7fc0u | ((key >> 45) & 0x7fu) : h;
  return static_cast<uint16_t>(h | ((bit_cast<uint64_t>(x) >> 48) & 0x8000u));
}

// --- random words: Philox4x32-10 -----------------------------------------------------------------

struct Words {
  uint32_t word[4];
};

FEDCODEC_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                              uint32_t k1) {
  const uint64_t p0 = 0xd2511f53ull * c0;
  const uint64_t p1 = 0xcd9e8d57ull * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(p1);
  c3 = static_cast<uint32_t>(p0);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxStep0 = 0x9e3779b9u;
constexpr uint32_t kPhiloxStep1 = 0xbb67ae85u;

FEDCODEC_HD Words philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  Words w = {{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
              static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(w.word[0], w.word[1], w.word[2], w.word[3], k0, k1);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return w;
}

// The seed of the random positions of an encode call's group number `group`.
FEDCODEC_HD uint64_t draw_seed(uint64_t codec_seed, uint64_t call_seed, uint32_t group) {
  const Words w = philox(codec_seed, 0x52414e4400000000u | group, call_seed);
  return w.word[0] | static_cast<uint64_t>(w.word[1]) << 32;
}

// --- random positions: a permutation of [0, n) ---------------------------------------------------

constexpr int kPermutationRounds = 8;

struct Permutation {
  uint64_t n;
  unsigned half_bits;
  uint32_t half_mask;
  uint32_t round_keys[kPermutationRounds];
};

FEDCODEC_HD Permutation permutation(uint64_t seed, uint64_t n) {
  Permutation p = {n, 1, 0, {}};
  while (p.half_bits < 32 && (1ull << (2 * p.half_bits)) < n) ++p.half_bits;
  p.half_mask = static_cast<uint32_t>((1ull << p.half_bits) - 1);
  for (uint32_t block = 0; block < 2; ++block) {
    const Words w = philox(seed, block, 0);
    for (uint32_t i = 0; i < 4; ++i) p.round_keys[4 * block + i] = w.word[i];
  }
  return p;
}

FEDCODEC_HD uint32_t mix(uint32_t v) {
  v ^= v >> 16;
  v *= 0x85ebca6bu;
  v ^= v >> 13;
  v *= 0xc2b2ae35u;
  return v ^ (v >> 16);
}

FEDCODEC_HD uint64_t permutation_pass(const Permutation& p, uint64_t x) {
  uint32_t left = static_cast<uint32_t>(x >> p.half_bits);
  uint32_t right = static_cast<uint32_t>(x) & p.half_mask;
  for (int j = 0; j < kPermutationRounds; ++j) {
    const uint32_t next = left ^ (mix(right + p.round_keys[j]) & p.half_mask);
    left = right;
    right = next;
  }
  return static_cast<uint64_t>(left) << p.half_bits | right;
}

// --- bit strings ---------------------------------------------------------------------------------

FEDCODEC_HD uint64_t load64(const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, 8);
  return word;
}

FEDCODEC_HD void store64(uint8_t* p, uint64_t word) { memcpy(p, &word, 8); }

// Bit i of the result is set where byte i is not zero.
FEDCODEC_HD uint8_t bits_of_bytes(uint64_t bytes) {
  const uint64_t low = 0x7f7f7f7f7f7f7f7fu;
  const uint64_t set = ((((bytes & low) + low) | bytes) & ~low) >> 7;
  return static_cast<uint8_t>((set * 0x0102040810204080u) >> 56);
}

// Byte i of the result is 1 where bit i is set, else 0.
FEDCODEC_HD uint64_t bytes_of_bits(uint8_t bits) {
  const uint64_t spread = (bits * 0x0101010101010101u) & 0x8040201008040201u;
  return ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

// Eight b-bit codes, one a byte, to 8 * b bits and back; b is below 8.
FEDCODEC_HD uint64_t join_codes(uint64_t bytes, unsigned b) {
  uint64_t v = bytes & (0x0101010101010101u * ((1u << b) - 1));
  v = (v & 0x00ff00ff00ff00ffu) | ((v & 0xff00ff00ff00ff00u) >> (8 - b));
  v = (v & 0x0000ffff0000ffffu) | ((v & 0xffff0000ffff0000u) >> (16 - 2 * b));
  return (v & 0x00000000ffffffffu) | ((v & 0xffffffff00000000u) >> (32 - 4 * b));
}

FEDCODEC_HD uint64_t split_codes(uint64_t packed, unsigned b) {
  uint64_t v = packed & ((1ull << (8 * b)) - 1);
  const uint64_t low4 = (1ull << (4 * b)) - 1;
  v = (v & low4) | ((v & ~low4) << (32 - 4 * b));
  const uint64_t low2 = 0x0000000100000001u * ((1u << (2 * b)) - 1);
  v = (v & low2) | ((v & ~low2) << (16 - 2 * b));
  const uint64_t low1 = 0x0001000100010001u * ((1u << b) - 1);
  v = (v & low1) | ((v & ~low1) << (8 - b));
  const uint64_t negative = (v >> (b - 1)) & 0x0101010101010101u;
  return v | negative * (0x100u - (1u << b));
}

}  // namespace fedcodec
