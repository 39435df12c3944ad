#include "fedcodec/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "fedcodec/arith.h"

namespace fedcodec {
namespace {

constexpr unsigned kDigitBits = 11;
constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;

template <class Key, class Float>
using CountDigits = void (*)(const Float* x, size_t n, Key prefix, unsigned shift, uint64_t* bins);

template <class Float>
uint64_t size_of(Parts<Float> parts) {
  uint64_t n = 0;
  for (const auto& part : parts) n += part.size();
  return n;
}

// Radix select: each pass fixes the next digit of the k-th largest key.
template <class Key, class Float>
Cut<Key> topk_threshold(CountDigits<Key, Float> count_digits, Parts<Float> parts, uint64_t k,
                        Key infinity) {
  if (k == 0) return {infinity, 0};
  Key key = 0;
  unsigned known = std::numeric_limits<Key>::digits - 1;  // bits of the key not yet known
  while (known != 0) {
    const unsigned shift = known > kDigitBits ? known - kDigitBits : 0;
    uint64_t bins[kDigits] = {};
    for (const auto& part : parts)
      count_digits(part.data(), part.size(), key >> (shift + kDigitBits), shift, bins);
    // The last digit may overlap the one before: below that one's value nothing of this prefix is
    // wanted.
    const uint64_t top =
        known >= kDigitBits ? kDigits - 1 : ((key & (kDigits - 1)) | ((Key{1} << known) - 1));
    uint64_t digit = top;
    while (bins[digit] < k) k -= bins[digit--];
    key = (key >> (shift + kDigitBits) << (shift + kDigitBits)) | static_cast<Key>(digit) << shift;
    known = shift;
  }
  return {key, k};
}

template <class Key, class Float>
Float percentile_threshold(CountDigits<Key, Float> count_digits, Parts<Float> parts,
                           double percentile, Interpolation interpolation, Key infinity) {
  const uint64_t n = size_of(parts);
  if (n == 0) return 0;
  const double virtual_rank = static_cast<double>(n - 1) * percentile / 100.0;
  const uint64_t rank = std::min(static_cast<uint64_t>(virtual_rank), n - 1);
  const double fraction = virtual_rank - std::floor(virtual_rank);
  const Cut<Key> cut = topk_threshold(count_digits, parts, n - rank, infinity);
  const double a = static_cast<double>(magnitude_of(cut.key));
  if (interpolation == Interpolation::kLower || rank == n - 1 || !(fraction > 0))
    return static_cast<Float>(a);
  const Key next =
      cut.ties > 1 ? cut.key : topk_threshold(count_digits, parts, n - rank - 1, infinity).key;
  const double b = static_cast<double>(magnitude_of(next));
  if (interpolation == Interpolation::kHigher) return static_cast<Float>(b);
  const double value = a + (b - a) * fraction;
  return sizeof(Float) == sizeof(float) ? static_cast<Float>(round_down(value))
                                        : static_cast<Float>(value);
}

}  // namespace

Cut<uint32_t> topk_threshold_f32(const Kernels& kernels, Parts<float> parts, uint64_t k) {
  return topk_threshold(kernels.count_digits_f32, parts, k, kInfinityKey32);
}
Cut<uint64_t> topk_threshold_f64(const Kernels& kernels, Parts<double> parts, uint64_t k) {
  return topk_threshold(kernels.count_digits_f64, parts, k, kInfinityKey64);
}

uint32_t order_statistic_f32(const Kernels& kernels, Parts<float> parts, uint64_t rank) {
  return topk_threshold_f32(kernels, parts, size_of(parts) - rank).key;
}
uint64_t order_statistic_f64(const Kernels& kernels, Parts<double> parts, uint64_t rank) {
  return topk_threshold_f64(kernels, parts, size_of(parts) - rank).key;
}

float percentile_threshold_f32(const Kernels& kernels, Parts<float> parts, double percentile,
                               Interpolation interpolation) {
  return percentile_threshold(kernels.count_digits_f32, parts, percentile, interpolation,
                              kInfinityKey32);
}
double percentile_threshold_f64(const Kernels& kernels, Parts<double> parts, double percentile,
                                Interpolation interpolation) {
  return percentile_threshold(kernels.count_digits_f64, parts, percentile, interpolation,
                              kInfinityKey64);
}

float round_down(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) > value ? std::nextafter(nearest, 0.0f) : nearest;
}

void sorted_random_positions(const Kernels& kernels, uint64_t seed, uint64_t n, uint64_t k,
                             uint64_t* positions) {
  kernels.random_positions(seed, n, k, positions);
  // Marking takes a word per 64 elements of [0, n), sorting some log2(k) steps per position.
  const uint64_t words = n / 64 + 1;
  if (k < words / 16) {
    std::sort(positions, positions + k);
    return;
  }
  const auto marks = std::make_unique<uint64_t[]>(words);
  for (uint64_t i = 0; i < k; ++i) marks[positions[i] / 64] |= uint64_t{1} << (positions[i] % 64);
  uint64_t* out = positions;
  for (uint64_t w = 0; w < words; ++w) {
    for (uint64_t word = marks[w]; word != 0; word &= word - 1) {
      *out++ = 64 * w + static_cast<uint64_t>(__builtin_ctzll(word));
    }
  }
}

}  // namespace fedcodec
