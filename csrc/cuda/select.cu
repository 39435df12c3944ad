// Selection: what is kept, counted and written in order.
#include <cub/cub.cuh>
#include <numeric>

#include "scan-inl.cuh"
#include "selection-inl.cuh"

namespace fedcodec::cuda {
namespace {

// --- counting what is kept ---

struct Tally {
  uint64_t above;
  uint64_t equal;

  __host__ __device__ friend Tally operator+(const Tally& a, const Tally& b) {
    return {a.above + b.above, a.equal + b.equal};
  }
};

// Calls f(chunk, listed) in a warp for each chunk whose group's list stands for it.
template <class W, class F>
__device__ void for_listed(const Parts& parts, const Shortlist<W>& list, F f) {
  const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32;
  if (chunk >= parts.chunks) return;
  const Listed listed = list.chunks[chunk];
  if (list.stands_for(listed.group)) f(chunk, listed);
}

// Warps for the listed chunks, and blocks that walk the chunks of the other groups.
template <class W>
__global__ void __launch_bounds__(kThreads)
    count_cut(Parts parts, Shortlist<W> list, uint32_t list_blocks, Cuts<W> cuts, Tally* tallies) {
  if (blockIdx.x < list_blocks) {
    for_listed(parts, list, [&](uint32_t chunk, const Listed& of) {
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
    });
    return;
  }
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  if (blockIdx.x == list_blocks && threadIdx.x == 0) tallies[parts.chunks] = {0, 0};
  for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
             [&](uint32_t chunk, const Part& part, Stretch at) {
               if (list.stands_for(part.group)) return;
               const KeyOf<W> cut = cuts.keys[part.group];
               W x[kPerThread];
               load_chunk<W>(part.data, part.held, at, x);
               const unsigned all = mask_of_all(at.count);
               uint32_t both = 0;
               for (unsigned i = 0; i < kPerThread; ++i) {
                 const KeyOf<W> key = key_of(x[i]);
                 if ((all >> i & 1) != 0)
                   both += (key > cut ? 1u : 0u) + (key == cut ? 1u << 16 : 0u);
               }
               __syncthreads();
               both = Reduce(storage).Sum(both);
               if (threadIdx.x == 0) tallies[chunk] = {both & 0xffff, both >> 16};
             });
}

// The bits of a thread's elements, a chunk's first one being bit `first` of the string.
__device__ unsigned mask_of_bits(const uint32_t* bits, uint64_t first, unsigned count) {
  unsigned mask = 0;
  for (unsigned row = 0; row < kRows; ++row) {
    const unsigned offset = offset_of(row);
    if (offset >= count) break;
    const uint64_t begin = first + offset;
    // The string may end with the word of the last element.
    const uint64_t last = begin + min(count - offset, kRowElements) - 1;
    const unsigned four = __funnelshift_r(bits[begin / 32], bits[last / 32], begin % 32);
    mask |= (four & kRowMask) << (row * kRowElements);
  }
  return mask & mask_of_all(count);
}

__global__ void count_bits(Parts parts, const uint32_t* const* bits, Tally* tallies) {
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  if (blockIdx.x == 0 && threadIdx.x == 0) tallies[parts.chunks] = {0, 0};
  for_chunks(parts, blockIdx.x, gridDim.x, [&](uint32_t chunk, const Part& part, Stretch at) {
    const unsigned mask = mask_of_bits(bits[part.group], part.first + at.begin, at.count);
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
  const uint64_t chunk = thread_number();
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
  sum_up_before(tallies, tallies, n, workspace);
  auto* const first_chunks = workspace.array<uint32_t>(uint64_t{parts.groups} + 1);
  const KeptCounts counts = {workspace.array<uint64_t>(n),
                             workspace.array<uint64_t>(uint64_t{parts.groups} + 1),
                             workspace.array<uint32_t>(parts.chunks)};
  launch(find_begins, 1, workspace.stream(), parts, tallies, ties, first_chunks, counts.begins);
  launch(place_chunks, ceil_div(n, kThreads), workspace.stream(), parts, tallies, ties,
         first_chunks, counts);
  return counts;
}

template <class W>
uint64_t list_blocks_of(const Parts& parts, const Shortlist<W>& list) {
  return list.wanted == nullptr ? 0 : ceil_div(parts.chunks, kWarps);
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
    for_listed(parts, list, [&](uint32_t chunk, const Listed& of) {
      const KeyOf<W> cut = cuts.keys[of.group];
      const unsigned lanes_before = (1u << lane()) - 1;
      const uint64_t from = list.wanted[of.group].room + of.begin;
      uint64_t out = counts.before[chunk];
      uint32_t ties = counts.ties[chunk];
      for (unsigned i = 0; i < of.count; i += 32) {
        const bool here = i + lane() < of.count;
        const W value = here ? list.values[from + i + lane()] : W{0};
        const unsigned offset = here ? list.offsets[from + i + lane()] : 0;
        const unsigned equal = __ballot_sync(~0u, here && key_of(value) == cut);
        const bool tie = (equal >> lane() & 1) != 0 && count_ones(equal & lanes_before) < ties;
        const bool kept = (here && key_of(value) > cut) || tie;
        const unsigned all = __ballot_sync(~0u, kept);
        if (kept) to.put(out + count_ones(all & lanes_before), of.first + offset, value);
        out += count_ones(all);
        ties -= std::min(ties, count_ones(equal));
      }
    });
    return;
  }
  for_chunks(parts, blockIdx.x - list_blocks, gridDim.x - list_blocks,
             [&](uint32_t chunk, const Part& part, Stretch at) {
               if (list.stands_for(part.group)) return;
               const uint64_t out = counts.before[chunk];
               if (counts.before[chunk + 1] == out) return;
               const uint32_t ties = counts.ties[chunk];
               const KeyOf<W> cut = cuts.keys[part.group];
               W x[kPerThread];
               load_chunk<W>(part.data, part.held, at, x);
               const unsigned above = mask_of(x, at.count, [=](KeyOf<W> key) { return key > cut; });
               const unsigned equal =
                   ties == 0 ? 0 : mask_of(x, at.count, [=](KeyOf<W> key) { return key == cut; });
               const Order order = order_of(above);
               const Order order_of_ties = ties == 0 ? Order{} : order_of(equal);
               if ((above | equal) == 0) return;
               for (unsigned i = 0; i < kPerThread; ++i) {
                 const unsigned ties_before = order_of_ties.before(i);
                 const bool tie = (equal >> i & 1) != 0 && ties_before < ties;
                 if ((above >> i & 1) == 0 && !tie) continue;
                 to.put(out + order.before(i) + std::min(ties_before, ties),
                        static_cast<uint32_t>(part.first + at.begin + offset_of_element(i)), x[i]);
               }
             });
}

template <class W>
__global__ void write_bits(Parts parts, const uint32_t* const* bits, KeptCounts counts,
                           Destination<W> to) {
  for_chunks(parts, blockIdx.x, gridDim.x, [&](uint32_t chunk, const Part& part, Stretch at) {
    const uint64_t out = counts.before[chunk];
    if (counts.before[chunk + 1] == out) return;
    const unsigned mask = mask_of_bits(bits[part.group], part.first + at.begin, at.count);
    const Order order = order_of(mask);
    uint64_t raw[kPerThread];
    for (unsigned i = 0; i < kPerThread; ++i)
      raw[i] = (mask >> i & 1) != 0 ? raw_at(part, at.begin + offset_of_element(i)) : 0;
    for (unsigned i = 0; i < kPerThread; ++i) {
      if ((mask >> i & 1) == 0) continue;
      to.put(out + order.before(i),
             static_cast<uint32_t>(part.first + at.begin + offset_of_element(i)),
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

// --- whole tensors ---

template <class W>
__device__ bool all_finite(const Part& part, Dtype held, Stretch at) {
  W x[kPerThread];
  load_chunk<W>(part.data, held, at, x);
  bool finite = true;
  for (unsigned i = 0; i < kPerThread; ++i) finite = finite && is_finite(x[i]);
  return finite;
}

__global__ void check_chunks(Parts parts, uint32_t* not_finite) {
  for_chunks(parts, blockIdx.x, gridDim.x, [&](uint32_t, const Part& part, Stretch at) {
    const bool finite = part.held == Dtype::kFloat64 ? all_finite<double>(part, Dtype::kFloat64, at)
                                                     : all_finite<float>(part, part.held, at);
    if (!finite) *not_finite = 1;
  });
}

__global__ void set_bits(Permutation permutation, uint64_t k, uint32_t* bits) {
  const uint64_t i = thread_number();
  if (i >= k) return;
  uint64_t x = i;
  do {
    x = permutation_pass(permutation, x);
  } while (x >= permutation.n);
  atomicOr(bits + x / 32, 1u << (x % 32));
}

}  // namespace

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
  launch(set_bits, ceil_div(k, kThreads), workspace.stream(), permutation(seed, n), k, bits);
}

#define FEDCODEC_SELECTS(W)                                                                        \
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
