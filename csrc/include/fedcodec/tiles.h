// Tiles of an index set, their bytes and our choice of them, for every backend: docs/format.md,
// section 4, and docs/numerics.md, section 7. Loops instead of std::bit_width, of which nvcc makes
// 0 on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arith.h"

namespace fedcodec {

constexpr unsigned kMinTileBits = 16;
constexpr unsigned kMaxTileBits = 31;
constexpr unsigned kMaxDenseBits = 20;  // what a tile keeps lies in memory while it is packed
constexpr unsigned kMaxRice = 30;

FEDCODEC_HD uint64_t ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

// --- bytes
// -----------------------------------------------------------------------------------------------------

enum Mode : uint8_t { kBitmap = 0, kList = 1, kRice = 2 };

struct Tile {
  unsigned mode;
  bool complement;
  unsigned r;
  uint64_t coded;  // the size of the coded set
  uint64_t unary;  // bits of the unary string

  constexpr uint64_t kept(uint64_t length) const { return complement ? length - coded : coded; }
  constexpr bool has_unary() const { return mode == kRice && coded > 0; }
};

FEDCODEC_HD size_t tile_bytes(const Tile& tile, uint64_t length) {
  switch (tile.mode) {
    case kBitmap:
      return ceil_div(length, 8);
    case kList:
      return 2 * tile.coded;
    default:
      return ceil_div(tile.coded * tile.r, 8) + ceil_div(tile.unary, 8);
  }
}

FEDCODEC_HD size_t varint_size(uint64_t value) {
  size_t n = 1;
  for (; value > 0x7f; value >>= 7) ++n;
  return n;
}

FEDCODEC_HD size_t put_varint(uint8_t* at, uint64_t value) {
  size_t n = 0;
  for (; value > 0x7f; value >>= 7) at[n++] = static_cast<uint8_t>(value | 0x80);
  at[n++] = static_cast<uint8_t>(value);
  return n;
}

FEDCODEC_HD size_t header_bytes(const Tile& tile) {
  return 1 + varint_size(tile.coded) + (tile.has_unary() ? varint_size(tile.unary) : 0);
}

FEDCODEC_HD void put_header(uint8_t* at, const Tile& tile) {
  *at++ = static_cast<uint8_t>(tile.mode | (tile.complement ? 4u : 0u) | tile.r << 3);
  at += put_varint(at, tile.coded);
  if (tile.has_unary()) put_varint(at, tile.unary);
}

// Whether the last position of a tile in mode Rice is below its length; its unary string has as
// many ones as it codes.
FEDCODEC_HD bool rice_ends_within(const Tile& tile, uint64_t length, uint64_t remainders) {
  const uint64_t quotients = tile.unary - tile.coded;
  return quotients <= length >> tile.r &&
         (quotients << tile.r) + remainders + tile.coded - 1 < length;
}

// --- the choice
// ------------------------------------------------------------------------------------------------

FEDCODEC_HD unsigned tile_bits(uint64_t n, uint64_t kept) {
  unsigned t = kMinTileBits;
  const bool dense = kept > n / 2;
  const uint64_t coded = dense ? n - kept : kept;
  // The last is coded * 2^t < 512 * n, with nothing to overflow.
  while (t < (dense ? kMaxDenseBits : kMaxTileBits) && uint64_t{1} << t < n &&
         coded <= (n - 1) >> (t - 9)) {
    ++t;
  }
  return t;
}

FEDCODEC_HD bool codes_complement(uint64_t kept, uint64_t length) { return 2 * kept > length; }

// The r to choose from.
struct RiceRange {
  unsigned least, most;
};

FEDCODEC_HD RiceRange rice_range(uint64_t last_position, uint64_t coded) {
  const uint64_t mean = (last_position - (coded - 1)) / coded;
  unsigned most = 0;
  while (mean >> most > 1) ++most;
  return {most < 2 ? 0 : most - 2, most};
}

// sums[j] = sum of gap >> (range.least + j); where nothing is coded, neither is read.
FEDCODEC_HD Tile choose_tile(unsigned t, uint64_t length, uint64_t kept, RiceRange range,
                             const uint64_t sums[3]) {
  const bool complement = codes_complement(kept, length);
  const uint64_t c = complement ? length - kept : kept;
  const Tile list = {kList, complement, 0, c, 0};
  if (c == 0) return t == kMinTileBits ? list : Tile{kRice, complement, 0, 0, 0};
  Tile best = {kRice, complement, range.least, c, sums[0] + c};
  for (unsigned r = range.least + 1; r <= range.most; ++r) {
    const Tile tile = {kRice, complement, r, c, sums[r - range.least] + c};
    if (tile_bytes(tile, 0) < tile_bytes(best, 0)) best = tile;
  }
  const auto size = [length](const Tile& tile) {
    return header_bytes(tile) + tile_bytes(tile, length);
  };
  if (t == kMinTileBits && size(list) <= size(best)) best = list;
  const Tile bitmap = {kBitmap, false, 0, kept, 0};
  return size(bitmap) < size(best) ? bitmap : best;
}

}  // namespace fedcodec
