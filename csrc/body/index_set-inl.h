// Index sets: tiles of positions to bytes and back. Part of body.cc.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "fedcodec/body.h"
#include "fedcodec/parallel.h"
#include "fedcodec/reader.h"
#include "fedcodec/tiles.h"
#include "layout-inl.h"

namespace fedcodec {
namespace {

// --- writing bytes
// -----------------------------------------------------------------------------------------------------

class Writer {
 public:
  explicit Writer(std::span<uint8_t> out) : out_(out) {}
  Writer(const Kernels& kernels, std::span<uint8_t> out, uint32_t* checksum)
      : kernels_(&kernels), out_(out), checksum_(checksum) {}

  size_t size() const { return at_; }
  size_t capacity() const { return out_.size(); }
  const uint8_t* data() const { return out_.data(); }

  uint8_t* take(size_t n) {
    if (n > out_.size() - at_) throw std::length_error("the bound of an encoded body is too small");
    at_ += n;
    return out_.data() + at_ - n;
  }
  void bytes(const void* from, size_t n) {
    uint8_t* to = take(n);
    if (n > 0) std::memcpy(to, from, n);
  }
  void varint(uint64_t value) { put_varint(take(varint_size(value)), value); }

  // Whether n bytes are better summed up by who writes them: fewer stay in cache.
  bool worth_summing(uint64_t n) const { return checksum_ != nullptr && n >= kWindow; }
  // Sums up the bytes so far, best while they are in cache; they change no more.
  void sum_up() { sum_up(at_); }
  // The same, with the checksum of the last n bytes at hand.
  void sum_up(uint32_t of_last, size_t n) {
    if (checksum_ == nullptr) return;
    sum_up(at_ - n);
    *checksum_ = joined_checksum(*checksum_, of_last, n);
    summed_ = at_;
  }

 private:
  void sum_up(size_t stop) {
    if (checksum_ == nullptr) return;
    *checksum_ = checksum(*kernels_, *checksum_, out_.data() + summed_, stop - summed_);
    summed_ = stop;
  }

  const Kernels* kernels_ = nullptr;
  std::span<uint8_t> out_;
  uint32_t* checksum_ = nullptr;
  size_t at_ = 0;
  size_t summed_ = 0;
};

// --- packing a sparse index set
// ------------------------------------------------------------------------------------------

// Tiles of 2^t elements, one after the other.
class TilePacker {
 public:
  // Of so many elements, of which so many are kept.
  TilePacker(const Kernels& kernels, unsigned t, uint64_t elements, uint64_t kept)
      : kernels_(kernels), t_(t) {
    // At most bitmaps, most likely less than lists; what is not written is not touched.
    data_.reserve(std::min(ceil_div(elements, 8), 2 * kept));
  }

  // The next tile: the m positions that it keeps, from its start.
  void add(const uint32_t* positions, size_t m, uint64_t length) {
    const uint32_t* coded = positions;
    const bool complement = codes_complement(m, length);
    if (complement) {
      if (others_.size() < length - m) others_.resize(length - m);
      kernels_.complement(positions, m, length, others_.data());
      coded = others_.data();
    }
    RiceRange range = {};
    uint64_t sums[3] = {};
    const uint64_t c = complement ? length - m : m;
    if (c > 0) {
      range = rice_range(coded[c - 1], c);
      kernels_.gap_sums(coded, c, range.least, sums);
    }
    const Tile tile = choose_tile(t_, length, m, range, sums);
    header(tile);
    data(tile, tile.mode == kBitmap ? positions : coded, length);
  }

  // The whole index set, of tiles that several have packed.
  static void write(std::span<const TilePacker> packers, Writer& out) {
    *out.take(1) = static_cast<uint8_t>(packers[0].t_);
    for (const TilePacker& packer : packers)
      out.bytes(packer.headers_.data(), packer.headers_.size());
    for (const TilePacker& packer : packers) out.bytes(packer.data_.data(), packer.data_.size());
  }

  static size_t size(std::span<const TilePacker> packers) {
    size_t n = 1;
    for (const TilePacker& packer : packers) n += packer.headers_.size() + packer.data_.size();
    return n;
  }

 private:
  void header(const Tile& tile) {
    const size_t at = headers_.size();
    headers_.resize(at + header_bytes(tile));
    put_header(headers_.data() + at, tile);
  }

