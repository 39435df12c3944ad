// Selection: exact order statistics of magnitudes, and what is kept, in order.
//
// Groups of a call go through the same launches; they have fewer than 2^32 elements each. Blocks
// walk runs of chunks. A thread holds kPerThread elements of a chunk: four rounds of four
// neighbours.
#include <cub/cub.cuh>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "fedcodec/arith.h"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

constexpr unsigned kRounds = 4;
constexpr unsigned kNeighbours = kPerThread / kRounds;
static_assert(kNeighbours == 4);

constexpr unsigned kDigitBits = 11;
constexpr unsigned kDigits = 1u << kDigitBits;
template <class W>
constexpr unsigned kKeyBits = 8 * sizeof(W) - 1;

// About what a device runs at once; more chunks than that share blocks, and what a block does once.
constexpr uint64_t kMostBlocks = 2048;
constexpr uint64_t blocks_of(uint64_t chunks) { return std::min(chunks, kMostBlocks); }

__device__ unsigned lane() { return threadIdx.x % 32; }
__device__ unsigned lanes_before() { return (1u << lane()) - 1; }
__device__ unsigned count_ones(unsigned mask) { return static_cast<unsigned>(__popc(mask)); }

// --- parts and chunks ---

// The first of [first, last) for which `holds`, which holds for all from there on.
template <class F>
__device__ uint32_t first_where(uint32_t first, uint32_t last, F holds) {
  while (first < last) {
    const uint32_t middle = first + (last - first) / 2;
    if (holds(middle)) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

__device__ uint32_t part_of_chunk(const Parts& parts, uint32_t chunk) {
  return first_where(0, parts.count,
                     [&](uint32_t p) { return parts.parts[p].first_chunk > chunk; }) -
         1;
}

__device__ uint32_t first_part_of(const Parts& parts, uint32_t group) {
  return first_where(0, parts.count, [&](uint32_t p) { return parts.parts[p].group >= group; });
}

// Calls f(chunk, part, at, n) for the chunks of one of so many blocks: n elements of the part from
// `at` on.
template <class F>
__device__ void for_chunks(const Parts& parts, uint32_t block, uint32_t blocks, F f) {
  const auto begin = static_cast<uint32_t>(uint64_t{parts.chunks} * block / blocks);
  const auto end = static_cast<uint32_t>(uint64_t{parts.chunks} * (block + 1) / blocks);
  if (begin == end) return;
  uint32_t p = part_of_chunk(parts, begin);
  for (uint32_t chunk = begin; chunk < end; ++chunk) {
    while (p + 1 < parts.count && parts.parts[p + 1].first_chunk <= chunk) ++p;
    const Part& part = parts.parts[p];
    const uint64_t at = uint64_t{chunk - part.first_chunk} * kChunkElements;
    f(chunk, part, at, static_cast<unsigned>(std::min<uint64_t>(kChunkElements, part.n - at)));
  }
}

// --- elements ---

template <class W>
constexpr Dtype kHeldAs = std::is_same_v<W, float> ? Dtype::kFloat32 : Dtype::kFloat64;

template <Dtype kHeld>
using Raw = std::conditional_t<kHeld == Dtype::kFloat32, float,
                               std::conditional_t<kHeld == Dtype::kFloat64, double, uint16_t>>;

template <Dtype kHeld>
__device__ auto widened(Raw<kHeld> raw) {
  if constexpr (kHeld == Dtype::kFloat16) {
    return f16_to_f32(raw);
  } else if constexpr (kHeld == Dtype::kBfloat16) {
    return bf16_to_f32(raw);
  } else {
    return raw;
  }
}

// The number, in its chunk, of a thread's element.
__device__ unsigned index_of(unsigned i) {
  return (i / kNeighbours * kThreads + threadIdx.x) * kNeighbours + i % kNeighbours;
}

// Bit i is set where the thread's element i is one of the chunk's n.
__device__ unsigned valid(unsigned n) {
  unsigned mask = 0;
  for (unsigned round = 0; round < kRounds; ++round) {
    const unsigned first = index_of(round * kNeighbours);
    const unsigned left = n > first ? std::min(n - first, unsigned{kNeighbours}) : 0;
    mask |= ((1u << left) - 1) << (round * kNeighbours);
  }
  return mask;
}

// What a pointer that was itself in memory points to, the compiler cannot tell.
template <class T>
__device__ T* in_device_memory(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Elements that are not there are 0.
template <Dtype kHeld, class W>
__device__ void load_as(const void* data, uint64_t at, unsigned n, W (&x)[kPerThread]) {
  struct alignas(std::min(sizeof(Raw<kHeld>) * kNeighbours, size_t{16})) Neighbours {
    Raw<kHeld> raw[kNeighbours];
  };
  const Raw<kHeld>* const from = in_device_memory(static_cast<const Raw<kHeld>*>(data) + at);
  if (n == kChunkElements && reinterpret_cast<uintptr_t>(from) % alignof(Neighbours) == 0) {
    Neighbours all[kRounds];
    for (unsigned round = 0; round < kRounds; ++round)
      all[round] = reinterpret_cast<const Neighbours*>(from)[round * kThreads + threadIdx.x];
    for (unsigned i = 0; i < kPerThread; ++i)
      x[i] = static_cast<W>(widened<kHeld>(all[i / kNeighbours].raw[i % kNeighbours]));
  } else {
    for (unsigned i = 0; i < kPerThread; ++i)
      x[i] = index_of(i) < n ? static_cast<W>(widened<kHeld>(from[index_of(i)])) : W{0};
  }
}

template <class W>
__device__ void load(const void* data, Dtype held, uint64_t at, unsigned n, W (&x)[kPerThread]) {
  if (held == Dtype::kFloat32) return load_as<Dtype::kFloat32>(data, at, n, x);
  if (held == Dtype::kFloat16) return load_as<Dtype::kFloat16>(data, at, n, x);
  if (held == Dtype::kBfloat16) return load_as<Dtype::kBfloat16>(data, at, n, x);
  if constexpr (std::is_same_v<W, double>) load_as<Dtype::kFloat64>(data, at, n, x);
}

template <class W>
__device__ void store(W* to, unsigned n, const W (&x)[kPerThread]) {
  struct alignas(16) Neighbours {
    W values[kNeighbours];
  };
  if (n == kChunkElements && reinterpret_cast<uintptr_t>(to) % alignof(Neighbours) == 0) {
    for (unsigned round = 0; round < kRounds; ++round) {
      Neighbours some;
      for (unsigned i = 0; i < kNeighbours; ++i) some.values[i] = x[round * kNeighbours + i];
      reinterpret_cast<Neighbours*>(to)[round * kThreads + threadIdx.x] = some;
    }
  } else {
    for (unsigned i = 0; i < kPerThread; ++i) {
      if (index_of(i) < n) to[index_of(i)] = x[i];
    }
  }
}

// One element's bits, so that several can be asked for before one is waited for.
__device__ uint64_t raw_at(const Part& part, uint64_t at) {
  const void* const data = in_device_memory(part.data);
  if (part.held == Dtype::kFloat32) return static_cast<const uint32_t*>(data)[at];
  if (part.held == Dtype::kFloat64) return static_cast<const uint64_t*>(data)[at];
  return static_cast<const uint16_t*>(data)[at];
}

template <class W>
__device__ W value_of(uint64_t raw, Dtype held) {
  if (held == Dtype::kFloat32) return static_cast<W>(bit_cast<float>(static_cast<uint32_t>(raw)));
  if (held == Dtype::kFloat64) return static_cast<W>(bit_cast<double>(raw));
  const auto half = static_cast<uint16_t>(raw);
  return static_cast<W>(held == Dtype::kFloat16 ? f16_to_f32(half) : bf16_to_f32(half));
}

template <class W, class F>
__device__ unsigned mask_of(const W (&x)[kPerThread], F holds) {
  unsigned mask = 0;
  for (unsigned i = 0; i < kPerThread; ++i) mask |= static_cast<unsigned>(holds(key_of(x[i]))) << i;
  return mask;
}

template <class W>
__device__ bool is_finite(W x) {
  return key_of(x) < key_of(static_cast<W>(INFINITY));
}

// --- order within a chunk ---

// How many of the chunk's marked elements come before each of a thread's rounds, 16 bits a round.
struct Order {
  uint64_t before;
  unsigned total;

  __device__ unsigned before_round(unsigned round) const {
    return static_cast<unsigned>(before >> (16 * round)) & 0xffffu;
  }
};

__device__ unsigned in_round(unsigned mask, unsigned round) {
  return mask >> (round * kNeighbours) & ((1u << kNeighbours) - 1);
}

// How many of the thread's round, from its element i on backwards.
__device__ unsigned in_round_before(unsigned mask, unsigned i) {
  return count_ones(in_round(mask & ((1u << i) - 1), i / kNeighbours));
}

// Begins with a barrier.
__device__ Order order_of(unsigned mask) {
  using Scan = cub::BlockScan<uint64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  uint64_t counts = 0;
  for (unsigned round = 0; round < kRounds; ++round)
    counts |= uint64_t{count_ones(in_round(mask, round))} << (16 * round);
  uint64_t before = 0;
  uint64_t totals = 0;
  __syncthreads();
  Scan(storage).ExclusiveSum(counts, before, totals);
  constexpr uint64_t kOfRoundsBefore = 0x0001000100010000u;
  return {before + totals * kOfRoundsBefore,
          static_cast<unsigned>(totals * (kOfRoundsBefore | 1) >> 48)};
}

// --- candidates: what may be among the largest of a group ---

// What the host says of a group.
struct Wanted {
  uint64_t room;  // where its room for candidates begins, which ends where the next group's does
  uint32_t n;
  uint32_t k;
  uint32_t rank;  // of the bound in the sample; 0: no candidates are looked for
};

// A chunk's candidates, in order.
struct Listed {
  uint32_t group;
  uint32_t first;  // the number of the chunk's first element in its group
  uint32_t begin;  // in its group's room
  uint32_t count;
};

template <class W>
struct Shortlist {
  const Wanted* wanted;  // groups + 1; null: there is no list
  uint32_t groups;
  uint32_t rooms;     // chunks of all groups' room
  KeyOf<W>* bounds;   // candidates are not below
  uint32_t* found;    // candidates, those included that found no room
  Listed* chunks;     // of the parts
  W* values;          // of the candidates
  uint16_t* offsets;  // of the candidates in their chunks

  // Whether the list has the k largest of a group, and so stands for its elements.
  __device__ bool stands_for(uint32_t group) const {
    if (wanted == nullptr) return false;
    const Wanted* const of_group = wanted + group;
    return found[group] >= of_group->k && found[group] <= of_group[1].room - of_group->room;
  }
};

// --- radix selection ---

// The digit that a round finds: `known` bits of the keys are not known before, `shift` after.
struct Round {
  unsigned known;
  unsigned shift;
};

// Adds to a block's bins, by whole warps. Lanes with the digit of the first need not wait for each
// other: often they are the most.
__device__ void count_digit(uint32_t* bins, bool counted, uint32_t digit) {
  const unsigned all = __ballot_sync(~0u, counted);
  if (all == 0) return;
  const unsigned first = static_cast<unsigned>(__ffs(static_cast<int>(all))) - 1;
  const uint32_t digit_of_first = __shfl_sync(~0u, digit, static_cast<int>(first));
  const bool common = counted && digit == digit_of_first;
  const unsigned same = __ballot_sync(~0u, common);
  if (common ? lane() == first : counted) atomicAdd(bins + digit, common ? count_ones(same) : 1u);
}

template <class Key>
__device__ void count_key(uint32_t* bins, bool counted, Key key, Key prefix, Round round) {
  const auto digit =
      static_cast<uint32_t>(key >> round.shift & ((Key{1} << (round.known - round.shift)) - 1));
  count_digit(bins, counted && key >> round.known == prefix, digit);
}

struct Digit {
  uint32_t digit;
  uint32_t above;  // keys with larger ones
};

// The digit of the key of a rank from the largest. 0 where there are not so many.
__device__ Digit digit_of(const uint32_t* bins, uint64_t rank) {
  constexpr unsigned kOwn = kDigits / kThreads;
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ Digit found;
  const unsigned last = kDigits - 1 - kOwn * threadIdx.x;
  uint32_t counts[kOwn];
  uint32_t sum = 0;
  for (unsigned i = 0; i < kOwn; ++i) sum += counts[i] = bins[last - i];
  uint32_t above = 0;
  if (threadIdx.x == 0) found = {0, 0};
  __syncthreads();
  Scan(storage).ExclusiveSum(sum, above);
  for (unsigned i = 0; i < kOwn; ++i) {
    if (above < rank && rank <= above + counts[i]) found = {last - i, above};
    above += counts[i];
  }
  __syncthreads();
  return found;
}

template <class W>
__global__ void count_digits(Parts parts, Shortlist<W> list, uint32_t list_blocks, Cuts<W> cuts,
                             Round round, uint32_t* bins) {
  __shared__ uint32_t own[kDigits];
  for (unsigned i = threadIdx.x; i < kDigits; i += kThreads) own[i] = 0;
  uint32_t group = 0;
  const auto add = [&] {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kDigits; i += kThreads) {
      if (own[i] != 0) atomicAdd(bins + uint64_t{group} * kDigits + i, own[i]);
      own[i] = 0;
    }
    __syncthreads();
  };
  const auto count = [&](const W(&x)[kPerThread], unsigned n) {
    const KeyOf<W> prefix = cuts.keys[group] >> round.known;
    const unsigned here = valid(n);
    for (unsigned i = 0; i < kPerThread; ++i)
      count_key(own, (here >> i & 1) != 0, key_of(x[i]), prefix, round);
  };
  const auto enter = [&](uint32_t next) {
    if (next != group) add();
    group = next;
  };
  __syncthreads();
  if (blockIdx.x < list_blocks) {
    for (uint32_t chunk = blockIdx.x; chunk < list.rooms; chunk += list_blocks) {
      const uint64_t at = uint64_t{chunk} * kChunkElements;
      const uint32_t of =
          first_where(0, list.groups, [&](uint32_t g) { return list.wanted[g + 1].room > at; });
      const uint64_t end = list.wanted[of].room + list.found[of];
      if (!list.stands_for(of) || at >= end) continue;
      enter(of);
      W x[kPerThread];
      const auto n = static_cast<unsigned>(std::min<uint64_t>(kChunkElements, end - at));
      load_as<kHeldAs<W>>(list.values, at, n, x);
      count(x, n);
    }
  } else {
    for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
               [&](uint32_t, const Part& part, uint64_t at, unsigned n) {
                 if (list.stands_for(part.group) || cuts.ties[part.group] == 0) return;
                 enter(part.group);
                 W x[kPerThread];
                 load(part.data, part.held, at, n, x);
                 count(x, n);
               });
  }
  add();
}

// Clears the bins for the next round.
template <class W>
__global__ void fix_digit(Cuts<W> cuts, Round round, bool drop_zeros, uint32_t* bins) {
  const uint32_t group = blockIdx.x;
  const uint64_t rank = cuts.ties[group];
  if (rank == 0) {
    if (threadIdx.x == 0) cuts.keys[group] = ~KeyOf<W>{0};
    return;
  }
  uint32_t* const own = bins + uint64_t{group} * kDigits;
  const Digit found = digit_of(own, rank);
  for (unsigned i = threadIdx.x; i < kDigits; i += kThreads) own[i] = 0;
  if (threadIdx.x == 0) {
    const KeyOf<W> key = cuts.keys[group] | static_cast<KeyOf<W>>(found.digit) << round.shift;
    cuts.keys[group] = key;
    cuts.ties[group] = drop_zeros && round.shift == 0 && key == 0 ? 0 : rank - found.above;
  }
}

// The cuts that keep as many as ties[g] says, which changes.
template <class W>
Cuts<W> cuts_of(const Parts& parts, const Shortlist<W>& list, uint64_t* ties, bool drop_zeros,
                Workspace& workspace) {
  const Cuts<W> cuts = {workspace.zeros<KeyOf<W>>(parts.groups), ties};
  auto* const bins = workspace.zeros<uint32_t>(uint64_t{parts.groups} * kDigits);
  const uint64_t list_blocks = blocks_of(list.rooms);
  for (unsigned known = kKeyBits<W>; known > 0;) {
    const Round round = {known, known > kDigitBits ? known - kDigitBits : 0};
    launch(count_digits<W>, list_blocks + blocks_of(parts.chunks), workspace.stream(), parts, list,
           list_blocks, cuts, round, bins);
    launch(fix_digit<W>, parts.groups, workspace.stream(), cuts, round, drop_zeros, bins);
    known = round.shift;
  }
  return cuts;
}

// --- percentiles ---

__device__ double virtual_rank(uint64_t n, double percentile) {
  return static_cast<double>(n - 1) * percentile / 100.0;
}

__device__ double fraction_of(uint64_t n, double percentile) {
  const double rank = virtual_rank(n, percentile);
  return rank - floor(rank);
}

// The order statistic from the largest on; 0 for no elements.
__global__ void find_ranks(const uint64_t* sizes, uint32_t groups, double percentile,
                           uint64_t* ranks) {
  const uint32_t group = blockIdx.x * kThreads + threadIdx.x;
  if (group >= groups) return;
  const uint64_t n = sizes[group];
  ranks[group] =
      n == 0 ? 0 : n - std::min(static_cast<uint64_t>(virtual_rank(n, percentile)), n - 1);
}

template <class Key>
__device__ void atomic_min(Key* at, Key value) {
  using Word = std::conditional_t<sizeof(Key) == 4, unsigned, unsigned long long>;
  atomicMin(reinterpret_cast<Word*>(at), static_cast<Word>(value));
}

// The least key above the cut's, where the cut has no second one.
template <class W>
__global__ void find_next(Parts parts, Cuts<W> cuts, KeyOf<W>* next) {
  using Key = KeyOf<W>;
  using Reduce = cub::BlockReduce<Key, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  for_chunks(parts, blockIdx.x, gridDim.x,
             [&](uint32_t, const Part& part, uint64_t at, unsigned n) {
               if (cuts.ties[part.group] > 1) return;
               const Key cut = cuts.keys[part.group];
               W x[kPerThread];
               load(part.data, part.held, at, n, x);
               Key least = ~Key{0};
               for (unsigned i = 0; i < kPerThread; ++i) {
                 const Key key = key_of(x[i]);
                 // What is not there is 0, and not above any cut.
                 if (key > cut) least = std::min(least, key);
               }
               __syncthreads();
               least = Reduce(storage).Reduce(least, [](Key a, Key b) { return a < b ? a : b; });
               if (threadIdx.x == 0 && least != ~Key{0}) atomic_min(next + part.group, least);
             });
}

__device__ float rounded_down(double value, float) {
  const auto nearest = static_cast<float>(value);
  const bool above = static_cast<double>(nearest) > value;
  return bit_cast<float>(bit_cast<uint32_t>(nearest) - static_cast<uint32_t>(above));
}
__device__ double rounded_down(double value, double) { return value; }

// From the cut of the rank to that of the percentile; next[g] is the key above, if there is one.
template <class W>
__global__ void interpolate(const uint64_t* sizes, uint32_t groups, double percentile,
                            Interpolation interpolation, const KeyOf<W>* next, Cuts<W> cuts) {
  const uint32_t group = blockIdx.x * kThreads + threadIdx.x;
  if (group >= groups) return;
  const uint64_t ties = cuts.ties[group];
  cuts.ties[group] = 0;
  const double fraction = fraction_of(sizes[group], percentile);
  const KeyOf<W> above = next == nullptr || ties > 1 ? cuts.keys[group] : next[group];
  if (ties == 0 || above == ~KeyOf<W>{0} || !(fraction > 0)) return;
  const auto a = static_cast<double>(magnitude_of(cuts.keys[group]));
  const auto b = static_cast<double>(magnitude_of(above));
  if (interpolation == Interpolation::kHigher) cuts.keys[group] = above;
  if (interpolation == Interpolation::kLinear)
    cuts.keys[group] = key_of(rounded_down(a + (b - a) * fraction, W{}));
}

// --- counting what is kept ---

struct Tally {
  uint64_t above;
  uint64_t equal;

  __host__ __device__ friend Tally operator+(const Tally& a, const Tally& b) {
    return {a.above + b.above, a.equal + b.equal};
  }
};

constexpr unsigned kWarps = kThreads / 32;

// A warp for each listed chunk, and blocks that walk the chunks of the other groups.
template <class W>
__global__ void count_cut(Parts parts, Shortlist<W> list, uint32_t list_blocks, Cuts<W> cuts,
                          Tally* tallies) {
  if (blockIdx.x < list_blocks) {
    const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32;
    if (chunk >= parts.chunks) return;
    const Listed of = list.chunks[chunk];
    if (!list.stands_for(of.group)) return;
    const KeyOf<W> cut = cuts.keys[of.group];
    const W* const values = list.values + list.wanted[of.group].room + of.begin;
    Tally tally = {0, 0};
    for (unsigned i = 0; i < of.count; i += 32) {
      const bool here = i + lane() < of.count;
      const KeyOf<W> key = here ? key_of(values[i + lane()]) : 0;
      tally.above += count_ones(__ballot_sync(~0u, here && key > cut));
      tally.equal += count_ones(__ballot_sync(~0u, here && key == cut));
    }
    if (lane() == 0) tallies[chunk] = tally;
    return;
  }
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  if (blockIdx.x == list_blocks && threadIdx.x == 0) tallies[parts.chunks] = {0, 0};
  for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
             [&](uint32_t chunk, const Part& part, uint64_t at, unsigned n) {
               if (list.stands_for(part.group)) return;
               const KeyOf<W> cut = cuts.keys[part.group];
               W x[kPerThread];
               load(part.data, part.held, at, n, x);
               const unsigned above = mask_of(x, [=](KeyOf<W> key) { return key > cut; });
               const unsigned equal = mask_of(x, [=](KeyOf<W> key) { return key == cut; });
               const unsigned here = valid(n);
               __syncthreads();
               const uint32_t both =
                   Reduce(storage).Sum(count_ones(above & here) | count_ones(equal & here) << 16);
               if (threadIdx.x == 0) tallies[chunk] = {both & 0xffff, both >> 16};
             });
}

