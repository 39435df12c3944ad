// Index sets in the wire's tiles: a block of threads for each tile.
#include <algorithm>
#include <cub/cub.cuh>
#include <vector>

#include "device-inl.cuh"
#include "kernels.h"
#include "scan-inl.cuh"

namespace fedcodec::cuda {
namespace {

using Scan = cub::BlockScan<uint32_t, kThreads>;

constexpr unsigned kRun = 8;                 // positions that a thread takes at a time
constexpr unsigned kStep = kRun * kThreads;  // and all threads
constexpr unsigned kBatch = 32 * kThreads;   // bits of a string that all threads take at a time
constexpr unsigned kOthersRun = 32;          // elements that a thread takes at a time

// How many of the n ascending positions are below `end`.
__device__ uint64_t count_below(const uint32_t* positions, uint64_t n, uint64_t end) {
  return first_where(n, [=](uint64_t i) { return positions[i] >= end; });
}

// Calls f(v, i) for all v in [begin, end) that are not among the n ascending positions, i of which
// are below v.
template <class F>
__device__ void for_each_other(const uint32_t* positions, uint64_t n, uint64_t begin, uint64_t end,
                               F f) {
  for (uint64_t run = begin + kOthersRun * threadIdx.x; run < end; run += kOthersRun * kThreads) {
    const uint64_t stop = std::min(run + kOthersRun, end);
    uint64_t i = count_below(positions, n, run);
    for (uint64_t v = run; v < stop; ++v) {
      if (i < n && positions[i] == v) {
        ++i;
      } else {
        f(v, i);
      }
    }
  }
}

// --- planning
// -----------------------------------------------------------------------------------------------------

// What a tile codes, from its start.
struct Positions {
  const uint32_t* at;
  uint32_t start;  // what `at` counts from

  __device__ uint32_t operator[](uint64_t i) const { return at[i] - start; }
  __device__ uint32_t gap(uint64_t i) const { return at[i] - (i == 0 ? start : at[i - 1] + 1); }
};

struct GapSums {
  uint32_t of[3];  // all gaps of a tile together are below 2^31

  __device__ GapSums operator+(const GapSums& other) const {
    return {{of[0] + other.of[0], of[1] + other.of[1], of[2] + other.of[2]}};
  }
};

__global__ void __launch_bounds__(kThreads)
    plan_slots(const uint64_t* sizes, const uint64_t* first_slots, uint32_t groups,
               const uint64_t* begins, Plans plans, uint64_t* header_sizes, uint64_t* data_sizes) {
  using Reduce = cub::BlockReduce<GapSums, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const uint64_t slot = blockIdx.x;
  const uint32_t group = first_where(groups, [=](uint32_t g) { return first_slots[g] > slot; }) - 1;
  const uint64_t n = sizes[group];
  const uint64_t kept_of_group = begins[group + 1] - begins[group];
  const unsigned t = tile_bits(n, kept_of_group);
  const uint64_t start = (slot - first_slots[group]) << t;
  if (start >= n) return;
  const uint64_t length = std::min(uint64_t{1} << t, n - start);

  const uint32_t* const of_group = plans.positions + begins[group];
  const uint64_t before = count_below(of_group, kept_of_group, start);
  const uint64_t kept =
      count_below(of_group + before, std::min(length, kept_of_group - before), start + length);
  const uint64_t begin = begins[group] + before;
  const bool complement = codes_complement(kept, length);
  const uint64_t c = complement ? length - kept : kept;
  Positions coded = {plans.positions + begin, static_cast<uint32_t>(start)};
  if (complement) {
    // They are fewer than the kept ones, whose place they take.
    uint32_t* const others = plans.others + begin;
    for_each_other(coded.at, kept, start, start + length, [=](uint64_t v, uint64_t i) {
      others[v - start - i] = static_cast<uint32_t>(v - start);
    });
    __syncthreads();
    coded = {others, 0};
  }

  const RiceRange range = c > 0 ? rice_range(coded[c - 1], c) : RiceRange{};
  GapSums sums = {};
  for (uint64_t i = threadIdx.x; i < c; i += kThreads) {
    const uint32_t gap = coded.gap(i) >> range.least;
    sums = sums + GapSums{{gap, gap >> 1, gap >> 2}};
  }
  sums = Reduce(storage).Sum(sums);
  if (threadIdx.x != 0) return;
  const uint64_t wide[3] = {sums.of[0], sums.of[1], sums.of[2]};
  const Tile tile = choose_tile(t, length, kept, range, wide);
  plans.tiles[slot] = {tile, begin, start, static_cast<uint32_t>(length), group};
  header_sizes[slot] = header_bytes(tile);
  data_sizes[slot] = tile_bytes(tile, length);
}

__global__ void __launch_bounds__(kThreads)
    sum_up_sets(const uint64_t* sizes, const uint64_t* first_slots, uint32_t groups,
                const uint64_t* begins, Plans plans) {
  const uint64_t group = thread_number();
  if (group >= groups) return;
  const uint64_t first = first_slots[group];
  const uint64_t end = first_slots[group + 1];
  const unsigned t = tile_bits(sizes[group], begins[group + 1] - begins[group]);
  const uint64_t tiles = ceil_div(sizes[group], uint64_t{1} << t);
  plans.sets[group] = {plans.headers_before[end] - plans.headers_before[first],
                       plans.data_before[end] - plans.data_before[first], first,
                       static_cast<uint32_t>(tiles), t};
}

uint64_t* sums_before(const uint64_t* sizes, uint64_t n, Workspace& workspace) {
  uint64_t* const sums = workspace.array<uint64_t>(n);
  sum_up_before(sizes, sums, n, workspace);
  return sums;
}

// --- writing
// ------------------------------------------------------------------------------------------------------

// Ors values into a zeroed bit string, at ascending bits. A word may have bits of other threads.
class BitWriter {
 public:
  __device__ explicit BitWriter(uint8_t* string) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(string);
    words_ = reinterpret_cast<uint32_t*>(address - address % 4);
    skipped_ = 8 * (address % 4);
  }
  __device__ ~BitWriter() { flush(); }