  void data(const Tile& tile, const uint32_t* positions, uint64_t length) {
    if (tile.coded == 0) return;
    const size_t at = data_.size();
    data_.resize(at + tile_bytes(tile, length));
    uint8_t* out = data_.data() + at;
    switch (tile.mode) {
      case kBitmap:
        kernels_.pack_bitmap(positions, tile.coded, out);
        break;
      case kList:
        for (size_t i = 0; i < tile.coded; ++i) {
          const uint16_t position = static_cast<uint16_t>(positions[i]);
          std::memcpy(out + 2 * i, &position, 2);
        }
        break;
      default:
        kernels_.pack_rice(positions, tile.coded, tile.r, out,
                           out + ceil_div(tile.coded * tile.r, 8), ceil_div(tile.unary, 8));
    }
  }

  const Kernels& kernels_;
  unsigned t_;
  std::vector<uint8_t> headers_, data_;
  std::vector<uint32_t> others_;
};

template <class F>
void for_each_tile(uint64_t begin, uint64_t end, unsigned t, F&& f) {
  const uint64_t full = uint64_t{1} << t;
  for (uint64_t start = begin; start < end; start += full) f(start, std::min(full, end - start));
}

// Ranges of n elements where only the kept ones are work.
Ranges cut_sparse(uint64_t n, uint64_t step, uint64_t kept) {
  if (kept < 2 * kLeastPositions) return {n, std::max<uint64_t>(n, 1)};
  return cut_ranges(n, step);
}

// The positions of a tile, counted from its start: where they lie.
uint32_t* to_tile(const Kernels&, std::span<uint32_t> positions, uint64_t start, uint64_t,
                  uint32_t*) {
  for (uint32_t& position : positions) position -= static_cast<uint32_t>(start);
  return positions.data();
}

struct NotIncreasing {};

// The same at `to`. Throws NotIncreasing unless they increase strictly and lie in the tile.
uint32_t* to_tile(const Kernels& kernels, std::span<const int64_t> positions, uint64_t start,
                  uint64_t length, uint32_t* to) {
  if (positions.empty()) return to;
  // Gaps in a tile are below 2^31: a step back shows above.
  const uint64_t gaps = kernels.narrow_positions(positions.data(), positions.size(), start, to);
  const uint64_t last = static_cast<uint64_t>(positions.back()) - start;
  if (gaps >> kMaxTileBits != 0 || last >= length) throw NotIncreasing{};
  return to;
}

// Packs n elements of which those positions are kept; may change them, see to_tile.
template <class Position>
std::vector<TilePacker> pack_tiles(const Kernels& kernels, std::span<Position> positions,
                                   uint64_t n) {
  constexpr bool kNarrow = std::is_same_v<Position, uint32_t>;
  const auto before = [](int64_t position, uint64_t end) {
    return position < static_cast<int64_t>(end);
  };
  const unsigned t = tile_bits(n, positions.size());
  const Ranges ranges = cut_sparse(n, uint64_t{1} << t, positions.size());
  std::vector<TilePacker> packers;
  std::vector<std::span<Position>> parts;
  auto rest = positions;
  for (uint64_t i = 0; i < ranges.count(); ++i) {
    const uint64_t begin = i * ranges.length;
    const uint64_t end = std::min(n, begin + ranges.length);
    // The last takes what is left over, too.
    const bool last = i + 1 == ranges.count();
    const auto stop = last ? rest.end() : std::lower_bound(rest.begin(), rest.end(), end, before);
    parts.push_back(rest.first(static_cast<size_t>(stop - rest.begin())));
    rest = rest.subspan(parts.back().size());
    packers.emplace_back(kernels, t, end - begin, parts.back().size());
  }
  run_ranges(ranges, [&](uint64_t begin, uint64_t end) {
    const uint64_t range = ranges.index(begin);
    std::span<Position> left = parts[range];
    const auto room = buffer<uint32_t>(kNarrow ? 0 : std::min(left.size(), size_t{1} << t));
    for_each_tile(begin, end, t, [&](uint64_t start, uint64_t length) {
      // Doubling finds the end of a tile near its beginning.
      auto tile = left.first(std::min<uint64_t>(left.size(), length));
      for (size_t reach = 1; reach < tile.size(); reach *= 2) {
        if (!before(tile[reach - 1], start + length)) tile = tile.first(reach);
      }
      const auto stop = std::lower_bound(tile.begin(), tile.end(), start + length, before);
      tile = tile.first(static_cast<size_t>(stop - tile.begin()));
      packers[range].add(to_tile(kernels, tile, start, length, room.get()), tile.size(), length);
      left = left.subspan(tile.size());
    });
    if (!left.empty()) throw NotIncreasing{};
  });
  return packers;
}

// At most a bitmap for every tile, whatever is chosen.
uint64_t sparse_bound(uint64_t n) { return 1 + 8 * (n / kWindow + 1) + n / 8; }

// --- reading an index set
// ------------------------------------------------------------------------------------------------

// Which elements of a group are kept; the bytes are checked.
struct IndexSet {
  enum class Kind { kAll, kBits, kTiles };
  Kind kind;
  uint64_t n;
  uint64_t kept;
  const uint8_t* bits = nullptr;        // kBits
  std::unique_ptr<uint8_t[]> own = {};  // where the bits are ours
  unsigned t = kMinTileBits;            // kTiles
  uint64_t largest = 0;                 // the largest coded set of a tile that is not a bitmap
  // Where to enter: for every `step` elements what is read there, and how many are kept before.
  struct Entry {
    Reader headers;
    Reader data;
    uint64_t kept;
  };
  std::vector<Entry> entries = {};
  uint64_t step = kLeastRange;
  uint64_t run = 1;  // kBits: that many elements, from a multiple of it on, are all kept or none
  bool checked = false;  // the data of the tiles
};

Tile read_header(Reader& in, unsigned t, uint64_t length) {
  const size_t start = in.offset();
  const uint8_t first = in.byte("a tile's header");
  Tile tile = {first & 3u, (first & 4) != 0, static_cast<unsigned>(first) >> 3, 0, 0};
  tile.coded = in.varint("a tile's count");
  const bool valid = tile.mode == kBitmap ? tile.r == 0 && !tile.complement
                     : tile.mode == kList ? tile.r == 0 && t == kMinTileBits
                                          : tile.mode == kRice && tile.r <= kMaxRice;
  if (!valid) throw Malformed{"a tile's header is not one of the format", start};
  if (tile.coded > length) throw Malformed{"a tile codes more positions than it has", start};
  if (tile.has_unary()) tile.unary = in.varint("the length of a unary string");
  return tile;
}

void check_list(const Tile& tile, uint64_t length, Reader& in) {
  const size_t start = in.offset();
  const uint8_t* list = in.take(2 * tile.coded, "a tile's list");
  int64_t last = -1;
  bool increasing = true;
  for (size_t i = 0; i < tile.coded; ++i) {
    uint16_t position;
    std::memcpy(&position, list + 2 * i, 2);
    increasing &= position > last;
    last = position;
  }
  if (!increasing || last >= static_cast<int64_t>(length)) {
    throw Malformed{"a tile's positions do not increase strictly below its length", start};
  }
}

void check_rice(const Kernels& kernels, const Tile& tile, uint64_t length, Reader& in) {
  if (tile.coded == 0) return;
  const size_t start = in.offset();
  const uint8_t* remainders = in.take_bits(tile.coded * tile.r, "a tile's remainders");
  const uint8_t* unary = in.take_bits(tile.unary, "a tile's unary string");
  const uint64_t last = tile.unary - 1;
  if (tile.unary < tile.coded || (unary[last / 8] >> (last % 8) & 1) == 0 ||
      kernels.count_bits(unary, ceil_div(tile.unary, 8)) != tile.coded) {
    throw Malformed{"a tile's unary string does not end with its last one", start};
  }
  if (!rice_ends_within(tile, length, kernels.sum_remainders(remainders, tile.coded, tile.r))) {
    throw Malformed{"a tile's positions leave the tile", start};
  }
}

void check_tile(const Kernels& kernels, const Tile& tile, uint64_t length, Reader& in) {
  if (tile.mode == kBitmap) {
    const size_t start = in.offset();
    const uint8_t* bits = in.take_bits(length, "a tile's bitmap");
    if (kernels.count_bits(bits, ceil_div(length, 8)) != tile.coded) {
      throw Malformed{"a tile's bitmap does not have as many bits set as it claims", start};
    }
  } else if (tile.mode == kList) {
    check_list(tile, length, in);
  } else {
    check_rice(kernels, tile, length, in);
  }
}

// Looks at the data of all tiles.
void check_tiles(const Kernels& kernels, IndexSet& set) {
  if (set.kind != IndexSet::Kind::kTiles || set.checked) return;
  run_ranges(cut_sparse(set.n, set.step, set.kept), [&](uint64_t begin, uint64_t end) {
    if (begin == end) return;
    IndexSet::Entry at = set.entries[begin / set.step];
    for_each_tile(begin, end, set.t, [&](uint64_t, uint64_t length) {
      const Tile tile = read_header(at.headers, set.t, length);
      check_tile(kernels, tile, length, at.data);
    });
  });
  set.checked = true;
}

// Headers, and that there are all data; not yet what those are.
IndexSet open_tiles(Reader& in, uint64_t n) {
  IndexSet set = {IndexSet::Kind::kTiles, n, 0};
  const size_t start = in.offset();
  set.t = in.byte("the tile size");
  if (set.t < kMinTileBits || set.t > kMaxTileBits)
    throw Malformed{"the tile size is not 16 to 31", start};
  set.step = std::max(kLeastRange, uint64_t{1} << set.t);
  Reader headers = in;
  for_each_tile(0, n, set.t, [&](uint64_t, uint64_t length) {
    const Tile tile = read_header(in, set.t, length);
    if (tile.mode != kBitmap) set.largest = std::max(set.largest, tile.coded);
  });
  for_each_tile(0, n, set.t, [&](uint64_t begin, uint64_t length) {
    if (begin % set.step == 0) set.entries.push_back({headers, in, set.kept});
    const Tile tile = read_header(headers, set.t, length);
    in.take(tile_bytes(tile, length), "a tile");
    set.kept += tile.kept(length);
  });
  return set;
}

IndexSet read_tiles(const Kernels& kernels, Reader& in, uint64_t n) {
  IndexSet set = open_tiles(in, n);
  check_tiles(kernels, set);
  return set;
}

void set_bits(const Kernels& kernels, IndexSet& set, const uint8_t* bits) {
  set.bits = bits;
  set.kept = 0;
  for (uint64_t begin = 0; begin < set.n; begin += set.step) {
    set.entries.push_back({{nullptr, 0, 0}, {nullptr, 0, 0}, set.kept});
    set.kept +=
        kernels.count_bits(bits + begin / 8, ceil_div(std::min(set.step, set.n - begin), 8));
  }
}

IndexSet random_set(const Kernels& kernels, uint64_t n, uint64_t k, uint64_t seed) {
  const auto positions = buffer<uint64_t>(k);
  sorted_random_positions(kernels, seed, n, k, positions.get());
  IndexSet set = {IndexSet::Kind::kBits, n, k};
  set.own = std::make_unique<uint8_t[]>(ceil_div(n, 8));
  for (uint64_t i = 0; i < k; ++i) {
    set.own[positions[i] / 8] |= static_cast<uint8_t>(1u << (positions[i] % 8));
  }
  set_bits(kernels, set, set.own.get());
  return set;
}

IndexSet read_random(const Kernels& kernels, Reader& in, uint64_t n) {
  const size_t start = in.offset();
  const uint64_t k = in.varint("the number of random positions");
  if (k > n) throw Malformed{"more random positions than elements", start};
  uint64_t seed;
  std::memcpy(&seed, in.take(8, "the seed of random positions"), 8);
  // A value takes a bit at least: nothing is drawn for values that cannot follow.
  if (k / 8 > in.left()) throw Malformed{"more random positions than values", start};
  return random_set(kernels, n, k, seed);
}

IndexSet mask_set(const Kernels& kernels, const Select& mask, uint64_t n) {
  IndexSet set = {IndexSet::Kind::kBits, n, 0};
  set_bits(kernels, set, mask.bits.data());
  return set;
}

// Sets the bits [begin, end).
void fill_bits(uint8_t* bits, uint64_t begin, uint64_t end) {
  for (; begin < end && begin % 8 != 0; ++begin)
    bits[begin / 8] |= static_cast<uint8_t>(1u << begin % 8);
  if (begin < end) std::memset(bits + begin / 8, 0xff, (end - begin) / 8);
  for (begin = std::max(begin, end / 8 * 8); begin < end; ++begin)
    bits[begin / 8] |= static_cast<uint8_t>(1u << begin % 8);
}

// Sets the bits from `at` on as those of n others; both strings are whole words, zeros where
// nothing is set.
void put_bits(const uint8_t* from, uint64_t n, uint8_t* bits, uint64_t at) {
  uint8_t* to = bits + at / 64 * 8;
  const unsigned shift = at % 64;
  for (uint64_t i = 0; i < n; i += 64, from += 8, to += 8) {
    const uint64_t word = load64(from);
    store64(to, load64(to) | word << shift);
    const uint64_t rest = shift == 0 ? 0 : word >> (64 - shift);
    if (rest != 0) store64(to + 8, load64(to + 8) | rest);
  }
}

// The elements of the channels of which the bit is set.
IndexSet channel_set(const Kernels& kernels, uint64_t n, Grid grid, const uint8_t* channels) {
  if (kernels.count_bits(channels, ceil_div(grid.channels, 8)) == grid.channels)
    return {IndexSet::Kind::kAll, n, n};
  const auto zeros = [](uint64_t bits) {
    return std::make_unique<uint8_t[]>(ceil_div(bits, 64) * 8);
  };
  const uint64_t length = grid.inner * grid.channels;
  std::unique_ptr<uint8_t[]> row = zeros(length);
  for (uint64_t c = 0; c < grid.channels; ++c) {
    if ((channels[c / 8] >> (c % 8) & 1) != 0)
      fill_bits(row.get(), c * grid.inner, (c + 1) * grid.inner);
  }
  IndexSet set = {IndexSet::Kind::kBits, n, 0};
  set.run = grid.inner;
  if (length == n) {
    set.own = std::move(row);
  } else {
    set.own = zeros(n);
    for (uint64_t at = 0; at < n; at += length) put_bits(row.get(), length, set.own.get(), at);
  }
  set_bits(kernels, set, set.own.get());
  return set;
}

IndexSet read_channels(const Kernels& kernels, Reader& in, uint64_t n, std::optional<Grid> grid) {
  if (!grid) return {IndexSet::Kind::kAll, n, n};
  const size_t start = in.offset();
  const uint8_t* channels = in.take_bits(grid->channels, "the kept channels");
  const uint64_t kept = kernels.count_bits(channels, ceil_div(grid->channels, 8));
  // A value takes a bit at least: no elements are marked of values that cannot follow.
  if (kept * (n / grid->channels) / 8 > in.left())
    throw Malformed{"more values are kept than follow", start};
  return channel_set(kernels, n, *grid, channels);
}

// Calls f(at, count) in ascending order for stretches of kept elements of [begin, end), of a set
// with runs.
template <class F>
void for_each_stretch(const IndexSet& set, uint64_t begin, uint64_t end, F&& f) {
  const auto kept = [&](uint64_t i) { return (set.bits[i / 8] >> (i % 8) & 1) != 0; };
  for (uint64_t at = begin; at < end;) {
    uint64_t stop = at / set.run * set.run + set.run;
    if (kept(at)) {
      while (stop < end && kept(stop)) stop += set.run;
      stop = std::min(stop, end);
      f(at, stop - at);
    }
    at = stop;
  }
}

// The data of tiles may be left for `check_tiles`; `tensor` is the first of the group.
IndexSet read_index_set(const Kernels& kernels, const Select& select, const Tensor& tensor,
                        Reader& in, uint64_t n, bool checks_tiles = true) {
  switch (select.kind) {
    case Select::Kind::kAll:
      return {IndexSet::Kind::kAll, n, n};
    case Select::Kind::kRandom:
      return read_random(kernels, in, n);
    case Select::Kind::kMask:
      if (select.n != n)
        throw Malformed{"the mask has another number of elements than its group", in.offset()};
      return mask_set(kernels, select, n);
    case Select::Kind::kStructured:
      return read_channels(kernels, in, n, channels_of(tensor, select.axis));
    default:
      return checks_tiles ? read_tiles(kernels, in, n) : open_tiles(in, n);
  }
}

// One window of positions, and the largest coded set of a tile.
struct Room {
  bool window = false;
  uint64_t coded = 0;