// The bits of a thread's elements, a chunk's first one being bit `first` of the string.
__device__ unsigned bits_at(const uint32_t* bits, uint64_t first, unsigned n) {
  unsigned mask = 0;
  for (unsigned round = 0; round < kRounds; ++round) {
    const unsigned index = index_of(round * kNeighbours);
    const uint64_t begin = first + index;
    if (index >= n) break;
    // The string may end with the word of the last element.
    const uint64_t last = begin + std::min(n - index, unsigned{kNeighbours}) - 1;
    const unsigned four = __funnelshift_r(bits[begin / 32], bits[last / 32], begin % 32);
    mask |= in_round(four, 0) << (round * kNeighbours);
  }
  return mask & valid(n);
}

__global__ void count_bits(Parts parts, const uint32_t* const* bits, Tally* tallies) {
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  if (blockIdx.x == 0 && threadIdx.x == 0) tallies[parts.chunks] = {0, 0};
  for_chunks(parts, blockIdx.x, gridDim.x,
             [&](uint32_t chunk, const Part& part, uint64_t at, unsigned n) {
               const unsigned mask = bits_at(bits[part.group], part.first + at, n);
               __syncthreads();
               const uint32_t kept = Reduce(storage).Sum(count_ones(mask));
               if (threadIdx.x == 0) tallies[chunk] = {kept, 0};
             });
}