  __device__ void put(uint64_t at, uint32_t value) {
    at += skipped_;
    const uint64_t bits = uint64_t{value} << at % 32;
    move_to(at / 32);
    pending_ |= static_cast<uint32_t>(bits);
    if (bits >> 32 != 0) {
      move_to(at / 32 + 1);
      pending_ = static_cast<uint32_t>(bits >> 32);
    }
  }

 private:
  __device__ void move_to(uint64_t word) {
    if (word == word_) return;
    flush();
    word_ = word;
    pending_ = 0;
  }
  __device__ void flush() {
    if (pending_ != 0) atomicOr(words_ + word_, pending_);
  }

  uint32_t* words_;
  uint64_t skipped_;
  uint64_t word_ = 0;
  uint32_t pending_ = 0;
};

__device__ void write_rice(const Tile& tile, const Positions& coded, uint8_t* data) {
  __shared__ typename Scan::TempStorage storage;
  uint8_t* const unary = data + ceil_div(tile.coded * tile.r, 8);
  const uint32_t mask = (1u << tile.r) - 1;
  uint64_t quotients = 0;  // of the steps before
  for (uint64_t step = 0; step < tile.coded; step += kStep) {
    const uint64_t begin = std::min(step + kRun * threadIdx.x, tile.coded);
    const uint64_t end = std::min(begin + kRun, tile.coded);
    uint32_t own = 0, before, all;
    for (uint64_t i = begin; i < end; ++i) own += coded.gap(i) >> tile.r;
    Scan(storage).ExclusiveSum(own, before, all);
    uint64_t bit = quotients + before + begin;
    BitWriter ones(unary), remainders(data);
    for (uint64_t i = begin; i < end; ++i, ++bit) {
      const uint32_t gap = coded.gap(i);
      bit += gap >> tile.r;
      ones.put(bit, 1);
      remainders.put(i * tile.r, gap & mask);
    }
    quotients += all;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    write_data(Plans plans, const uint64_t* offsets, uint8_t* out) {
  const PlannedTile& planned = plans.tiles[blockIdx.x];
  if (planned.length == 0) return;
  const Tile tile = planned.tile;
  const PlannedSet& set = plans.sets[planned.group];
  uint8_t* const data = out + (offsets[planned.group] + 1 + set.header_bytes +
                               (plans.data_before[blockIdx.x] - plans.data_before[set.first_tile]));
  const Positions coded = tile.complement ? Positions{plans.others + planned.begin, 0}
                                          : Positions{plans.positions + planned.begin,
                                                      static_cast<uint32_t>(planned.start)};
  if (tile.mode == kRice) return write_rice(tile, coded, data);
  for (uint64_t run = kRun * threadIdx.x; run < tile.coded; run += kStep) {
    const uint64_t end = std::min(run + kRun, tile.coded);
    BitWriter bits(data);
    for (uint64_t i = run; i < end; ++i) {
      if (tile.mode == kList) {
        bits.put(16 * i, coded[i]);
      } else {
        bits.put(coded[i], 1);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    write_headers(Plans plans, uint32_t groups, const uint64_t* offsets, uint8_t* out) {
  const uint64_t i = thread_number();
  if (i < groups) out[offsets[i]] = static_cast<uint8_t>(plans.sets[i].t);
  if (i >= plans.slots || plans.tiles[i].length == 0) return;
  const PlannedTile& planned = plans.tiles[i];
  const uint64_t before =
      plans.headers_before[i] - plans.headers_before[plans.sets[planned.group].first_tile];
  put_header(out + (offsets[planned.group] + 1 + before), planned.tile);
}

// --- reading
// ------------------------------------------------------------------------------------------------------

// Word i of a string of n bytes, with zeros behind it. The string has no alignment, and nothing
// beside it may be read.
__device__ uint32_t load_word(const uint8_t* string, uint64_t n, uint64_t i) {
  uint32_t word = 0;
  for (unsigned j = 0; j < 4; ++j) {
    if (4 * i + j < n) word |= static_cast<uint32_t>(string[4 * i + j]) << 8 * j;
  }
  return word;
}

__device__ uint32_t remainder_of(const uint8_t* remainders, uint64_t i, unsigned r) {
  const uint8_t* const at = remainders + i * r / 8;
  const unsigned skipped = static_cast<unsigned>(i * r % 8);
  uint64_t bits = 0;
  for (unsigned j = 0; 8 * j < skipped + r; ++j) bits |= static_cast<uint64_t>(at[j]) << 8 * j;
  return static_cast<uint32_t>(bits >> skipped) & ((1u << r) - 1);
}

__device__ uint32_t listed(const uint8_t* list, uint64_t i) {
  return list[2 * i] | static_cast<uint32_t>(list[2 * i + 1]) << 8;
}

// The bits of a bitmap, or the unary string.
struct BitString {
  const uint8_t* bytes;
  uint64_t bits;

  __device__ uint64_t n_bytes() const { return ceil_div(bits, 8); }
  __device__ uint32_t word(uint64_t i) const { return load_word(bytes, n_bytes(), i); }
  __device__ bool is_padded() const { return bits % 8 == 0 || bytes[bits / 8] >> bits % 8 == 0; }
};

__device__ BitString string_of(const CodedTile& coded) {
  if (coded.tile.mode == kBitmap) return {coded.data, coded.length};
  return {coded.data + ceil_div(coded.tile.coded * coded.tile.r, 8), coded.tile.unary};
}

__global__ void __launch_bounds__(kThreads)
    check_data(const CodedTile* tiles, uint32_t* malformed) {
  using Reduce = cub::BlockReduce<uint64_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const CodedTile& coded = tiles[blockIdx.x];
  const Tile tile = coded.tile;
  const auto refuse = [=] { atomicMin(malformed, static_cast<uint32_t>(blockIdx.x)); };
  if (tile.mode == kList) {
    for (uint64_t i = threadIdx.x; i < tile.coded; i += kThreads) {
      const uint32_t end = i + 1 < tile.coded ? listed(coded.data, i + 1) : coded.length;
      if (listed(coded.data, i) >= end) refuse();
    }
    return;
  }
  if (tile.mode == kRice && tile.coded == 0) return;
  const BitString string = string_of(coded);
  uint64_t ones = 0, remainders = 0;
  for (uint64_t i = threadIdx.x; 32 * i < string.bits; i += kThreads)
    ones += static_cast<uint64_t>(__popc(string.word(i)));
  ones = Reduce(storage).Sum(ones);
  if (tile.r > 0) {
    for (uint64_t i = threadIdx.x; i < tile.coded; i += kThreads)
      remainders += remainder_of(coded.data, i, tile.r);
  }
  __syncthreads();
  remainders = Reduce(storage).Sum(remainders);
  if (threadIdx.x != 0) return;
  bool valid = string.is_padded() && ones == tile.coded;
  if (valid && tile.mode == kRice) {
    const BitString unpadded = {coded.data, tile.coded * tile.r};
    const uint64_t last = tile.unary - 1;
    valid = unpadded.is_padded() && (string.bytes[last / 8] >> last % 8 & 1) != 0 &&
            rice_ends_within(tile, coded.length, remainders);
  }
  if (!valid) refuse();
}

// Writes what a tile keeps of its elements [begin, end), given those that it codes there: `count`
// positions, after `first` others.
__device__ void write_kept_of(const CodedTile& coded, const uint32_t* batch, uint32_t count,
                              uint64_t first, uint64_t begin, uint64_t end, uint32_t* out) {
  out += coded.before;
  const uint64_t start = coded.start;
  if (coded.tile.complement) {
    for_each_other(batch, count, begin, end, [=](uint64_t v, uint64_t i) {
      out[v - first - i] = static_cast<uint32_t>(start + v);
    });
  } else {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads)
      out[first + i] = static_cast<uint32_t>(start + batch[i]);
  }
}

__global__ void __launch_bounds__(kThreads) unpack(const CodedTile* tiles, uint32_t* out) {
  __shared__ uint32_t batch[kBatch];
  __shared__ typename Scan::TempStorage storage;
  const CodedTile& coded = tiles[blockIdx.x];
  const Tile tile = coded.tile;
  const BitString string = string_of(coded);
  uint64_t done = 0;        // coded positions of the batches before
  uint64_t seen = 0;        // elements up to the last of those
  uint32_t remainders = 0;  // the sum of theirs
  for (uint64_t word = threadIdx.x; done < tile.coded; word += kThreads) {
    uint32_t count;
    if (tile.mode == kList) {
      count = static_cast<uint32_t>(std::min(tile.coded - done, uint64_t{kBatch}));
      for (uint32_t i = threadIdx.x; i < count; i += kThreads)
        batch[i] = listed(coded.data, done + i);
    } else {
      // Position i is the quotients up to its own, which is (bit of its one - i), << r, and i, and
      // the remainders up to its own. A bitmap is that for r = 0.
      uint32_t ones = string.word(word);
      uint32_t rank;
      Scan(storage).ExclusiveSum(static_cast<uint32_t>(__popc(ones)), rank, count);
      for (; ones != 0; ones &= ones - 1, ++rank) {
        const uint32_t i = static_cast<uint32_t>(done) + rank;
        const uint32_t bit = static_cast<uint32_t>(32 * word) +
                             static_cast<uint32_t>(__ffs(static_cast<int>(ones)) - 1);
        batch[rank] = ((bit - i) << tile.r) + i;
      }
    }
    __syncthreads();
    for (uint32_t step = 0; tile.r > 0 && step < count; step += kStep) {
      const uint32_t begin = std::min(step + kRun * threadIdx.x, count);
      const uint32_t end = std::min(begin + kRun, count);
      uint32_t own = 0, before, all;
      for (uint32_t i = begin; i < end; ++i) {
        own += remainder_of(coded.data, done + i, tile.r);
        batch[i] += own;
      }
      Scan(storage).ExclusiveSum(own, before, all);
      for (uint32_t i = begin; i < end; ++i) batch[i] += remainders + before;
      remainders += all;
      __syncthreads();
    }
    const uint64_t end = count > 0 ? uint64_t{batch[count - 1]} + 1 : seen;
    write_kept_of(coded, batch, count, done, seen, end, out);
    done += count;
    seen = end;
    __syncthreads();
  }
  write_kept_of(coded, nullptr, 0, done, seen, coded.length, out);
}

}  // namespace

Plans plan_tiles(std::span<const uint64_t> sizes, const uint64_t* begins, const uint32_t* positions,
                 uint64_t kept_at_most, Workspace& workspace) {
  std::vector<uint64_t> first_slots = {0};
  for (const uint64_t n : sizes)
    first_slots.push_back(first_slots.back() + ceil_div(n, uint64_t{1} << kMinTileBits));
  const uint32_t groups = static_cast<uint32_t>(sizes.size());
  const uint64_t* const n = workspace.upload(sizes);
  const uint64_t* const firsts = workspace.upload(first_slots);

  Plans plans = {};
  plans.slots = first_slots.back();
  plans.tiles = workspace.zeros<PlannedTile>(plans.slots);
  plans.sets = workspace.array<PlannedSet>(groups);
  plans.positions = positions;
  plans.others = workspace.array<uint32_t>(kept_at_most);
  uint64_t* const header_sizes = workspace.zeros<uint64_t>(plans.slots + 1);
  uint64_t* const data_sizes = workspace.zeros<uint64_t>(plans.slots + 1);
  launch(plan_slots, plans.slots, workspace.stream(), n, firsts, groups, begins, plans,
         header_sizes, data_sizes);
  plans.headers_before = sums_before(header_sizes, plans.slots + 1, workspace);
  plans.data_before = sums_before(data_sizes, plans.slots + 1, workspace);
  launch(sum_up_sets, ceil_div(groups, kThreads), workspace.stream(), n, firsts, groups, begins,
         plans);
  return plans;
}

void write_tiles(const Plans& plans, uint32_t groups, const uint64_t* offsets, uint8_t* out,
                 Workspace& workspace) {
  launch(write_data, plans.slots, workspace.stream(), plans, offsets, out);
  launch(write_headers, ceil_div(std::max<uint64_t>(plans.slots, groups), kThreads),
         workspace.stream(), plans, groups, offsets, out);
}

void check_tiles(const CodedTile* tiles, uint64_t n, uint32_t* malformed, Workspace& workspace) {
  launch(check_data, n, workspace.stream(), tiles, malformed);
}

void unpack_tiles(const CodedTile* tiles, uint64_t n, uint32_t* positions, Workspace& workspace) {
  launch(unpack, n, workspace.stream(), tiles, positions);
}

}  // namespace fedcodec::cuda
