#include "fedcodec/parallel.h"

#include <cstring>
#include <mutex>

#include "fedcodec/arith.h"

namespace fedcodec {
namespace {

constexpr size_t kFew = size_t{1} << 14;     // codes that stay in cache
constexpr size_t kCopied = size_t{1} << 11;  // values that the first cache holds with their copy

// --- checksums
// ------------------------------------------------------------------------------------------------------

// The product of two polynomials modulo CRC-32's, bit-reflected: the topmost bit is 1.
uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a != 0; a <<= 1) {
    if (a >> 31 != 0) sum ^= b;
    b = (b >> 1) ^ ((b & 1) != 0 ? 0xedb88320u : 0u);
  }
  return sum;
}

// What the ranges of one array write: each sums up its own bytes while they are in cache.
class RangeSums {
 public:
  RangeSums(const Kernels& kernels, const Ranges& ranges, uint32_t* sum)
      : kernels_(kernels),
        ranges_(ranges),
        sum_(sum),
        parts_(sum != nullptr ? ranges.count() : 0) {}

  // The next n bytes of the range that begins there.
  void add(uint64_t begin, const uint8_t* bytes, size_t n) {
    if (sum_ == nullptr) return;
    Part& part = parts_[ranges_.index(begin)];
    part.crc = kernels_.crc32(part.crc, bytes, n);
    part.n += n;
  }

  void join() {
    if (sum_ == nullptr) return;
    *sum_ = parts_[0].crc;
    for (size_t i = 1; i < parts_.size(); ++i)
      *sum_ = joined_checksum(*sum_, parts_[i].crc, parts_[i].n);
  }

 private:
  struct Part {
    uint32_t crc = 0;
    uint64_t n = 0;
  };
  const Kernels& kernels_;
  const Ranges& ranges_;
  uint32_t* sum_;
  std::vector<Part> parts_;
};

// --- quantize
// ------------------------------------------------------------------------------------------------------

Draw drawn_from(const Draw& draw, uint64_t at) {
  return {draw.codec_seed, draw.call_seed, draw.first + at};
}

// Where codes go: in stretches of `step` values that quantize(at, count, to) makes.
struct Destination {
  const Kernels& kernels;
  unsigned bits;
  bool pack;
  uint8_t* codes;
  uint32_t* sum;

  template <class F>
  void fill(uint64_t n, size_t step, F&& quantize) const {
    const Ranges ranges = cut_ranges(n, step);
    RangeSums sums(kernels, ranges, sum);
    run_ranges(ranges, [&](uint64_t begin, uint64_t end) {
      int8_t waiting[kFew];
      for (uint64_t at = begin; at < end; at += step) {
        const size_t count = std::min<uint64_t>(step, end - at);
        uint8_t* const to = codes + (pack ? at / 8 * bits : at);
        quantize(at, count, pack ? waiting : reinterpret_cast<int8_t*>(to));
        if (pack) kernels.pack_codes(waiting, count, bits, to);
        sums.add(begin, to, pack ? (count * bits + 7) / 8 : count);
      }
    });
    sums.join();
  }
};

// Every block has a scale of its own: its values are read once. A stretch is whole blocks, and
// codes of whole bytes where they are packed.
uint32_t quantize_blocks(const Destination& to, const float* x, uint64_t n, size_t block,
                         const std::optional<Draw>& draw, float* scales) {
  std::atomic<uint32_t> largest = 0;
  const size_t whole = to.pack ? std::lcm(block, size_t{8}) : block;
  to.fill(n, std::max(kFew / whole, size_t{1}) * whole,
          [&](uint64_t at, size_t count, int8_t* codes) {
            const Draw here = drawn_from(draw.value_or(Draw{}), at);
            raise(largest,
                  to.kernels.quantize_blocks(x + at, count, block, levels_of(to.bits),
                                             draw ? &here : nullptr, scales + at / block, codes));
          });
  return largest;
}

uint32_t find_scales(const Kernels& kernels, const float* x, uint64_t n, Grid grid, int levels,
                     float* scales) {
  std::vector<uint32_t> keys(grid.channels);
  std::mutex raising;
  for_ranges(n, 1, [&](uint64_t begin, uint64_t end) {
    if (end - begin == n) return kernels.channel_keys(x, n, grid, keys.data());
    std::vector<uint32_t> own(grid.channels);
    for_each_grid(grid, own.data(), begin, end - begin,
                  [&](size_t offset, size_t count, Grid part, uint32_t* of_part) {
                    kernels.channel_keys(x + begin + offset, count, part, of_part);
                  });
    const std::lock_guard lock(raising);
    std::transform(own.begin(), own.end(), keys.begin(), keys.begin(),
                   [](uint32_t a, uint32_t b) { return std::max(a, b); });
  });
  kernels.scales_from_keys(keys.data(), keys.size(), levels, scales);
  return *std::max_element(keys.begin(), keys.end());
}