// One block. tallies[c] is of the chunks before c; `ties` may be null for none.
__global__ void find_begins(Parts parts, const Tally* tallies, const uint64_t* ties,
                            uint32_t* first_chunks, uint64_t* begins) {
  using Scan = cub::BlockScan<uint64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const auto first_chunk_of = [&](uint32_t group) {
    const uint32_t p = first_part_of(parts, group);
    return p < parts.count ? parts.parts[p].first_chunk : parts.chunks;
  };
  uint64_t ties_before = 0;
  for (uint32_t start = 0; start <= parts.groups; start += kThreads) {
    const uint32_t group = start + threadIdx.x;
    const uint32_t first = first_chunk_of(group);
    uint64_t kept = 0;
    if (ties != nullptr && group < parts.groups)
      kept = std::min(tallies[first_chunk_of(group + 1)].equal - tallies[first].equal, ties[group]);
    uint64_t before = 0;
    uint64_t total = 0;
    __syncthreads();
    Scan(storage).ExclusiveSum(kept, before, total);
    if (group <= parts.groups) {
      first_chunks[group] = first;
      begins[group] = tallies[first].above + ties_before + before;
    }
    ties_before += total;
  }
}

__global__ void place_chunks(Parts parts, const Tally* tallies, const uint64_t* ties,
                             const uint32_t* first_chunks, KeptCounts counts) {
  const uint64_t chunk = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (chunk > parts.chunks) return;
  if (chunk == parts.chunks) {
    counts.before[chunk] = counts.begins[parts.groups];
    return;
  }
  const uint32_t group = parts.parts[part_of_chunk(parts, static_cast<uint32_t>(chunk))].group;
  const Tally of_group = tallies[first_chunks[group]];
  const uint64_t most = ties == nullptr ? 0 : ties[group];
  const uint64_t before = std::min(tallies[chunk].equal - of_group.equal, most);
  const uint64_t with = std::min(tallies[chunk + 1].equal - of_group.equal, most);
  counts.before[chunk] = counts.begins[group] + (tallies[chunk].above - of_group.above) + before;
  counts.ties[chunk] = static_cast<uint32_t>(with - before);
}