  void add(const IndexSet& set) {
    window |= set.kind != IndexSet::Kind::kAll;
    coded = std::max(coded, set.largest);
  }
};

class Positions {
 public:
  explicit Positions(const Kernels& kernels) : kernels_(kernels) {}

  // All that `for_each` allocates.
  void reserve(const Room& room) {
    if (room.window && !window_) window_ = buffer<uint32_t>(kWindow);
    if (room.coded > capacity_) {
      coded_ = buffer<uint32_t>(room.coded);
      capacity_ = room.coded;
    }
  }

  // Calls f(base, positions, count) in ascending order for those in [begin, end), which are n or
  // multiples of the set's step; the positions count from base, and f may change them.
  template <class F>
  void for_each(const IndexSet& set, uint64_t begin, uint64_t end, F&& f) {
    if (begin == end) return;
    if (set.kind == IndexSet::Kind::kBits)
      return bitmap(set.bits + begin / 8, begin, end - begin, f);
    Reader headers = set.entries[begin / set.step].headers;
    Reader data = set.entries[begin / set.step].data;
    for_each_tile(begin, end, set.t, [&](uint64_t start, uint64_t length) {
      const Tile tile = read_header(headers, set.t, length);
      const uint8_t* bytes = data.take(tile_bytes(tile, length), "a tile");
      if (tile.mode == kBitmap) return bitmap(bytes, start, length, f);
      unpack(tile, bytes);
      if (tile.complement) return others(tile.coded, start, length, f);
      if (tile.coded > 0) f(start, coded_.get(), static_cast<size_t>(tile.coded));
    });
  }

