#include "fedcodec/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fedcodec/arith.h"
#include "fedcodec/memory.h"

namespace fedcodec {
namespace {

constexpr unsigned kDigitBits = 11;
constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;

constexpr uint32_t infinity_of(float) { return kInfinityKey32; }
constexpr uint64_t infinity_of(double) { return kInfinityKey64; }

template <class Float>
uint64_t size_of(Parts<Float> parts) {
  uint64_t n = 0;
  for (const auto& part : parts) n += part.size();
  return n;
}

// Radix select: each pass fixes the next digit of the k-th largest key.
template <class Float>
Cut<KeyOf<Float>> threshold_of(const Kernels& kernels, Parts<Float> parts, uint64_t k) {
  using Key = KeyOf<Float>;
  if (k == 0) return {infinity_of(Float{}), 0};
  Key key = 0;
  unsigned known = std::numeric_limits<Key>::digits - 1;  // bits of the key not yet known
  while (known != 0) {
    const unsigned shift = known > kDigitBits ? known - kDigitBits : 0;
    uint64_t bins[kDigits] = {};
    for (const auto& part : parts)
      count_digits(kernels, part.data(), part.size(), key >> (shift + kDigitBits), shift, bins);
    // The last digit may overlap the one before: below that one's value nothing of this prefix is
    // wanted.
    const uint64_t top =
        known >= kDigitBits ? kDigits - 1 : ((key & (kDigits - 1)) | ((Key{1} << known) - 1));
    uint64_t digit = top;
    // Values that change between two passes may be fewer than k.
    while (digit > 0 && bins[digit] < k) k -= bins[digit--];
    key = (key >> (shift + kDigitBits) << (shift + kDigitBits)) | static_cast<Key>(digit) << shift;
    known = shift;
  }
  return {key, k};
}

template <class Float>
Float percentile_of(const Kernels& kernels, Parts<Float> parts, double percentile,
                    Interpolation interpolation) {
  const uint64_t n = size_of(parts);
  if (n == 0) return 0;
  const double virtual_rank = static_cast<double>(n - 1) * percentile / 100.0;
  const uint64_t rank = std::min(static_cast<uint64_t>(virtual_rank), n - 1);
  const double fraction = virtual_rank - std::floor(virtual_rank);
  const Cut<KeyOf<Float>> cut = threshold_of(kernels, parts, n - rank);
  const double a = static_cast<double>(magnitude_of(cut.key));
  if (interpolation == Interpolation::kLower || rank == n - 1 || !(fraction > 0))
    return static_cast<Float>(a);
  const KeyOf<Float> next = cut.ties > 1 ? cut.key : threshold_of(kernels, parts, n - rank - 1).key;
  const double b = static_cast<double>(magnitude_of(next));
  if (interpolation == Interpolation::kHigher) return static_cast<Float>(b);
  const double value = a + (b - a) * fraction;
  return sizeof(Float) == sizeof(float) ? static_cast<Float>(round_down(value))
                                        : static_cast<Float>(value);
}

// --- top-k: one pass keeps candidates above a bound that a sample gives, then those are cut
// --------

constexpr size_t kRun = 16;  // neighbours that a sample takes: they share a line of the cache
constexpr uint64_t kRuns = 4096;
constexpr uint64_t kFewToSample = 1 << 15;
constexpr size_t kStretch = 1 << 14;  // elements between two looks at the room left
constexpr uint64_t kSlack = 1 << 16;

// Some thousand runs all over the flat space, at uneven distances: rows of a matrix have even ones.
template <class Float>
std::vector<Float> sample_of(Parts<Float> parts, uint64_t n, const Ready& ready) {
  std::vector<Float> sample;
  const uint64_t runs = std::min(kRuns, n / (kRun * kRun));
  const uint64_t step = n / runs;
  sample.reserve(runs * kRun);
  auto part = parts.begin();
  uint64_t before = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    const uint64_t jitter = (run * 0x9E3779B97F4A7C15u >> 32) * step >> 32;
    const uint64_t position = run * step + jitter;
    while (position - before >= part->size()) before += (part++)->size();
    const size_t at = position - before;
    const size_t count = std::min(kRun, part->size() - at);
    if (ready) ready(static_cast<size_t>(part - parts.begin()), at, count);
    sample.insert(sample.end(), part->data() + at, part->data() + at + count);
  }
  return sample;
}

// Most likely a little below the k-th largest key; any bound gives the right result.
template <class Float>
KeyOf<Float> likely_bound(const Kernels& kernels, Parts<Float> parts, uint64_t n, uint64_t k,
                          const Ready& ready) {
  const std::vector<Float> sample = sample_of(parts, n, ready);
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const double expected = share * static_cast<double>(sample.size());
  const double rank = expected + 4 * std::sqrt(expected) + 4;
  if (rank > static_cast<double>(sample.size())) return 0;
  const std::span<const Float> all = sample;
  return threshold_of<Float>(kernels, {&all, 1}, static_cast<uint64_t>(rank)).key;
}

template <class Float>
class Collector {
 public:
  Collector(const Kernels& kernels, Parts<Float> parts, uint64_t k)
      : kernels_(kernels),
        parts_(parts),
        k_(k),
        room_(std::min(size_of(parts), k + k / 4 + kSlack) + kStretch),
        kept_{buffer<uint32_t>(room_), buffer<Float>(room_)} {}