// From the tally of each chunk, and one more.
KeptCounts placed(const Parts& parts, Tally* tallies, const uint64_t* ties, Workspace& workspace) {
  const uint64_t n = uint64_t{parts.chunks} + 1;
  size_t n_bytes = 0;
  const auto scan = [&](void* temporary) {
    check(cub::DeviceScan::ExclusiveSum(temporary, n_bytes, tallies, tallies,
                                        static_cast<int64_t>(n), workspace.stream()),
          "summing up counts");
  };
  scan(nullptr);
  scan(workspace.array<uint8_t>(n_bytes));
  auto* const first_chunks = workspace.array<uint32_t>(uint64_t{parts.groups} + 1);
  const KeptCounts counts = {workspace.array<uint64_t>(n),
                             workspace.array<uint64_t>(uint64_t{parts.groups} + 1),
                             workspace.array<uint32_t>(parts.chunks)};
  launch(find_begins, 1, workspace.stream(), parts, tallies, ties, first_chunks, counts.begins);
  launch(place_chunks, (n + kThreads - 1) / kThreads, workspace.stream(), parts, tallies, ties,
         first_chunks, counts);
  return counts;
}

template <class W>
uint64_t list_blocks_of(const Parts& parts, const Shortlist<W>& list) {
  return list.wanted == nullptr ? 0 : (uint64_t{parts.chunks} + kWarps - 1) / kWarps;
}