 private:
  void unpack(const Tile& tile, const uint8_t* bytes) {
    if (tile.mode == kRice) {
      if (tile.coded == 0) return;
      const uint8_t* unary = bytes + ceil_div(tile.coded * tile.r, 8);
      kernels_.unpack_rice(bytes, unary, tile.coded, tile.r, coded_.get());
      return;
    }
    for (size_t i = 0; i < tile.coded; ++i) {
      uint16_t position;
      std::memcpy(&position, bytes + 2 * i, 2);
      coded_[i] = position;
    }
  }

  template <class F>
  void bitmap(const uint8_t* bits, uint64_t start, uint64_t length, F& f) {
    for (uint64_t at = 0; at < length; at += kWindow) {
      const size_t n = std::min<uint64_t>(kWindow, length - at);
      const size_t count = kernels_.unpack_bitmap(bits + at / 8, n, window_.get());
      if (count > 0) f(start + at, window_.get(), count);
    }
  }

  template <class F>
  void others(uint64_t coded, uint64_t start, uint64_t length, F& f) {
    uint32_t* next = coded_.get();
    uint32_t* end = next + coded;
    for (uint64_t at = 0; at < length; at += kWindow) {
      const size_t n = std::min<uint64_t>(kWindow, length - at);
      uint32_t* first = next;
      for (; next != end && *next < at + n; ++next) *next -= static_cast<uint32_t>(at);
      const size_t count =
          kernels_.complement(first, static_cast<size_t>(next - first), n, window_.get());
      if (count > 0) f(start + at, window_.get(), count);
    }
  }

