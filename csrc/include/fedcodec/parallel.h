// Kernels over whole arrays: cut into ranges for the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "fedcodec/kernels.h"
#include "fedcodec/threads.h"
#include "fedcodec/typed.h"

namespace fedcodec {

template <class Key>
void raise(std::atomic<Key>& largest, Key key) {
  for (Key before = largest; before < key && !largest.compare_exchange_weak(before, key);) {
  }
}

template <class Float>
KeyOf<Float> largest_key(const Kernels& kernels, const Float* x, uint64_t n) {
  std::atomic<KeyOf<Float>> largest = 0;
  for_ranges(n, 1, [&](uint64_t begin, uint64_t end) {
    raise(largest, max_key(kernels, x + begin, end - begin));
  });
  return largest;
}

template <class Float>
uint64_t count_all_above(const Kernels& kernels, const Float* x, uint64_t n,
                         KeyOf<Float> threshold) {
  std::atomic<uint64_t> count = 0;
  for_ranges(n, 1, [&](uint64_t begin, uint64_t end) {
    count += count_above(kernels, x + begin, end - begin, threshold);
  });
  return count;
}

// Calls f(offset, count, grid, scales) for stretches of the values [at, at + n) that begin where a
// scale does or lie under one; `scales` are those of the whole grid.
template <class Scale, class F>
void for_each_grid(Grid whole, Scale* scales, uint64_t at, size_t n, F&& f) {
  if (at == 0) return f(0, n, whole, scales);
  const auto [inner, channels] = whole;
  for (size_t done = 0; done < n;) {
    const uint64_t within = (at + done) % inner;
    const size_t channel = (at + done) / inner % channels;
    uint64_t count = n - done;
    Grid grid = whole;
    if (within != 0) {
      count = std::min<uint64_t>(count, inner - within);
      grid = {inner, 1};
    } else if (channel != 0) {
      count = std::min<uint64_t>(count, (channels - channel) * inner);
      grid = {inner, channels - channel};
    }
    f(done, static_cast<size_t>(count), grid, scales + channel);
    done += count;
  }
}

enum class Codes { kBytes, kPacked };

// Where `sum` is given, it becomes the CRC-32 of the bytes written.

// Scales and codes of n values; returns the largest key: where it is not finite the outputs are
// meaningless. Rounds to nearest where nothing is drawn.
uint32_t quantize(const Kernels& kernels, const float* x, uint64_t n, Grid grid, unsigned bits,
                  const std::optional<Draw>& draw, float* scales, Codes form, uint8_t* codes,
                  uint32_t* sum = nullptr);

// Copies n values; returns the largest key.
uint32_t copy(const Kernels& kernels, const float* x, uint64_t n, uint8_t* out, uint32_t* sum);
uint64_t copy(const Kernels& kernels, const double* x, uint64_t n, uint8_t* out, uint32_t* sum);

// Packs the signs of n values; returns the largest key.
uint32_t signs(const Kernels& kernels, const float* x, uint64_t n, uint8_t* bits);

// The mean of n > 0 magnitudes, of which the largest has that finite key.
float mean_magnitude(const Kernels& kernels, const float* x, uint64_t n, uint32_t largest);

// zlib's CRC-32 of n more bytes after those that gave `crc` (0 at the start).
uint32_t checksum(const Kernels& kernels, uint32_t crc, const uint8_t* bytes, uint64_t n);
// That of bytes followed by n others, from that of each.
uint32_t joined_checksum(uint32_t crc, uint32_t of_others, uint64_t n);

}  // namespace fedcodec