template <class W>
KeptCounts count_listed(const Parts& parts, const Shortlist<W>& list, const Cuts<W>& cuts,
                        Workspace& workspace) {
  auto* const tallies = workspace.array<Tally>(uint64_t{parts.chunks} + 1);
  const uint64_t list_blocks = list_blocks_of(parts, list);
  launch(count_cut<W>, list_blocks + std::max(blocks_of(parts.chunks), uint64_t{1}),
         workspace.stream(), parts, list, list_blocks, cuts, tallies);
  return placed(parts, tallies, cuts.ties, workspace);
}

// --- writing what is kept ---

// Where it goes.
template <class W>
struct Destination {
  uint32_t* positions;
  W* values;
  uint32_t* not_finite;

  __device__ void put(uint64_t at, uint32_t position, W value) const {
    positions[at] = position;
    values[at] = value;
    if (!is_finite(value)) *not_finite = 1;
  }
};

template <class W>
__global__ void write_cut(Parts parts, Shortlist<W> list, uint32_t list_blocks, Cuts<W> cuts,
                          KeptCounts counts, Destination<W> to) {
  if (blockIdx.x < list_blocks) {
    const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32;
    if (chunk >= parts.chunks) return;
    const Listed of = list.chunks[chunk];
    if (!list.stands_for(of.group)) return;
    const KeyOf<W> cut = cuts.keys[of.group];
    const uint64_t from = list.wanted[of.group].room + of.begin;
    uint64_t out = counts.before[chunk];
    uint32_t ties = counts.ties[chunk];
    for (unsigned i = 0; i < of.count; i += 32) {
      const bool here = i + lane() < of.count;
      const W value = here ? list.values[from + i + lane()] : W{0};
      const unsigned offset = here ? list.offsets[from + i + lane()] : 0;
      const unsigned equal = __ballot_sync(~0u, here && key_of(value) == cut);
      const bool tie = (equal >> lane() & 1) != 0 && count_ones(equal & lanes_before()) < ties;
      const bool kept = (here && key_of(value) > cut) || tie;
      const unsigned all = __ballot_sync(~0u, kept);
      if (kept) to.put(out + count_ones(all & lanes_before()), of.first + offset, value);
      out += count_ones(all);
      ties -= std::min(ties, count_ones(equal));
    }
    return;
  }
  for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
             [&](uint32_t chunk, const Part& part, uint64_t at, unsigned n) {
               if (list.stands_for(part.group)) return;
               const uint64_t out = counts.before[chunk];
               if (counts.before[chunk + 1] == out) return;
               const uint32_t ties = counts.ties[chunk];
               const KeyOf<W> cut = cuts.keys[part.group];
               W x[kPerThread];
               load(part.data, part.held, at, n, x);
               const unsigned above =
                   mask_of(x, [=](KeyOf<W> key) { return key > cut; }) & valid(n);
               const unsigned equal =
                   ties == 0 ? 0 : mask_of(x, [=](KeyOf<W> key) { return key == cut; }) & valid(n);
               const Order order = order_of(above);
               const Order order_of_ties = ties == 0 ? Order{0, 0} : order_of(equal);
               if ((above | equal) == 0) return;
               for (unsigned i = 0; i < kPerThread; ++i) {
                 const unsigned round = i / kNeighbours;
                 const unsigned ties_before =
                     order_of_ties.before_round(round) + in_round_before(equal, i);
                 const bool tie = (equal >> i & 1) != 0 && ties_before < ties;
                 if ((above >> i & 1) == 0 && !tie) continue;
                 to.put(out + order.before_round(round) + in_round_before(above, i) +
                            std::min(ties_before, ties),
                        static_cast<uint32_t>(part.first + at + index_of(i)), x[i]);
               }
             });
}

