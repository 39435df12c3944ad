// The table of kernels: what every instruction set provides, under one name.
//
// A kernel gets valid, non-overlapping pointers and true sizes; it allocates nothing, throws
// nothing and cannot fail. The caller (body.cc, bindings) has proved every length. Meanings are
// docs/numerics.md's; layouts are docs/format.md's. A `key` is a float's bits without the sign.
// `f32` and `f64` name the type of the values worked on. Whoever calls a kernel holds a
// DefaultFloatEnv (float_env.h); no kernel looks at the thread's floating-point mode.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedcodec {

// Where a value finds its scale: value i of a group has scale (i / inner) % channels. Both are at
// least 1.
struct Grid {
  size_t inner;
  size_t channels;
};

// Codes of so many bits go from -levels to levels.
constexpr int levels_of(unsigned bits) { return (1 << (bits - 1)) - 1; }

// Keys the random words of stochastic rounding; `first` is the number of the first value of the
// call.
struct Draw {
  uint64_t codec_seed;
  uint64_t call_seed;
  uint64_t first;
};

// How a roof stores: as it comes, with the lines fetched for writing ahead, or past the caches.
enum class Store : uint8_t { kPlain, kPrefetched, kStreamed };
constexpr uint8_t kRoofByte = 0x5a;

struct Kernels {
  const char* name;

  // --- selection ---------------------------------------------------------------------------------
  // The largest key of n values, 0 for none.
  uint32_t (*max_key_f32)(const float* x, size_t n);
  uint64_t (*max_key_f64)(const double* x, size_t n);
  // Counts, for every key with key >> (shift + 11) == prefix, the digit (key >> shift) & 2047; adds
  // to 2048 bins.
  void (*count_digits_f32)(const float* x, size_t n, uint32_t prefix, unsigned shift,
                           uint64_t* bins);
  void (*count_digits_f64)(const double* x, size_t n, uint64_t prefix, unsigned shift,
                           uint64_t* bins);
  // Keeps, in order, keys above `threshold` and the first *ties equal to it (counted down):
  // position, the first of x being `first`, and value. first + n <= 2^32; positions and values have
  // room for n. Returns how many were kept.
  size_t (*compact_f32)(const float* x, size_t n, uint32_t threshold, uint64_t* ties,
                        uint32_t first, uint32_t* positions, float* values);
  size_t (*compact_f64)(const double* x, size_t n, uint64_t threshold, uint64_t* ties,
                        uint32_t first, uint32_t* positions, double* values);
  // The same of a + b, which goes to `out`.
  size_t (*compact_sum_f32)(const float* a, const float* b, float* out, size_t n,
                            uint32_t threshold, uint64_t* ties, uint32_t first, uint32_t* positions,
                            float* values);
  size_t (*compact_sum_f64)(const double* a, const double* b, double* out, size_t n,
                            uint64_t threshold, uint64_t* ties, uint32_t first, uint32_t* positions,
                            double* values);
  // The same, in place, of n positions and values that were kept before.
  size_t (*refine_f32)(uint32_t threshold, uint64_t ties, uint32_t* positions, float* values,
                       size_t n);
  size_t (*refine_f64)(uint64_t threshold, uint64_t ties, uint32_t* positions, double* values,
                       size_t n);
  // How many keys are above `threshold`.
  size_t (*count_above_f32)(const float* x, size_t n, uint32_t threshold);
  size_t (*count_above_f64)(const double* x, size_t n, uint64_t threshold);

  // --- channels ----------------------------------------------------------------------------------
  // Adds to norms[c] the scaled magnitudes of channel c (order 1) or their squares (order 2), of a
  // factor from norm_factor.
  void (*add_norms_f32)(const float* x, size_t n, Grid grid, int order, double factor,
                        uint64_t* norms);
  void (*add_norms_f64)(const double* x, size_t n, Grid grid, int order, double factor,
                        uint64_t* norms);
  // Makes used[c] 1 if a value of channel c is not zero; may leave out those where it is 1 already.
  void (*mark_used_f32)(const float* x, size_t n, Grid grid, uint8_t* used);
  void (*mark_used_f64)(const double* x, size_t n, Grid grid, uint8_t* used);

