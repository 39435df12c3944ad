// Exact order statistics of magnitudes.
#include <cmath>
#include <cub/cub.cuh>
#include <type_traits>
#include <vector>

#include "selection-inl.cuh"

namespace fedcodec::cuda {
namespace {

constexpr unsigned kDigitBits = 11;
constexpr unsigned kDigits = 1u << kDigitBits;
template <class W>
constexpr unsigned kKeyBits = 8 * sizeof(W) - 1;

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

// As many blocks at once as fit without spills.
template <class W>
__global__ void __launch_bounds__(kThreads, 4)
    count_digits(Parts parts, Shortlist<W> list, uint32_t list_blocks, Cuts<W> cuts, Round round,
                 uint32_t* bins) {
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
  const auto count = [&](const W(&x)[kPerThread], Stretch at) {
    const KeyOf<W> prefix = cuts.keys[group] >> round.known;
    const unsigned here = mask_of_all(at.count);
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
      const uint64_t begin = uint64_t{chunk} * kChunkElements;
      const uint32_t of = owner_of<&Wanted::room>(list.wanted, list.groups, begin);
      const uint64_t end = list.wanted[of].room + list.found[of];
      if (!list.stands_for(of) || begin >= end) continue;
      enter(of);
      const Stretch at = stretch_of(0, end, chunk);
      W x[kPerThread];
      load_chunk<W>(list.values, kDtypeOf<W>, at, x);
      count(x, at);
    }
  } else {
    for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
               [&](uint32_t, const Part& part, Stretch at) {
                 if (list.stands_for(part.group) || cuts.ties[part.group] == 0) return;
                 enter(part.group);
                 W x[kPerThread];
                 load_chunk<W>(part.data, part.held, at, x);
                 count(x, at);
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
  const uint64_t group = thread_number();
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
  for_chunks(parts, blockIdx.x, gridDim.x, [&](uint32_t, const Part& part, Stretch at) {
    if (cuts.ties[part.group] > 1) return;
    const Key cut = cuts.keys[part.group];
    W x[kPerThread];
    load_chunk<W>(part.data, part.held, at, x);
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
  const uint64_t group = thread_number();
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
        p = first + owner_of<&Part::first>(parts.parts + first, end - first, position);
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
  for_chunks(parts, blockIdx.x, gridDim.x, [&](uint32_t chunk, const Part& part, Stretch at) {
    const uint32_t group = part.group;
    const Wanted wanted = list.wanted[group];
    Listed listed = {group, static_cast<uint32_t>(part.first + at.begin), 0, 0};
    if (wanted.rank == 0) {
      if (threadIdx.x == 0) list.chunks[chunk] = listed;
      return;
    }
    const KeyOf<W> bound = list.bounds[group];
    W x[kPerThread];
    load_chunk<W>(part.data, part.held, at, x);
    const unsigned mask = mask_of(x, at.count, [=](KeyOf<W> key) { return key >= bound; });
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
      const uint64_t to = begin + order.before(i);
      list.values[to] = x[i];
      list.offsets[to] = static_cast<uint16_t>(offset_of_element(i));
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

}  // namespace

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

template <class W>
Cuts<W> topk_cuts(const Parts& parts, std::span<const uint64_t> sizes,
                  std::span<const uint64_t> counts, Workspace& workspace) {
  const Shortlist<W> list = shortlist<W>(parts, sizes, counts, {}, workspace);
  return cuts_of(parts, list, workspace.upload(counts), false, workspace);
}

template <class W>
Cuts<W> percentile_cuts(const Parts& parts, const uint64_t* sizes, double percentile,
                        Interpolation interpolation, Workspace& workspace) {
  const uint64_t blocks = ceil_div(parts.groups, kThreads);
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

#define FEDCODEC_FINDS(W)                                                                        \
  template Shortlist<W> shortlist(const Parts&, std::span<const uint64_t>,                       \
                                  std::span<const uint64_t>, const Sampling&, Workspace&);       \
  template Cuts<W> cuts_of(const Parts&, const Shortlist<W>&, uint64_t*, bool, Workspace&);      \
  template Cuts<W> topk_cuts(const Parts&, std::span<const uint64_t>, std::span<const uint64_t>, \
                             Workspace&);                                                        \
  template Cuts<W> percentile_cuts(const Parts&, const uint64_t*, double, Interpolation,         \
                                   Workspace&);

FEDCODEC_FINDS(float)
FEDCODEC_FINDS(double)
#undef FEDCODEC_FINDS

}  // namespace fedcodec::cuda