template <class W>
__global__ void write_bits(Parts parts, const uint32_t* const* bits, KeptCounts counts,
                           Destination<W> to) {
  for_chunks(parts, blockIdx.x, gridDim.x,
             [&](uint32_t chunk, const Part& part, uint64_t at, unsigned n) {
               const uint64_t out = counts.before[chunk];
               if (counts.before[chunk + 1] == out) return;
               const unsigned mask = bits_at(bits[part.group], part.first + at, n);
               const Order order = order_of(mask);
               uint64_t raw[kPerThread];
               for (unsigned i = 0; i < kPerThread; ++i)
                 raw[i] = (mask >> i & 1) != 0 ? raw_at(part, at + index_of(i)) : 0;
               for (unsigned i = 0; i < kPerThread; ++i) {
                 if ((mask >> i & 1) == 0) continue;
                 to.put(out + order.before_round(i / kNeighbours) + in_round_before(mask, i),
                        static_cast<uint32_t>(part.first + at + index_of(i)),
                        value_of<W>(raw[i], part.held));
               }
             });
}

template <class W>
void write_listed(const Parts& parts, const Shortlist<W>& list, const Cuts<W>& cuts,
                  const KeptCounts& counts, const Destination<W>& to, Workspace& workspace) {
  const uint64_t list_blocks = list_blocks_of(parts, list);
  launch(write_cut<W>, list_blocks + blocks_of(parts.chunks), workspace.stream(), parts, list,
         list_blocks, cuts, counts, to);
}

// --- looking for candidates ---

constexpr uint32_t kSample = 8192;

// At uneven distances: rows of a matrix have even ones.
__device__ uint64_t sample_position(uint32_t i, uint32_t n) {
  const uint64_t jitter = uint64_t{mix(i)} * (n / kSample) >> 32;
  return uint64_t{n} * i / kSample + jitter;
}

// The upper half of a float64's key is enough for a bound.
__device__ uint32_t sampled_key(float x) { return key_of(x); }
__device__ uint32_t sampled_key(double x) { return static_cast<uint32_t>(key_of(x) >> 32); }

// A block for each group: the bound that candidates must reach.
template <class W>
__global__ void find_bounds(Parts parts, Shortlist<W> list) {
  constexpr unsigned kOwn = kSample / kThreads;
  constexpr unsigned kAtOnce = 8;
  __shared__ uint32_t keys[kSample];
  __shared__ uint32_t bins[kDigits];
  const uint32_t group = blockIdx.x;
  if (threadIdx.x == 0) list.found[group] = 0;
  const Wanted wanted = list.wanted[group];
  if (wanted.rank == 0) return;
  const uint32_t first = first_part_of(parts, group);
  const uint32_t end = first_part_of(parts, group + 1);
  uint32_t p = first;
  for (unsigned i = 0; i < kOwn; i += kAtOnce) {
    uint64_t raw[kAtOnce];
    Dtype held[kAtOnce];
    for (unsigned j = 0; j < kAtOnce; ++j) {
      const uint64_t position = sample_position(threadIdx.x * kOwn + i + j, wanted.n);
      if (position < parts.parts[p].first || position - parts.parts[p].first >= parts.parts[p].n)
        p = first_where(first, end, [&](uint32_t q) { return parts.parts[q].first > position; }) -
            1;
      held[j] = parts.parts[p].held;
      raw[j] = raw_at(parts.parts[p], position - parts.parts[p].first);
    }
    for (unsigned j = 0; j < kAtOnce; ++j)
      keys[(i + j) * kThreads + threadIdx.x] = sampled_key(value_of<W>(raw[j], held[j]));
  }
  uint32_t key = 0;
  uint32_t rank = wanted.rank;
  for (unsigned known = kKeyBits<float>; known > 0;) {
    const Round round = {known, known > kDigitBits ? known - kDigitBits : 0};
    for (unsigned i = threadIdx.x; i < kDigits; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kSample; i += kThreads)
      count_key(bins, true, keys[i], key >> round.known, round);
    __syncthreads();
    const Digit found = digit_of(bins, rank);
    key |= found.digit << round.shift;
    rank -= found.above;
    known = round.shift;
  }
  if (threadIdx.x == 0)
    list.bounds[group] = static_cast<KeyOf<W>>(key) << (kKeyBits<W> - kKeyBits<float>);
}