  // --- masks: bit i of the string belongs to value i ---------------------------------------------
  void (*pack_mask)(const uint8_t* mask, size_t n, uint8_t* bits);  // any non-zero byte is true
  void (*unpack_mask)(const uint8_t* bits, size_t n, uint8_t* mask);
  size_t (*count_bits)(const uint8_t* bytes, size_t n_bytes);
  void (*apply_mask_f32)(const float* x, const uint8_t* bits, size_t n,
                         float* out);  // +0 where the bit is clear
  void (*apply_mask_f64)(const double* x, const uint8_t* bits, size_t n, double* out);

  // --- symmetric integers of levels = 2^(bits - 1) - 1 -------------------------------------------
  // A run of n values, cut into blocks of `block` (the last may be shorter): one scale each,
  // stochastic rounding if there is a draw. Returns the largest key; where it is not finite the
  // outputs are meaningless.
  uint32_t (*quantize_blocks)(const float* x, size_t n, size_t block, int levels, const Draw* draw,
                              float* scales, int8_t* codes);
  // Raises keys[c] to the largest key of each channel c; the caller zeroes them first.
  void (*channel_keys)(const float* x, size_t n, Grid grid, uint32_t* keys);
  // scales[i] from the largest magnitude, given as its finite key.
  void (*scales_from_keys)(const uint32_t* keys, size_t n, int levels, float* scales);
  // Both: `scales` are those of the largest magnitude of each channel of `x`, or more.
  void (*quantize_nearest)(const float* x, size_t n, Grid grid, int levels, const float* scales,
                           int8_t* codes);
  void (*quantize_stochastic)(const float* x, size_t n, Grid grid, int levels, const float* scales,
                              Draw draw, int8_t* codes);
  void (*dequantize)(const int8_t* codes, size_t n, Grid grid, int levels, const float* scales,
                     float* out);
  // b-bit two's complement, b from 2 to 7, packed without gaps; unpacking sign-extends.
  void (*pack_codes)(const int8_t* codes, size_t n, unsigned bits, uint8_t* packed);
  void (*unpack_codes)(const uint8_t* packed, size_t n, unsigned bits, int8_t* codes);

  // --- sign and magnitude ------------------------------------------------------------------------
  void (*pack_signs)(const float* x, size_t n, uint8_t* bits);
  void (*unpack_signs)(const uint8_t* bits, size_t n, float magnitude, float* out);
  // Sum of round(|x| * 2^(31 - exponent)); n <= 2^32. 2^exponent <= max |x| < 2^(exponent + 1).
  uint64_t (*magnitude_sum)(const float* x, size_t n, int exponent);

  // --- conversions, nearest even; narrowing to infinity is for the caller to detect with max_key -
  void (*f16_to_f32)(const uint16_t* x, size_t n, float* out);
  void (*bf16_to_f32)(const uint16_t* x, size_t n, float* out);
  void (*f64_to_f32)(const double* x, size_t n, float* out);
  void (*f32_to_f16)(const float* x, size_t n, uint16_t* out);
  void (*f32_to_bf16)(const float* x, size_t n, uint16_t* out);
  void (*f32_to_f64)(const float* x, size_t n, double* out);
  void (*f64_to_f16)(const double* x, size_t n, uint16_t* out);   // in one step
  void (*f64_to_bf16)(const double* x, size_t n, uint16_t* out);  // in one step
  uint32_t (*max_key_u16)(const uint16_t* x, size_t n);           // largest x & 0x7fff
  void (*sum_f32)(const float* a, const float* b, size_t n, float* out);
  void (*sum_f64)(const double* a, const double* b, size_t n, double* out);
  void (*subtract_f32)(const float* a, const float* b, size_t n, float* out);
  void (*subtract_f64)(const double* a, const double* b, size_t n, double* out);

