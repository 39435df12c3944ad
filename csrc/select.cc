#include "fedcodec/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fedcodec/arith.h"
#include "fedcodec/memory.h"
#include "fedcodec/parallel.h"
#include "fedcodec/threads.h"

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

template <class Float>
void count_digits(const Kernels& kernels, Parts<Float> parts, KeyOf<Float> prefix, unsigned shift,
                  uint64_t* bins) {
  std::mutex adding;
  for (const auto& part : parts) {
    for_ranges(part.size(), 1, [&](uint64_t begin, uint64_t end) {
      const size_t n = end - begin;
      if (n == part.size()) return count_digits(kernels, part.data(), n, prefix, shift, bins);
      uint64_t own[kDigits] = {};
      count_digits(kernels, part.data() + begin, n, prefix, shift, own);
      const std::lock_guard lock(adding);
      for (size_t digit = 0; digit < kDigits; ++digit) bins[digit] += own[digit];
    });
  }
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
    count_digits(kernels, parts, key >> (shift + kDigitBits), shift, bins);
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

// The k-th largest magnitude, a fraction of the way to the one above it.
template <class Float>
Float interpolated(const Kernels& kernels, Parts<Float> parts, uint64_t k, double fraction,
                   Interpolation interpolation) {
  const Cut<KeyOf<Float>> cut = threshold_of(kernels, parts, k);
  const double a = static_cast<double>(magnitude_of(cut.key));
  if (interpolation == Interpolation::kLower || k == 1 || !(fraction > 0))
    return static_cast<Float>(a);
  const KeyOf<Float> next = cut.ties > 1 ? cut.key : threshold_of(kernels, parts, k - 1).key;
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
constexpr uint64_t kSlack = 1 << 13;
constexpr uint64_t kManyTies = 1 << 6;  // of a sample

// Some thousand runs all over the flat space, at uneven distances: rows of a matrix have even ones.
template <class Float>
std::vector<Float> sample_of(Parts<Float> parts, uint64_t n, Maker<Float>* maker) {
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
    if (maker != nullptr) maker->make(static_cast<size_t>(part - parts.begin()), at, count);
    sample.insert(sample.end(), part->data() + at, part->data() + at + count);
  }
  return sample;
}

// Most likely a little below the k-th largest key, and how many of the sample equal it; any bound
// gives the right result.
template <class Float>
Cut<KeyOf<Float>> likely_bound(const Kernels& kernels, Parts<Float> parts, uint64_t n, uint64_t k,
                               Maker<Float>* maker) {
  const std::vector<Float> sample = sample_of(parts, n, maker);
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const double expected = share * static_cast<double>(sample.size());
  const double rank = expected + 4 * std::sqrt(expected) + 4;
  if (rank > static_cast<double>(sample.size())) return {0, 0};
  const std::span<const Float> all = sample;
  return threshold_of<Float>(kernels, {&all, 1}, static_cast<uint64_t>(rank));
}

// What is kept of a range, in order of position: what may be among the k largest of it.
template <class Float>
class Candidates {
 public:
  Candidates(const Kernels& kernels, uint64_t k) : kernels_(kernels), k_(k) {}

  // Reads the elements [begin, end) of the flat space.
  void collect(Parts<Float> parts, uint64_t begin, uint64_t end, uint64_t expected,
               Cut<KeyOf<Float>> cut, Maker<Float>* maker) {
    reserve(std::min(end - begin, expected + expected / 4 + kSlack) + kStretch);
    uint64_t before = 0;
    for (size_t p = 0; p < parts.size() && before < end; before += parts[p++].size()) {
      const uint64_t last = std::min<uint64_t>(end - before, parts[p].size());
      for (uint64_t at = std::max(begin, before) - before; at < last; at += kStretch) {
        const size_t n = std::min<uint64_t>(kStretch, last - at);
        if (room_ - kept_.size < n) make_room(cut);
        const auto first = static_cast<uint32_t>(before + at);
        uint32_t* const positions = kept_.positions.get() + kept_.size;
        Float* const values = kept_.values.get() + kept_.size;
        kept_.size += maker != nullptr ? maker->compact(p, at, n, cut, first, positions, values)
                                       : compact(kernels_, parts[p].data() + at, n, cut.key,
                                                 cut.ties, first, positions, values);
      }
    }
  }

  size_t size() const { return kept_.size; }
  std::span<const Float> values() const { return {kept_.values.get(), kept_.size}; }

  size_t equal_to(KeyOf<Float> key) const {
    const auto above = [&](KeyOf<Float> below) {
      return count_above(kernels_, kept_.values.get(), kept_.size, below);
    };
    return (key == 0 ? kept_.size : above(key - 1)) - above(key);
  }
  void cut(Cut<KeyOf<Float>> cut) {
    kept_.size =
        refine(kernels_, cut.key, cut.ties, kept_.positions.get(), kept_.values.get(), kept_.size);
  }
  Selection<Float> take() { return std::move(kept_); }

 private:
  void reserve(uint64_t room) {
    // One after the other, for the sake of the peak of memory.
    auto positions = buffer<uint32_t>(room);
    std::copy_n(kept_.positions.get(), kept_.size, positions.get());
    kept_.positions = std::move(positions);
    auto values = buffer<Float>(room);
    std::copy_n(kept_.values.get(), kept_.size, values.get());
    kept_.values = std::move(values);
    room_ = room;
  }

  void make_room(Cut<KeyOf<Float>>& bound) {
    if (kept_.size < k_ + k_ / 4 + kSlack) return reserve(2 * room_);
    const std::span<const Float> all = values();
    const Cut<KeyOf<Float>> least = threshold_of<Float>(kernels_, {&all, 1}, k_);
    cut(least);
    // Those to come lie behind these: of what equals the least of these, none is wanted.
    bound = {least.key, 0};
  }

  const Kernels& kernels_;
  uint64_t k_;
  uint64_t room_ = 0;
  Selection<Float> kept_;
};

// The candidates of all ranges.
template <class Float>
class Shortlist {
 public:
  Shortlist(const Kernels& kernels, Parts<Float> parts)
      : kernels_(kernels), parts_(parts), n_(size_of(parts)), k_(n_), ranges_(cut_ranges(n_)) {}

  // What the cut keeps.
  void find(Cut<KeyOf<Float>> cut) {
    uint64_t expected = 0;
    if (n_ >= kFewToSample) {
      const std::vector<Float> sample = sample_of<Float>(parts_, n_, nullptr);
      expected = n_ / sample.size() * count_above(kernels_, sample.data(), sample.size(), cut.key);
    }
    collect(cut, expected, nullptr);
    if (cut.ties > 0 && found_.size() > 1) keep(cut);
  }

  // At least the k largest, k > 0, unless the values change meanwhile.
  void find_largest(uint64_t k, Maker<Float>* maker) {
    k_ = k;
    if (n_ >= kFewToSample) {
      const auto [bound, ties] = likely_bound(kernels_, parts_, n_, k, maker);
      // Each range would keep as many of equal values as are wanted of all: one keeps few.
      if (ties > kManyTies) ranges_ = {n_, n_};
      collect(from(bound), k, maker);
      if (size() >= k) return;
    } else if (maker != nullptr) {
      for (size_t p = 0; p < parts_.size(); ++p) maker->make(p, 0, parts_[p].size());
    }
    collect(from(threshold_of(kernels_, parts_, k).key), k, nullptr);
    if (size() < k) throw std::runtime_error("the values changed while they were read");
  }

  std::vector<std::span<const Float>> values() const {
    std::vector<std::span<const Float>> all;
    std::transform(found_.begin(), found_.end(), std::back_inserter(all),
                   [](const auto& found) { return found.values(); });
    return all;
  }

  std::vector<Selection<Float>> take() {
    if (size() > k_) cut();
    std::vector<Selection<Float>> pieces;
    std::transform(found_.begin(), found_.end(), std::back_inserter(pieces),
                   [](auto& found) { return found.take(); });
    return pieces;
  }

 private:
  template <class F>
  void for_each(F&& f) {
    run_ranges(ranges_, [&](uint64_t begin, uint64_t) { f(ranges_.index(begin)); });
  }

  // Keeps the bound itself, too.
  static Cut<KeyOf<Float>> from(KeyOf<Float> bound) {
    return bound == 0 ? Cut<KeyOf<Float>>{0, UINT64_MAX} : Cut<KeyOf<Float>>{bound - 1, 0};
  }

  void collect(Cut<KeyOf<Float>> cut, uint64_t expected, Maker<Float>* maker) {
    found_.clear();
    for (uint64_t i = 0; i < ranges_.count(); ++i) found_.emplace_back(kernels_, k_);
    run_ranges(ranges_, [&](uint64_t begin, uint64_t end) {
      found_[ranges_.index(begin)].collect(parts_, begin, end, expected / found_.size(), cut,
                                           maker);
    });
  }

  size_t size() const {
    return std::accumulate(found_.begin(), found_.end(), size_t{0},
                           [](size_t m, const auto& found) { return m + found.size(); });
  }

  // Leaves the k largest.
  void cut() {
    const auto all = values();
    keep(threshold_of<Float>(kernels_, all, k_));
  }

  // What equals the cut's key is taken from the lower ranges first.
  void keep(Cut<KeyOf<Float>> cut) {
    std::vector<uint64_t> ties(found_.size(), cut.ties);
    for_each([&](size_t i) {
      if (i + 1 < ties.size()) ties[i] = found_[i].equal_to(cut.key);
    });
    uint64_t left = cut.ties;
    for (uint64_t& of_range : ties) {
      of_range = std::min(of_range, left);
      left -= of_range;
    }
    for_each([&](size_t i) { found_[i].cut({cut.key, ties[i]}); });
  }

  const Kernels& kernels_;
  Parts<Float> parts_;
  uint64_t n_;
  uint64_t k_;
  Ranges ranges_;
  std::vector<Candidates<Float>> found_;
};

template <class Float>
std::vector<Selection<Float>> topk_of(const Kernels& kernels, Parts<Float> parts, uint64_t k,
                                      Maker<Float>* maker) {
  if (k == 0) {
    for (size_t p = 0; maker != nullptr && p < parts.size(); ++p)
      maker->make(p, 0, parts[p].size());
    return {};
  }
  Shortlist<Float> list(kernels, parts);
  list.find_largest(k, maker);
  return list.take();
}

template <class Float>
std::vector<Selection<Float>> select_of(const Kernels& kernels, Parts<Float> parts,
                                        Cut<KeyOf<Float>> cut) {
  Shortlist<Float> list(kernels, parts);
  list.find(cut);
  return list.take();
}

template <class Float>
Selection<Float> joined_of(std::vector<Selection<Float>> pieces) {
  if (pieces.size() == 1) return std::move(pieces[0]);
  const std::span<const Selection<Float>> all = pieces;
  const size_t size = size_of(all);
  // One after the other, for the sake of the peak of memory.
  Selection<Float> joined = {buffer<uint32_t>(size), nullptr, size};
  for_each_piece(all, [&](const Selection<Float>& piece, size_t from, size_t n, size_t to) {
    std::copy_n(piece.positions.get() + from, n, joined.positions.get() + to);
  });
  for (Selection<Float>& piece : pieces) piece.positions.reset();
  joined.values = buffer<Float>(size);
  for_each_piece(all, [&](const Selection<Float>& piece, size_t from, size_t n, size_t to) {
    std::copy_n(piece.values.get() + from, n, joined.values.get() + to);
  });
  return joined;
}

template <class Float>
Float percentile_of(const Kernels& kernels, Parts<Float> parts, double percentile,
                    Interpolation interpolation) {
  const uint64_t n = size_of(parts);
  if (n == 0) return 0;
  const double virtual_rank = static_cast<double>(n - 1) * percentile / 100.0;
  const uint64_t rank = std::min(static_cast<uint64_t>(virtual_rank), n - 1);
  const double fraction = virtual_rank - std::floor(virtual_rank);
  if (n - rank <= n / 4 && n <= kMostInOnePass) {
    // Ranks from the largest on are the same among the largest.
    Shortlist<Float> list(kernels, parts);
    list.find_largest(n - rank, nullptr);
    return interpolated<Float>(kernels, list.values(), n - rank, fraction, interpolation);
  }
  return interpolated(kernels, parts, n - rank, fraction, interpolation);
}

// What body(x, count, grid, of_channels) adds up for each channel, on all threads.
template <class T, class Float, class Body, class Join>
std::vector<T> by_channel(const Float* x, uint64_t n, Grid grid, const Body& body,
                          const Join& join) {
  std::vector<T> all(grid.channels);
  const bool apart = grid.inner * grid.channels == n;
  std::mutex joining;
  for_ranges(n, apart ? grid.inner : 1, [&](uint64_t begin, uint64_t end) {
    if (apart || end - begin == n) {
      const size_t first = begin / grid.inner % grid.channels;
      return body(x + begin, end - begin, Grid{grid.inner, grid.channels - first},
                  all.data() + first);
    }
    std::vector<T> own(grid.channels);
    for_each_grid(grid, own.data(), begin, end - begin,
                  [&](size_t offset, size_t count, Grid part, T* of_part) {
                    body(x + begin + offset, count, part, of_part);
                  });
    const std::lock_guard lock(joining);
    std::transform(own.begin(), own.end(), all.begin(), all.begin(), join);
  });
  return all;
}

// The norms of the k largest; of those that are equal to the least of them the first `ties`.
Cut<uint64_t> norm_cut(std::vector<uint64_t> norms, uint64_t k) {
  const auto last = norms.begin() + static_cast<ptrdiff_t>(k - 1);
  std::nth_element(norms.begin(), last, norms.end(), std::greater<>());
  const uint64_t least = *last;
  const auto above =
      std::count_if(norms.begin(), last, [=](uint64_t norm) { return norm > least; });
  return {least, k - static_cast<uint64_t>(above)};
}

template <class Float>
std::vector<uint8_t> kept_channels_of(const Kernels& kernels, const Float* x, uint64_t n, Grid grid,
                                      ChannelCut cut) {
  std::vector<uint8_t> kept(grid.channels, 1);
  if (cut.density == 0 || !cut.zeros) {
    kept = by_channel<uint8_t>(
        x, n, grid,
        [&](const Float* part, size_t count, Grid of, uint8_t* used) {
          mark_used(kernels, part, count, of, used);
        },
        std::bit_or<>());
  }
  if (cut.density != 0) {
    const KeyOf<Float> key = largest_key(kernels, x, n);
    if (key >= infinity_of(Float{})) return {};
    std::vector<uint64_t> norms(grid.channels);
    if (key != 0) {
      const double largest = static_cast<double>(magnitude_of(key));
      const double factor = norm_factor(largest, n / grid.channels, cut.order);
      norms = by_channel<uint64_t>(
          x, n, grid,
          [&](const Float* part, size_t count, Grid of, uint64_t* sums) {
            add_norms(kernels, part, count, of, cut.order, factor, sums);
          },
          std::plus<>());
    }
    std::vector<uint64_t> candidates;
    for (size_t c = 0; c < grid.channels; ++c) {
      if (kept[c] != 0) candidates.push_back(norms[c]);
    }
    const double share = std::nearbyint(cut.density * static_cast<double>(grid.channels));
    const uint64_t k = std::min(std::max(static_cast<uint64_t>(share), uint64_t{1}),
                                static_cast<uint64_t>(candidates.size()));
    if (k > 0) {
      auto [least, ties] = norm_cut(std::move(candidates), k);
      for (size_t c = 0; c < grid.channels; ++c) {
        const bool tied = kept[c] != 0 && norms[c] == least && ties > 0;
        ties -= tied;
        kept[c] = tied || (kept[c] != 0 && norms[c] > least);
      }
    }
  }
  std::vector<uint8_t> bits((grid.channels + 7) / 8);
  kernels.pack_mask(kept.data(), kept.size(), bits.data());
  return bits;
}

}  // namespace