template <class W>
__global__ void collect(Parts parts, Shortlist<W> list) {
  __shared__ uint32_t begin_of_chunk;
  for_chunks(
      parts, blockIdx.x, gridDim.x, [&](uint32_t chunk, const Part& part, uint64_t at, unsigned n) {
        const uint32_t group = part.group;
        const Wanted wanted = list.wanted[group];
        Listed listed = {group, static_cast<uint32_t>(part.first + at), 0, 0};
        if (wanted.rank == 0) {
          if (threadIdx.x == 0) list.chunks[chunk] = listed;
          return;
        }
        const KeyOf<W> bound = list.bounds[group];
        W x[kPerThread];
        load(part.data, part.held, at, n, x);
        const unsigned mask = mask_of(x, [=](KeyOf<W> key) { return key >= bound; }) & valid(n);
        const Order order = order_of(mask);
        if (threadIdx.x == 0) {
          listed.count = order.total;
          listed.begin = begin_of_chunk = atomicAdd(list.found + group, order.total);
          list.chunks[chunk] = listed;
        }
        __syncthreads();
        const uint64_t begin = wanted.room + begin_of_chunk;
        if (begin + order.total > list.wanted[group + 1].room || mask == 0) return;
        for (unsigned i = 0; i < kPerThread; ++i) {
          if ((mask >> i & 1) == 0) continue;
          const uint64_t to =
              begin + order.before_round(i / kNeighbours) + in_round_before(mask, i);
          list.values[to] = x[i];
          list.offsets[to] = static_cast<uint16_t>(index_of(i));
        }
      });
}

// Where the k-th largest is most likely not further down.
uint32_t rank_in_sample(double n, double k, double deviations) {
  const double expected = kSample * k / n;
  const double rank = expected + deviations * (std::sqrt(expected) + 1);
  return static_cast<uint32_t>(std::clamp(rank, 1.0, double{kSample}));
}

// For more candidates than are likely to reach that bound.
uint64_t room_for(double n, double rank, double deviations) {
  const double most = rank + std::abs(deviations) * (std::sqrt(rank) + 1);
  return chunks_of(static_cast<uint64_t>(std::min(n, n / kSample * most))) * kChunkElements;
}

// None where all groups are small, or almost all of them is wanted.
template <class W>
Shortlist<W> shortlist(const Parts& parts, std::span<const uint64_t> sizes,
                       std::span<const uint64_t> counts, const Sampling& sampling,
                       Workspace& workspace) {
  constexpr uint64_t kLargestShare = 8;
  std::vector<Wanted> wanted;
  uint64_t room = 0;
  for (size_t g = 0; g < sizes.size(); ++g) {
    const uint64_t n = sizes[g];
    const uint64_t k = counts[g];
    wanted.push_back({room, static_cast<uint32_t>(n), static_cast<uint32_t>(k), 0});
    if (n < sampling.fewest || k == 0 || k > n / kLargestShare) continue;
    wanted.back().rank =
        rank_in_sample(static_cast<double>(n), static_cast<double>(k), sampling.deviations);
    room += room_for(static_cast<double>(n), wanted.back().rank, sampling.deviations);
  }
  if (room == 0) return {};
  wanted.push_back({room, 0, 0, 0});
  const Shortlist<W> list = {workspace.upload(wanted),
                             parts.groups,
                             static_cast<uint32_t>(room / kChunkElements),
                             workspace.array<KeyOf<W>>(parts.groups),
                             workspace.array<uint32_t>(parts.groups),
                             workspace.array<Listed>(parts.chunks),
                             workspace.array<W>(room),
                             workspace.array<uint16_t>(room)};
  launch(find_bounds<W>, parts.groups, workspace.stream(), parts, list);
  launch(collect<W>, blocks_of(parts.chunks), workspace.stream(), parts, list);
  return list;
}

// --- whole tensors ---

template <class W>
__device__ bool all_finite(const Part& part, uint64_t at, unsigned n) {
  W x[kPerThread];
  load(part.data, part.held, at, n, x);
  bool finite = true;
  for (unsigned i = 0; i < kPerThread; ++i) finite = finite && is_finite(x[i]);
  return finite;
}

__global__ void check_chunks(Parts parts, uint32_t* not_finite) {
  for_chunks(parts, blockIdx.x, gridDim.x,
             [&](uint32_t, const Part& part, uint64_t at, unsigned n) {
               const bool finite = part.held == Dtype::kFloat64 ? all_finite<double>(part, at, n)
                                                                : all_finite<float>(part, at, n);
               if (!finite) *not_finite = 1;
             });
}

__global__ void set_bits(Permutation permutation, uint64_t k, uint32_t* bits) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= k) return;
  uint64_t x = i;
  do {
    x = permutation_pass(permutation, x);
  } while (x >= permutation.n);
  atomicOr(bits + x / 32, 1u << (x % 32));
}

template <class W>
__global__ void add_chunks(const void* update, Dtype held, const W* residual, uint64_t n, W* out) {
  const uint64_t at = uint64_t{blockIdx.x} * kChunkElements;
  const auto here = static_cast<unsigned>(std::min<uint64_t>(kChunkElements, n - at));
  W x[kPerThread];
  W y[kPerThread];
  load(update, held, at, here, x);
  load_as<kHeldAs<W>>(residual, at, here, y);
  for (unsigned i = 0; i < kPerThread; ++i) x[i] = x[i] + y[i];
  store(out + at, here, x);
}

}  // namespace

