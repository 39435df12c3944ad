// What selection is made of: walks over the parts, the order of a chunk's elements, and the list of
// what may be among the largest.
//
// Groups of a call go through the same launches; they have fewer than 2^32 elements each. Blocks
// walk runs of chunks.
#pragma once

#include <algorithm>

#include "device-inl.cuh"

namespace fedcodec::cuda {
namespace {

// About what a device runs at once; more chunks than that share blocks, and what a block does once.
constexpr uint64_t kMostBlocks = 2048;
constexpr uint64_t blocks_of(uint64_t chunks) { return std::min(chunks, kMostBlocks); }

constexpr unsigned kWarps = kThreads / 32;
__device__ inline unsigned lane() { return threadIdx.x % 32; }
__device__ inline unsigned count_ones(unsigned mask) { return static_cast<unsigned>(__popc(mask)); }

// --- parts and chunks ---

__device__ inline uint32_t part_of_chunk(const Parts& parts, uint32_t chunk) {
  return owner_of<&Part::first_chunk>(parts.parts, parts.count, chunk);
}

__device__ inline uint32_t first_part_of(const Parts& parts, uint32_t group) {
  return first_where(parts.count, [&](uint32_t p) { return parts.parts[p].group >= group; });
}

// Calls f(chunk, part, at) for the chunks of one of so many blocks.
template <class F>
__device__ void for_chunks(const Parts& parts, uint32_t block, uint32_t blocks, F f) {
  const auto begin = static_cast<uint32_t>(uint64_t{parts.chunks} * block / blocks);
  const auto end = static_cast<uint32_t>(uint64_t{parts.chunks} * (block + 1) / blocks);
  if (begin == end) return;
  uint32_t p = part_of_chunk(parts, begin);
  for (uint32_t chunk = begin; chunk < end; ++chunk) {
    while (p + 1 < parts.count && parts.parts[p + 1].first_chunk <= chunk) ++p;
    const Part& part = parts.parts[p];
    f(chunk, part, stretch_of(part.first_chunk, part.n, chunk));
  }
}

// One element's bits, so that several can be asked for before one is waited for.
__device__ inline uint64_t raw_at(const Part& part, uint64_t at) {
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

// --- order within a chunk ---

// Bit i of a mask is of the thread's element i.

constexpr unsigned kRowMask = (1u << kRowElements) - 1;

// The chunk's `count` elements.
__device__ inline unsigned mask_of_all(unsigned count) {
  unsigned mask = 0;
  for (unsigned row = 0; row < kRows; ++row) {
    const unsigned offset = offset_of(row);
    const unsigned left = count > offset ? min(count - offset, kRowElements) : 0;
    mask |= ((1u << left) - 1) << (row * kRowElements);
  }
  return mask;
}

// Those of them whose key is so.
template <class W, class F>
__device__ unsigned mask_of(const W (&x)[kPerThread], unsigned count, F holds) {
  unsigned mask = 0;
  for (unsigned i = 0; i < kPerThread; ++i) mask |= static_cast<unsigned>(holds(key_of(x[i]))) << i;
  return mask & mask_of_all(count);
}

// The chunk's marked elements in their order.
struct Order {
  unsigned mask;
  uint64_t before_rows;  // how many come before each of the thread's rows, 16 bits a row
  unsigned total;

  // How many come before the thread's element i.
  __device__ unsigned before(unsigned i) const {
    const unsigned row = i / kRowElements;
    const unsigned in_row = mask & ((1u << i) - (1u << (row * kRowElements)));
    return (static_cast<unsigned>(before_rows >> (16 * row)) & 0xffffu) + count_ones(in_row);
  }
};

// By all threads. Begins with a barrier.
__device__ inline Order order_of(unsigned mask) {
  constexpr uint64_t kEachRow = 0x0001000100010001u;
  __shared__ unsigned of_warps[kWarps];
  uint64_t counts = 0;
  for (unsigned row = 0; row < kRows; ++row)
    counts |= uint64_t{count_ones(mask >> (row * kRowElements) & kRowMask)} << (16 * row);
  uint64_t sums = counts;  // of the lanes up to this one
  for (unsigned by = 1; by < 32; by *= 2) {
    const uint64_t below = __shfl_up_sync(~0u, sums, by);
    if (lane() >= by) sums += below;
  }
  const uint64_t of_warp = __shfl_sync(~0u, sums, 31) * kEachRow;  // of the rows up to each
  __syncthreads();
  if (lane() == 0) of_warps[threadIdx.x / 32] = static_cast<unsigned>(of_warp >> 48);
  __syncthreads();
  unsigned before = 0;
  unsigned total = 0;
  for (unsigned warp = 0; warp < kWarps; ++warp) {
    if (warp == threadIdx.x / 32) before = total;
    total += of_warps[warp];
  }
  return {mask, sums - counts + (of_warp << 16) + before * kEachRow, total};
}

}  // namespace

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

// None where all groups are small, or almost all of them is wanted. `sizes` and `counts` are the
// host's.
template <class W>
Shortlist<W> shortlist(const Parts& parts, std::span<const uint64_t> sizes,
                       std::span<const uint64_t> counts, const Sampling& sampling,
                       Workspace& workspace);

// The cuts that keep the ties[g] largest of group g, ties being at most its size and becoming the
// cuts'. With `drop_zeros` no cut keeps zeros.
template <class W>
Cuts<W> cuts_of(const Parts& parts, const Shortlist<W>& list, uint64_t* ties, bool drop_zeros,
                Workspace& workspace);

}  // namespace fedcodec::cuda
