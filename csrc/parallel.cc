#include "fedcodec/parallel.h"

#include <mutex>

#include "fedcodec/arith.h"

namespace fedcodec {
namespace {

constexpr size_t kFew = size_t{1} << 14;  // codes that wait in cache to be packed

// --- quantize
// ------------------------------------------------------------------------------------------------------

// Calls quantize(at, count, to) for stretches of [begin, end) and packs what it leaves there;
// `begin` and `step` are multiples of 8.
template <class F>
void for_each_packed(const Kernels& kernels, uint64_t begin, uint64_t end, size_t step,
                     unsigned bits, uint8_t* codes, F&& quantize) {
  int8_t waiting[kFew];
  for (uint64_t at = begin; at < end; at += step) {
    const size_t count = std::min<uint64_t>(step, end - at);
    quantize(at, count, waiting);
    kernels.pack_codes(waiting, count, bits, codes + at / 8 * bits);
  }
}

// Every block has a scale of its own: its values are read once.
uint32_t quantize_in_blocks(const Kernels& kernels, const float* x, uint64_t n, size_t block,
                            unsigned bits, float* scales, bool pack, uint8_t* codes) {
  std::atomic<uint32_t> largest = 0;
  const size_t whole = pack ? std::lcm(block, size_t{8}) : block;
  for_ranges(n, whole, [&](uint64_t begin, uint64_t end) {
    const auto blocks = [&](uint64_t at, size_t count, int8_t* to) {
      raise(largest, kernels.quantize_blocks(x + at, count, block, levels_of(bits),
                                             scales + at / block, to));
    };
    if (!pack) return blocks(begin, end - begin, reinterpret_cast<int8_t*>(codes) + begin);
    for_each_packed(kernels, begin, end, kFew / whole * whole, bits, codes, blocks);
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

// --- checksum
// ------------------------------------------------------------------------------------------------------

// Polynomials modulo CRC-32's; the highest bit is the coefficient of x^0.
constexpr uint32_t kPolynomial = 0xEDB88320;
constexpr uint32_t kOne = uint32_t{1} << 31;

uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) sum ^= b;
    b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
  }
  return sum;
}

// The checksum that n zero bytes would leave of one, but for what they add themselves.
uint32_t shifted(uint32_t crc, uint64_t n) {
  uint32_t power = kOne >> 8;  // x^8: a byte
  for (; n != 0; n >>= 1) {
    if ((n & 1) != 0) crc = product(crc, power);
    power = product(power, power);
  }
  return crc;
}

}  // namespace

uint32_t quantize(const Kernels& kernels, const float* x, uint64_t n, Grid grid, unsigned bits,
                  const std::optional<Draw>& draw, float* scales, Codes form, uint8_t* codes) {
  const bool pack = form == Codes::kPacked && bits < 8;
  const bool blocks = grid.inner * grid.channels >= n;
  if (!draw && blocks && grid.inner <= (pack ? kFew / 8 : kLeastRange))
    return quantize_in_blocks(kernels, x, n, grid.inner, bits, scales, pack, codes);
  const int levels = levels_of(bits);
  const uint32_t largest = find_scales(kernels, x, n, grid, levels, scales);
  if (largest >= kInfinityKey32) return largest;
  for_ranges(n, 8, [&](uint64_t begin, uint64_t end) {
    const auto stretch = [&](uint64_t at, size_t count, int8_t* to) {
      for_each_grid(
          grid, scales, at, count, [&](size_t offset, size_t m, Grid part, const float* of_part) {
            const float* from = x + at + offset;
            if (draw) {
              const Draw here = {draw->codec_seed, draw->call_seed, draw->first + at + offset};
              kernels.quantize_stochastic(from, m, part, levels, of_part, here, to + offset);
            } else {
              kernels.quantize_nearest(from, m, part, levels, of_part, to + offset);
            }
          });
    };
    if (!pack) return stretch(begin, end - begin, reinterpret_cast<int8_t*>(codes) + begin);
    for_each_packed(kernels, begin, end, kFew, bits, codes, stretch);
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

uint32_t checksum(const Kernels& kernels, const uint8_t* bytes, uint64_t n) {
  constexpr uint64_t kPage = 4096;
  const Ranges ranges = cut_ranges(n, kPage);
  std::vector<uint32_t> found(ranges.count());
  run_ranges(ranges, [&](uint64_t begin, uint64_t end) {
    found[ranges.index(begin)] = kernels.crc32(0, bytes + begin, end - begin);
  });
  uint32_t crc = found[0];
  for (size_t i = 1; i < found.size(); ++i) {
    const uint64_t begin = i * ranges.length;
    crc = shifted(crc, std::min(n, begin + ranges.length) - begin) ^ found[i];
  }
  return crc;
}

}  // namespace fedcodec