template <class W>
Cuts<W> topk_cuts(const Parts& parts, const uint64_t* counts, bool drop_zeros,
                  Workspace& workspace) {
  auto* const ties = workspace.array<uint64_t>(parts.groups);
  workspace.copy(ties, counts, parts.groups * sizeof(uint64_t), cudaMemcpyDeviceToDevice);
  return cuts_of<W>(parts, {}, ties, drop_zeros, workspace);
}

template <class W>
Cuts<W> percentile_cuts(const Parts& parts, const uint64_t* sizes, double percentile,
                        Interpolation interpolation, Workspace& workspace) {
  const uint64_t blocks = (uint64_t{parts.groups} + kThreads - 1) / kThreads;
  auto* const ranks = workspace.array<uint64_t>(parts.groups);
  launch(find_ranks, blocks, workspace.stream(), sizes, parts.groups, percentile, ranks);
  const Cuts<W> cuts = cuts_of<W>(parts, {}, ranks, false, workspace);
  KeyOf<W>* next = nullptr;
  if (interpolation != Interpolation::kLower) {
    next = workspace.array<KeyOf<W>>(parts.groups);
    check(cudaMemsetAsync(next, 0xff, parts.groups * sizeof(KeyOf<W>), workspace.stream()),
          "clearing memory");
    launch(find_next<W>, blocks_of(parts.chunks), workspace.stream(), parts, cuts, next);
  }
  launch(interpolate<W>, blocks, workspace.stream(), sizes, parts.groups, percentile, interpolation,
         next, cuts);
  return cuts;
}

template <class W>
KeptCounts count_kept(const Parts& parts, const Cuts<W>& cuts, Workspace& workspace) {
  return count_listed<W>(parts, {}, cuts, workspace);
}

KeptCounts count_kept(const Parts& parts, const uint32_t* const* bits, Workspace& workspace) {
  auto* const tallies = workspace.array<Tally>(uint64_t{parts.chunks} + 1);
  launch(count_bits, std::max(blocks_of(parts.chunks), uint64_t{1}), workspace.stream(), parts,
         bits, tallies);
  return placed(parts, tallies, nullptr, workspace);
}

template <class W>
void write_kept(const Parts& parts, const Cuts<W>& cuts, const KeptCounts& counts,
                uint32_t* positions, W* values, uint32_t* not_finite, Workspace& workspace) {
  write_listed<W>(parts, {}, cuts, counts, {positions, values, not_finite}, workspace);
}

template <class W>
void write_kept(const Parts& parts, const uint32_t* const* bits, const KeptCounts& counts,
                uint32_t* positions, W* values, uint32_t* not_finite, Workspace& workspace) {
  const Destination<W> to = {positions, values, not_finite};
  launch(write_bits<W>, blocks_of(parts.chunks), workspace.stream(), parts, bits, counts, to);
}

template <class W>
Kept<W> topk(const Parts& parts, std::span<const uint64_t> sizes, std::span<const uint64_t> counts,
             bool drop_zeros, uint32_t* not_finite, Workspace& workspace,
             const Sampling& sampling) {
  const uint64_t most = std::accumulate(counts.begin(), counts.end(), uint64_t{0});
  const Destination<W> to = {workspace.array<uint32_t>(most), workspace.array<W>(most), not_finite};
  const Shortlist<W> list = shortlist<W>(parts, sizes, counts, sampling, workspace);
  const Cuts<W> cuts = cuts_of(parts, list, workspace.upload(counts), drop_zeros, workspace);
  const KeptCounts kept = count_listed(parts, list, cuts, workspace);
  write_listed(parts, list, cuts, kept, to, workspace);
  // What is not finite is among the largest, but where none of them is kept.
  bool unseen = false;
  for (size_t g = 0; g < sizes.size(); ++g) unseen = unseen || (counts[g] == 0 && sizes[g] > 0);
  if (unseen) check_finite(parts, not_finite, workspace);
  return {to.positions, to.values, kept.begins};
}

void check_finite(const Parts& parts, uint32_t* not_finite, Workspace& workspace) {
  launch(check_chunks, blocks_of(parts.chunks), workspace.stream(), parts, not_finite);
}

void set_random_bits(uint64_t seed, uint64_t n, uint64_t k, uint32_t* bits, Workspace& workspace) {
  launch(set_bits, (k + kThreads - 1) / kThreads, workspace.stream(), permutation(seed, n), k,
         bits);
}

void sum(const void* update, Dtype held, const void* residual, uint64_t n, bool wide, void* out,
         Workspace& workspace) {
  const auto add = [&]<class W>(W) {
    launch(add_chunks<W>, chunks_of(n), workspace.stream(), update, held,
           static_cast<const W*>(residual), n, static_cast<W*>(out));
  };
  wide ? add(double{}) : add(float{});
}

#define FEDCODEC_SELECTS(W)                                                                        \
  template Cuts<W> topk_cuts(const Parts&, const uint64_t*, bool, Workspace&);                     \
  template Cuts<W> percentile_cuts(const Parts&, const uint64_t*, double, Interpolation,           \
                                   Workspace&);                                                    \
  template KeptCounts count_kept(const Parts&, const Cuts<W>&, Workspace&);                        \
  template void write_kept(const Parts&, const Cuts<W>&, const KeptCounts&, uint32_t*, W*,         \
                           uint32_t*, Workspace&);                                                 \
  template void write_kept(const Parts&, const uint32_t* const*, const KeptCounts&, uint32_t*, W*, \
                           uint32_t*, Workspace&);                                                 \
  template Kept<W> topk(const Parts&, std::span<const uint64_t>, std::span<const uint64_t>, bool,  \
                        uint32_t*, Workspace&, const Sampling&);

FEDCODEC_SELECTS(float)
FEDCODEC_SELECTS(double)
#undef FEDCODEC_SELECTS

}  // namespace fedcodec::cuda
