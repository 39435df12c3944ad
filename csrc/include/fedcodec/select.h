// Exact order statistics of magnitudes over several parts that count as one flat space, and random
// positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "fedcodec/kernels.h"
#include "fedcodec/threads.h"
#include "fedcodec/typed.h"

namespace fedcodec {

template <class Float>
using Parts = std::span<const std::span<const Float>>;

// Keep every key above `key` and the first `ties` equal to it.
template <class Key>
struct Cut {
  Key key;
  uint64_t ties;
};

// What is kept, in order of position; the buffers may be longer. Or a piece of it: each thread has
// found its own.
template <class Float>
struct Selection {
  std::unique_ptr<uint32_t[]> positions;
  std::unique_ptr<Float[]> values;
  size_t size = 0;
};

template <class Float>
size_t size_of(std::span<const Selection<Float>> pieces) {
  return std::accumulate(pieces.begin(), pieces.end(), size_t{0},
                         [](size_t n, const auto& piece) { return n + piece.size; });
}

// Calls body(piece, the first of its elements, how many, where they are among all) until all had
// their turn, on all threads.
template <class Float, class Body>
void for_each_piece(std::span<const Selection<Float>> pieces, Body body) {
  for_ranges(size_of(pieces), 1, [&](uint64_t begin, uint64_t end) {
    uint64_t before = 0;
    for (const Selection<Float>& piece : pieces) {
      const uint64_t first = std::max(begin, before);
      const uint64_t last = std::min(end, before + piece.size);
      if (first < last) body(piece, first - before, last - first, first);
      before += piece.size;
    }
  });
}

// The pieces put together.
Selection<float> joined(std::vector<Selection<float>> pieces);
Selection<double> joined(std::vector<Selection<double>> pieces);

enum class Interpolation { kLinear, kLower, kHigher };

// The cut that keeps exactly k; k is at most the number of elements. k = 0 gives infinity's key and
// no ties.
Cut<uint32_t> topk_threshold(const Kernels& kernels, Parts<float> parts, uint64_t k);
Cut<uint64_t> topk_threshold(const Kernels& kernels, Parts<double> parts, uint64_t k);

// Where top-k's elements are not there yet: it makes them when they are first read. Several threads
// may call it at once, for different elements.
template <class Float>
class Maker {
 public:
  virtual ~Maker() = default;
  // Makes n elements of a part from `at` on, which may have been made before.
  virtual void make(size_t part, size_t at, size_t n) = 0;
  // Makes them and keeps what the kernel of that name does.
  virtual size_t compact(size_t part, size_t at, size_t n, Cut<KeyOf<Float>>& cut, uint32_t first,
                         uint32_t* positions, Float* values) = 0;
};

// What that cut keeps, of at most so many elements; reads them about once. The maker may be null.
constexpr uint64_t kMostInOnePass = uint64_t{1} << 32;
std::vector<Selection<float>> topk(const Kernels& kernels, Parts<float> parts, uint64_t k,
                                   Maker<float>* maker);
std::vector<Selection<double>> topk(const Kernels& kernels, Parts<double> parts, uint64_t k,
                                    Maker<double>* maker);

// What a cut keeps, of at most so many elements; reads them once.
std::vector<Selection<float>> select(const Kernels& kernels, Parts<float> parts, Cut<uint32_t> cut);
std::vector<Selection<double>> select(const Kernels& kernels, Parts<double> parts,
                                      Cut<uint64_t> cut);

// The percentile (0 to 100) of the magnitudes, rounded down to the parts' type; 0 without elements.
float percentile_threshold(const Kernels& kernels, Parts<float> parts, double percentile,
                           Interpolation interpolation);
double percentile_threshold(const Kernels& kernels, Parts<double> parts, double percentile,
                            Interpolation interpolation);

// The largest float that is not above a value >= 0; |x| > value exactly where |x| >
// round_down(value).
float round_down(double value);

// Which channels of n > 0 values are kept: a bit each. Those that are not all zero where `density`
// is 0, else the share of them with the largest norms; of those that are all zero none without
// `zeros`. Nothing at all if it meets a value that is not finite.
struct ChannelCut {
  double density;
  int order;  // of the norm: 1 or 2
  bool zeros;
};
std::vector<uint8_t> kept_channels(const Kernels& kernels, const float* x, uint64_t n, Grid grid,
                                   ChannelCut cut);
std::vector<uint8_t> kept_channels(const Kernels& kernels, const double* x, uint64_t n, Grid grid,
                                   ChannelCut cut);

// The k kept positions of [0, n) in ascending order; k <= n < 2^63.
void sorted_random_positions(const Kernels& kernels, uint64_t seed, uint64_t n, uint64_t k,
                             uint64_t* positions);

}  // namespace fedcodec