  const Kernels& kernels_;
  std::unique_ptr<uint32_t[]> window_, coded_;
  uint64_t capacity_ = 0;
};

// Deals the ascending positions of a group out to its tensors.
class Dealer {
 public:
  Dealer(std::span<const Tensor> tensors, std::span<const size_t> members)
      : tensors_(tensors), members_(members) {}

  // Calls f(member, at, positions, count): the positions count from element `at` of the member.
  template <class F>
  void deal(uint64_t base, uint32_t* positions, size_t count, F&& f) {
    uint32_t* end = positions + count;
    while (positions != end) {
      while (base + *positions >= start_ + tensors_[members_[member_]].n) {
        start_ += tensors_[members_[member_++]].n;
      }
      const uint64_t stop = start_ + tensors_[members_[member_]].n;
      uint32_t* next = base + end[-1] < stop ? end : std::lower_bound(positions, end, stop - base);
      if (start_ > base) {
        const uint32_t skipped = static_cast<uint32_t>(start_ - base);
        for (uint32_t* p = positions; p != next; ++p) *p -= skipped;
      }
      f(member_, base > start_ ? base - start_ : 0, positions,
        static_cast<size_t>(next - positions));
      positions = next;
    }
  }

 private:
  std::span<const Tensor> tensors_;
  std::span<const size_t> members_;
  size_t member_ = 0;
  uint64_t start_ = 0;  // of the member, in the group
};

}  // namespace
}  // namespace fedcodec