  // Keeps what may be among the k largest of those that the cut keeps; false if they are fewer.
  bool collect(Cut<KeyOf<Float>> cut, const Ready& ready) {
    size_t m = 0;
    uint32_t first = 0;
    for (size_t p = 0; p < parts_.size(); ++p) {
      const auto& part = parts_[p];
      for (size_t at = 0; at < part.size(); at += kStretch) {
        const size_t n = std::min(kStretch, part.size() - at);
        if (room_ - m < n) {
          // Those to come lie behind these: of what equals the least of these, none is wanted.
          cut = {this->cut(m), 0};
          m = k_;
        }
        if (ready) ready(p, at, n);
        m += compact(kernels_, part.data() + at, n, cut.key, cut.ties, first,
                     kept_.positions.get() + m, kept_.values.get() + m);
        first += static_cast<uint32_t>(n);
      }
    }
    if (m < k_) return false;
    if (m > k_) this->cut(m);
    return true;
  }

  TopK<Float> take() { return std::move(kept_); }

 private:
  // Leaves the k largest of m; returns the least key.
  KeyOf<Float> cut(size_t m) {
    const std::span<const Float> values(kept_.values.get(), m);
    const Cut<KeyOf<Float>> cut = threshold_of<Float>(kernels_, {&values, 1}, k_);
    refine(kernels_, cut.key, cut.ties, kept_.positions.get(), kept_.values.get(), m);
    return cut.key;
  }

  const Kernels& kernels_;
  Parts<Float> parts_;
  uint64_t k_;
  size_t room_;
  TopK<Float> kept_;
};

template <class Float>
TopK<Float> topk_of(const Kernels& kernels, Parts<Float> parts, uint64_t k, const Ready& ready) {
  const uint64_t n = size_of(parts);
  Collector<Float> collector(kernels, parts, k);
  if (n >= kFewToSample && k > 0) {
    const KeyOf<Float> bound = likely_bound(kernels, parts, n, k, ready);
    // Above the bound's predecessor: the bound itself counts.
    const Cut<KeyOf<Float>> cut = {bound - (bound != 0), bound == 0 ? n : 0};
    if (collector.collect(cut, ready)) return collector.take();
  } else if (ready) {
    for (size_t p = 0; p < parts.size(); ++p) ready(p, 0, parts[p].size());
  }
  if (k > 0 && !collector.collect(threshold_of(kernels, parts, k), {}))
    throw std::runtime_error("the values changed while they were read");
  return collector.take();
}

}  // namespace

Cut<uint32_t> topk_threshold(const Kernels& kernels, Parts<float> parts, uint64_t k) {
  return threshold_of(kernels, parts, k);
}
Cut<uint64_t> topk_threshold(const Kernels& kernels, Parts<double> parts, uint64_t k) {
  return threshold_of(kernels, parts, k);
}

TopK<float> topk(const Kernels& kernels, Parts<float> parts, uint64_t k, const Ready& ready) {
  return topk_of(kernels, parts, k, ready);
}
TopK<double> topk(const Kernels& kernels, Parts<double> parts, uint64_t k, const Ready& ready) {
  return topk_of(kernels, parts, k, ready);
}

uint32_t order_statistic(const Kernels& kernels, Parts<float> parts, uint64_t rank) {
  return threshold_of(kernels, parts, size_of(parts) - rank).key;
}
uint64_t order_statistic(const Kernels& kernels, Parts<double> parts, uint64_t rank) {
  return threshold_of(kernels, parts, size_of(parts) - rank).key;
}

float percentile_threshold(const Kernels& kernels, Parts<float> parts, double percentile,
                           Interpolation interpolation) {
  return percentile_of(kernels, parts, percentile, interpolation);
}
double percentile_threshold(const Kernels& kernels, Parts<double> parts, double percentile,
                            Interpolation interpolation) {
  return percentile_of(kernels, parts, percentile, interpolation);
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