Cut<uint32_t> topk_threshold(const Kernels& kernels, Parts<float> parts, uint64_t k) {
  return threshold_of(kernels, parts, k);
}
Cut<uint64_t> topk_threshold(const Kernels& kernels, Parts<double> parts, uint64_t k) {
  return threshold_of(kernels, parts, k);
}

std::vector<Selection<float>> topk(const Kernels& kernels, Parts<float> parts, uint64_t k,
                                   Maker<float>* maker) {
  return topk_of(kernels, parts, k, maker);
}
std::vector<Selection<double>> topk(const Kernels& kernels, Parts<double> parts, uint64_t k,
                                    Maker<double>* maker) {
  return topk_of(kernels, parts, k, maker);
}

std::vector<Selection<float>> select(const Kernels& kernels, Parts<float> parts,
                                     Cut<uint32_t> cut) {
  return select_of(kernels, parts, cut);
}
std::vector<Selection<double>> select(const Kernels& kernels, Parts<double> parts,
                                      Cut<uint64_t> cut) {
  return select_of(kernels, parts, cut);
}

Selection<float> joined(std::vector<Selection<float>> pieces) {
  return joined_of(std::move(pieces));
}
Selection<double> joined(std::vector<Selection<double>> pieces) {
  return joined_of(std::move(pieces));
}

float percentile_threshold(const Kernels& kernels, Parts<float> parts, double percentile,
                           Interpolation interpolation) {
  return percentile_of(kernels, parts, percentile, interpolation);
}
double percentile_threshold(const Kernels& kernels, Parts<double> parts, double percentile,
                            Interpolation interpolation) {
  return percentile_of(kernels, parts, percentile, interpolation);
}

std::vector<uint8_t> kept_channels(const Kernels& kernels, const float* x, uint64_t n, Grid grid,
                                   ChannelCut cut) {
  return kept_channels_of(kernels, x, n, grid, cut);
}
std::vector<uint8_t> kept_channels(const Kernels& kernels, const double* x, uint64_t n, Grid grid,
                                   ChannelCut cut) {
  return kept_channels_of(kernels, x, n, grid, cut);
}

float round_down(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) > value ? std::nextafter(nearest, 0.0f) : nearest;
}

void sorted_random_positions(const Kernels& kernels, uint64_t seed, uint64_t n, uint64_t k,
                             uint64_t* positions) {
  run_ranges(cut_ranges(k, 1, kLeastPositions), [&](uint64_t begin, uint64_t end) {
    kernels.random_positions(seed, n, begin, end - begin, positions + begin);
  });
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