  // --- tiles of an index set: positions are from the tile's start, strictly increasing -----------
  // n > 0 positions, counted from `start`; returns all bits of the first and of the gaps between
  // them, as 64-bit numbers that wrap around.
  uint64_t (*narrow_positions)(const int64_t* positions, size_t n, uint64_t start, uint32_t* out);
  // sums[j] = sum of gap >> (shift + j) for j in 0..2; the gap of position 0 is itself; shift is at
  // most 29.
  void (*gap_sums)(const uint32_t* positions, size_t n, unsigned shift, uint64_t sums[3]);
  // The n remainders of r bits and the unary bit string of so many bytes; both outputs zeroed by
  // the caller.
  void (*pack_rice)(const uint32_t* positions, size_t n, unsigned r, uint8_t* remainders,
                    uint8_t* unary, size_t unary_bytes);
  // Reads exactly n codes; the caller has checked the bit string.
  void (*unpack_rice)(const uint8_t* remainders, const uint8_t* unary, size_t n, unsigned r,
                      uint32_t* positions);
  uint64_t (*sum_remainders)(const uint8_t* remainders, size_t n, unsigned r);
  void (*pack_bitmap)(const uint32_t* positions, size_t n,
                      uint8_t* bits);  // bits zeroed by the caller
  size_t (*unpack_bitmap)(const uint8_t* bits, size_t length, uint32_t* positions);
  // The length - n positions of [0, length) that are not among the n given ones.
  size_t (*complement)(const uint32_t* positions, size_t n, size_t length, uint32_t* out);
  // out[i] = x[positions[i]], and out[positions[i]] = x[i].
  void (*gather_f32)(const float* x, const uint32_t* positions, size_t n, float* out);
  void (*gather_f64)(const double* x, const uint32_t* positions, size_t n, double* out);
  void (*scatter_f32)(const uint32_t* positions, const float* x, size_t n, float* out);
  void (*scatter_f64)(const uint32_t* positions, const double* x, size_t n, double* out);

  // out[begin, end) is 0 but for out[positions[i]] = x[i]; the positions lie in that range.
  void (*expand_u16)(const uint32_t* positions, const uint16_t* x, size_t n, size_t begin,
                     size_t end, uint16_t* out);
  void (*expand_f32)(const uint32_t* positions, const float* x, size_t n, size_t begin, size_t end,
                     float* out);
  void (*expand_f64)(const uint32_t* positions, const double* x, size_t n, size_t begin, size_t end,
                     double* out);

  // --- random words and positions ----------------------------------------------------------------
  void (*random_words)(Draw draw, size_t n,
                       uint32_t* words);  // of values draw.first ... draw.first + n - 1
  // Numbers first ... first + k - 1 of a permutation of [0, n).
  void (*random_positions)(uint64_t seed, uint64_t n, uint64_t first, uint64_t k,
                           uint64_t* positions);

  // --- weighted sums: acc += weight * decoded ----------------------------------------------------
  void (*add_f32)(const float* x, size_t n, float weight, float* acc);
  void (*add_f32_to_f64)(const float* x, size_t n, double weight, double* acc);
  void (*add_f64)(const double* x, size_t n, double weight, double* acc);
  void (*add_codes_f32)(const int8_t* codes, size_t n, Grid grid, int levels, const float* scales,
                        float weight, float* acc);
  void (*add_codes_f64)(const int8_t* codes, size_t n, Grid grid, int levels, const float* scales,
                        double weight, double* acc);
  void (*add_at_f32)(const uint32_t* positions, const float* x, size_t n, float weight, float* acc);
  void (*add_at_f64)(const uint32_t* positions, const float* x, size_t n, double weight,
                     double* acc);
  void (*add_f64_at_f64)(const uint32_t* positions, const double* x, size_t n, double weight,
                         double* acc);

  // --- checksum ----------------------------------------------------------------------------------
  // zlib's CRC-32 of n more bytes after those that gave `crc` (0 at the start).
  uint32_t (*crc32)(uint32_t crc, const uint8_t* bytes, size_t n);

  // --- roofs: the memory traffic of other kernels and nothing else, for benchmarks ---------------
  // Reads a and b and fills out with kRoofByte, side by side in steps of a page of the longest; out
  // may be b. Returns the exclusive or of all bytes read. Where an instruction set has no other way
  // to store, all are plain.
  uint8_t (*roof)(const uint8_t* a, size_t n_a, const uint8_t* b, size_t n_b, uint8_t* out,
                  size_t n_out, Store store);
};

// The tables compiled in, best last; baseline always first. `usable` says whether this processor
// can run it.
struct KernelChoice {
  const Kernels* table;
  bool usable;
};
size_t kernel_choices(const KernelChoice** all);
// The table in use: FEDCODEC_ISA's if set, else the best usable. Null if FEDCODEC_ISA names none
// that is usable.
const Kernels* active_kernels();
// Makes the named table the active one; false if there is none of that name or it is not usable.
bool use_kernels(const char* name);

}  // namespace fedcodec