template <class Float>
KeyOf<Float> copy_of(const Kernels& kernels, const Float* x, uint64_t n, uint8_t* out,
                     uint32_t* sum) {
  std::atomic<KeyOf<Float>> largest = 0;
  const Ranges ranges = cut_ranges(n, kCopied);
  RangeSums sums(kernels, ranges, sum);
  run_ranges(ranges, [&](uint64_t begin, uint64_t end) {
    for (uint64_t at = begin; at < end; at += kCopied) {
      const size_t count = std::min<uint64_t>(kCopied, end - at);
      raise(largest, max_key(kernels, x + at, count));
      std::memcpy(out + at * sizeof(Float), x + at, count * sizeof(Float));
      sums.add(begin, out + at * sizeof(Float), count * sizeof(Float));
    }
  });
  sums.join();
  return largest;
}

}  // namespace

uint32_t quantize(const Kernels& kernels, const float* x, uint64_t n, Grid grid, unsigned bits,
                  const std::optional<Draw>& draw, float* scales, Codes form, uint8_t* codes,
                  uint32_t* sum) {
  const Destination to = {kernels, bits, form == Codes::kPacked && bits < 8, codes, sum};
  const bool blocks = n / grid.inner + (n % grid.inner != 0) == grid.channels;
  if (blocks && grid.inner <= (to.pack ? kFew / 8 : kLeastRange))
    return quantize_blocks(to, x, n, grid.inner, draw, scales);
  const int levels = levels_of(bits);
  const uint32_t largest = find_scales(kernels, x, n, grid, levels, scales);
  if (largest >= kInfinityKey32) return largest;
  to.fill(n, kFew, [&](uint64_t at, size_t count, int8_t* out) {
    for_each_grid(grid, scales, at, count,
                  [&](size_t offset, size_t m, Grid part, const float* of_part) {
                    const float* from = x + at + offset;
                    if (draw) {
                      kernels.quantize_stochastic(from, m, part, levels, of_part,
                                                  drawn_from(*draw, at + offset), out + offset);
                    } else {
                      kernels.quantize_nearest(from, m, part, levels, of_part, out + offset);
                    }
                  });
  });
  return largest;
}

uint32_t copy(const Kernels& kernels, const float* x, uint64_t n, uint8_t* out, uint32_t* sum) {
  return copy_of(kernels, x, n, out, sum);
}
uint64_t copy(const Kernels& kernels, const double* x, uint64_t n, uint8_t* out, uint32_t* sum) {
  return copy_of(kernels, x, n, out, sum);
}

uint32_t signs(const Kernels& kernels, const float* x, uint64_t n, uint8_t* bits) {
  std::atomic<uint32_t> largest = 0;
  for_ranges(n, 8, [&](uint64_t begin, uint64_t end) {
    for (uint64_t at = begin; at < end; at += kCopied) {
      const size_t count = std::min<uint64_t>(kCopied, end - at);
      raise(largest, max_key(kernels, x + at, count));
      kernels.pack_signs(x + at, count, bits + at / 8);
    }
  });
  return largest;
}

float mean_magnitude(const Kernels& kernels, const float* x, uint64_t n, uint32_t largest) {
  if (largest == 0) return 0;
  constexpr uint64_t kMost = uint64_t{1} << 32;  // whose sum a kernel can hold
  const int exponent = exponent_of(largest);
  unsigned __int128 sum = 0;
  std::mutex adding;
  for_ranges(n, 1, [&](uint64_t begin, uint64_t end) {
    for (uint64_t at = begin; at < end; at += kMost) {
      const uint64_t part = kernels.magnitude_sum(x + at, std::min(kMost, end - at), exponent);
      const std::lock_guard lock(adding);
      sum += part;
    }
  });
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(n) *
                            power_of_two(exponent - 31));
}

uint32_t joined_checksum(uint32_t crc, uint32_t of_others, uint64_t n) {
  uint32_t power = 0x00800000;  // x^8
  for (; n != 0; n >>= 1, power = product(power, power)) {
    if ((n & 1) != 0) crc = product(crc, power);
  }
  return crc ^ of_others;
}

uint32_t checksum(const Kernels& kernels, uint32_t crc, const uint8_t* bytes, uint64_t n) {
  if (n < 2 * kLeastRange) return kernels.crc32(crc, bytes, n);
  const Ranges ranges = cut_ranges(n);
  uint32_t found = 0;
  RangeSums sums(kernels, ranges, &found);
  run_ranges(ranges,
             [&](uint64_t begin, uint64_t end) { sums.add(begin, bytes + begin, end - begin); });
  sums.join();
  return joined_checksum(crc, found, n);
}

}  // namespace fedcodec
