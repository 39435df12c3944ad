#include <algorithm>
#include <cub/cub.cuh>

#include "device-inl.cuh"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

using Sum = unsigned long long;  // as atomicAdd has it

template <class T>
__device__ T largest_in_warp(T x) {
  for (int by = 16; by > 0; by /= 2) x = max(x, __shfl_xor_sync(~0u, x, by));
  return x;
}

__device__ inline uint32_t largest_key(const float (&x)[kPerThread]) {
  uint32_t key = 0;
  for (unsigned i = 0; i < kPerThread; ++i) key = max(key, key_of(x[i]));
  return key;
}

// The same for all threads of a block.
struct Work {
  const ValueGroup& group;
  uint32_t number;  // of the group
  Stretch at;
};

__device__ inline Work work_of(const ValueGroup* groups, uint32_t count) {
  const uint32_t number = owner_of<&ValueGroup::first_chunk>(groups, count, blockIdx.x);
  const ValueGroup& group = groups[number];
  return {group, number, stretch_of(group.first_chunk, group.m, blockIdx.x)};
}

// --- bytes without alignment
// ---------------------------------------------------------------------------------------

__device__ inline void store_float(float x, uint8_t* to) {
  memcpy(in_device_memory(to), &x, sizeof(x));
}

// Bytes that a block makes and then writes, 16 at a time, to where nothing is aligned. They lie as
// they will, but for the last two bits of their address.
template <unsigned kBytes>
struct Staging {
  static constexpr unsigned kBefore = 4;
  alignas(16) uint32_t words[kBefore + kBytes / 4 + 4];

  __device__ uint32_t* begin(const uint8_t* to) {
    return words + kBefore + reinterpret_cast<uintptr_t>(to) % 16 / 4;
  }

  // All threads of the block, after a barrier.
  __device__ void write(uint8_t* to, unsigned n) {
    const unsigned lead = reinterpret_cast<uintptr_t>(to) % 16;
    const unsigned stop = (lead + n) / 16;
    const unsigned shift = lead % 4 * 8;
    for (unsigned i = (lead != 0) + threadIdx.x; i < stop; i += kThreads) {
      const uint32_t* const from = words + kBefore + 4 * i;
      const uint32_t before = from[-1];
      const uint4 own = *reinterpret_cast<const uint4*>(from);
      *reinterpret_cast<uint4*>(to - lead + 16 * i) =
          make_uint4(__funnelshift_l(before, own.x, shift), __funnelshift_l(own.x, own.y, shift),
                     __funnelshift_l(own.y, own.z, shift), __funnelshift_l(own.z, own.w, shift));
    }
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(begin(to));
    const unsigned head = min(lead == 0 ? 0 : 16 - lead, n);
    const unsigned tail = stop == 0 ? head : 16 * stop - lead;
    if (threadIdx.x < head) to[threadIdx.x] = bytes[threadIdx.x];
    if (threadIdx.x < n - tail) to[tail + threadIdx.x] = bytes[tail + threadIdx.x];
  }
};

// --- codes
// --------------------------------------------------------------------------------------------------------

// The random words of four values.
__device__ inline Words words_from(const Draw& draw, uint64_t first) {
  const Words low = philox(draw.codec_seed, first >> 2, draw.call_seed);
  const unsigned skipped = first & 3;
  if (skipped == 0) return low;
  const Words high = philox(draw.codec_seed, (first >> 2) + 1, draw.call_seed);
  // An index that is not constant would send the words through memory.
  switch (skipped) {
    case 1:
      return {{low.word[1], low.word[2], low.word[3], high.word[0]}};
    case 2:
      return {{low.word[2], low.word[3], high.word[0], high.word[1]}};
    default:
      return {{low.word[3], high.word[0], high.word[1], high.word[2]}};
  }
}

using CodesStaging = Staging<kChunkElements>;

// inverse_of(row, i) is the inverse scale of one of the thread's values.
template <bool kStochastic, class InverseOf>
__device__ void write_codes(const Work& work, const float (&x)[kPerThread], const Draw& draw,
                            InverseOf&& inverse_of, CodesStaging& staging) {
  const ValueGroup& group = work.group;
  const unsigned bits = group.bits;
  const int levels = levels_of(bits);
  uint32_t codes[kRows];  // four each
  for (unsigned row = 0; row < kRows; ++row) {
    const unsigned offset = offset_of(row);
    Words words;
    if constexpr (kStochastic) words = words_from(draw, group.drawn + work.at.begin + offset);
    codes[row] = 0;
    for (unsigned i = 0; i < kRowElements; ++i) {
      const float value = x[row * kRowElements + i];
      const float inverse = inverse_of(row, i);
      int8_t code;
      if constexpr (kStochastic) {
        code = quantize_stochastic(value, inverse, words.word[i], levels);
      } else {
        code = quantize_nearest(value, inverse);
      }
      codes[row] |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * i);
    }
  }

  uint8_t* const to = in_device_memory(group.data) + work.at.begin / 8 * bits;
  uint32_t* const staged = staging.begin(to);
  if (bits == 8) {
    for (unsigned row = 0; row < kRows; ++row) staged[offset_of(row) / 4] = codes[row];
  } else {
    // Neighbours have eight codes of one row and eight of the next: each joins one of them.
    const unsigned odd = threadIdx.x % 2;
    for (unsigned row = 0; row < kRows; row += 2) {
      const uint32_t own = odd != 0 ? codes[row + 1] : codes[row];
      const uint64_t other = __shfl_xor_sync(~0u, odd != 0 ? codes[row] : codes[row + 1], 1);
      const uint64_t joined =
          join_codes(odd != 0 ? uint64_t{own} << 32 | other : other << 32 | own, bits);
      uint8_t* const at = reinterpret_cast<uint8_t*>(staged) + offset_of(row + odd) / 8 * bits;
      for (unsigned i = 0; i < bits; ++i) at[i] = static_cast<uint8_t>(joined >> (8 * i));
    }
  }
  __syncthreads();
  staging.write(to, (work.at.count * bits + 7) / 8);
}

// Whether each of a group's scales belongs to a block of values that lies in one chunk, in rows.
__host__ __device__ inline bool in_blocks(const ValueGroup& group) {
  const uint64_t inner = group.grid.inner;
  const bool power_of_two = (inner & (inner - 1)) == 0;
  return group.form == Form::kCodes && power_of_two && kRowElements <= inner &&
         inner <= kChunkElements && (group.grid.channels - 1) * inner < group.m &&
         group.m <= group.grid.channels * inner;
}

// Blocks of values: keys, scales and codes from one look at the values.
template <bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    encode_blocks(const ValueGroup* groups, uint32_t count, Draw draw, uint32_t* not_finite) {
  const Work work = work_of(groups, count);
  const ValueGroup& group = work.group;
  if (!in_blocks(group)) return;
  float x[kPerThread];
  load_chunk(group.x, group.held, work.at, x);

  __shared__ CodesStaging staging;
  __shared__ float inverses[kChunkElements / kRowElements];
  // A block's largest key comes from pieces of at most a warp's elements.
  uint32_t* const keys = staging.words;
  const int block_bits = __ffs(static_cast<int>(group.grid.inner)) - 1;
  const int piece_bits = min(block_bits, kWarpElementBits);
  const unsigned piece = 1u << piece_bits;
  if (piece == kWarpElements) {
    const uint32_t key = largest_in_warp(largest_key(x));
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = key;
  } else {
    uint32_t of_rows[kRows];
    for (unsigned row = 0; row < kRows; ++row) {
      of_rows[row] = 0;
      for (unsigned i = 0; i < kRowElements; ++i)
        of_rows[row] = max(of_rows[row], key_of(x[row * kRowElements + i]));
      for (unsigned by = 1; by < 32 && by * kRowElements < piece; by *= 2)
        of_rows[row] = max(of_rows[row], __shfl_xor_sync(~0u, of_rows[row], static_cast<int>(by)));
    }
    for (unsigned row = 0; row < kRows; ++row) {
      if (piece > kWarpRow) of_rows[row] = max(of_rows[row], of_rows[row ^ 1]);
      if ((offset_of(row) & (piece - 1)) == 0) keys[offset_of(row) >> piece_bits] = of_rows[row];
    }
  }
  __syncthreads();
  const unsigned blocks = (work.at.count + (1u << block_bits) - 1) >> block_bits;
  const unsigned pieces = 1u << (block_bits - piece_bits);
  for (unsigned i = threadIdx.x; i < blocks; i += kThreads) {
    uint32_t key = 0;
    for (unsigned j = 0; j < pieces; ++j) key = max(key, keys[i * pieces + j]);
    if (key >= kInfinityKey32) *not_finite = 1;
    const float scale = scale_from_key(key, levels_of(group.bits));
    store_float(scale, group.scales + 4 * ((work.at.begin >> block_bits) + i));
    inverses[i] = inverse_of_scale(scale);
  }
  __syncthreads();
  // The values past the end are zeros, and so must their codes be.
  const unsigned last = blocks - 1;
  write_codes<kStochastic>(
      work, x, draw,
      [&](unsigned row, unsigned) { return inverses[min(offset_of(row) >> block_bits, last)]; },
      staging);
}

// The largest keys of the scales of other codes, and after them those of the signs of each group.
__global__ void __launch_bounds__(kThreads)
    find_keys(const ValueGroup* groups, uint32_t count, uint64_t scales, uint32_t* keys) {
  const Work work = work_of(groups, count);
  const ValueGroup& group = work.group;
  if (group.form == Form::kPlain || in_blocks(group)) return;
  const bool signs = group.form == Form::kSigns;
  const Runs runs(signs ? Grid{group.m, 1} : group.grid, work.at);
  float x[kPerThread];
  load_chunk(group.x, group.held, work.at, x);

  __shared__ uint32_t of_runs[kChunkElements];
  for (unsigned i = threadIdx.x; i < runs.numbers(); i += kThreads) of_runs[i] = 0;
  __syncthreads();
  if (runs.one()) {
    const uint32_t key = largest_in_warp(largest_key(x));
    if (threadIdx.x % 32 == 0) atomicMax(of_runs, key);
  } else {
    for (unsigned i = 0; i < kPerThread; ++i) {
      const unsigned offset = offset_of_element(i);
      if (offset < work.at.count) atomicMax(of_runs + runs.number(offset), key_of(x[i]));
    }
  }
  __syncthreads();
  uint32_t* const to = keys + (signs ? scales + work.number : group.first_scale);
  for (unsigned i = threadIdx.x; i < runs.numbers(); i += kThreads) {
    if (of_runs[i] != 0) atomicMax(to + runs.channel(i), of_runs[i]);
  }
}

// Makes the keys inverse scales, a thread each.
__global__ void write_scales(const ValueGroup* groups, uint32_t count, uint64_t scales,
                             uint32_t* keys, uint32_t* not_finite) {
  const uint64_t i = thread_number();
  if (i >= scales) return;
  const ValueGroup& group = groups[owner_of<&ValueGroup::first_scale>(groups, count, i)];
  if (in_blocks(group)) return;
  const uint32_t key = keys[i];
  if (key >= kInfinityKey32) *not_finite = 1;
  const float scale = scale_from_key(key, levels_of(group.bits));
  store_float(scale, group.scales + 4 * (i - group.first_scale));
  keys[i] = bit_cast<uint32_t>(inverse_of_scale(scale));
}

template <bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    encode_scaled(const ValueGroup* groups, uint32_t count, const uint32_t* inverses, Draw draw) {
  const Work work = work_of(groups, count);
  const ValueGroup& group = work.group;
  if (group.form != Form::kCodes || in_blocks(group)) return;
  const Runs runs(group.grid, work.at);
  float x[kPerThread];
  load_chunk(group.x, group.held, work.at, x);

  __shared__ CodesStaging staging;
  const uint32_t* const own = inverses + group.first_scale;
  const auto inverse_at = [&](unsigned number) {
    return bit_cast<float>(own[runs.channel(number)]);
  };
  if (runs.one()) {
    const float inverse = inverse_at(0);
    write_codes<kStochastic>(work, x, draw, [&](unsigned, unsigned) { return inverse; }, staging);
  } else {
    write_codes<kStochastic>(
        work, x, draw,
        [&](unsigned row, unsigned i) { return inverse_at(runs.number(offset_of(row) + i)); },
        staging);
  }
}

// --- signs
// --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    encode_signs(const ValueGroup* groups, uint32_t count, const uint32_t* keys, Sum* sums) {
  const Work work = work_of(groups, count);
  const ValueGroup& group = work.group;
  if (group.form != Form::kSigns) return;
  float x[kPerThread];
  load_chunk(group.x, group.held, work.at, x);

  __shared__ Staging<kChunkElements / 8> staging;
  uint8_t* const to = in_device_memory(group.data) + work.at.begin / 8;
  for (unsigned row = 0; row < kRows; ++row) {
    uint32_t bits = 0;
    for (unsigned i = 0; i < kRowElements; ++i)
      bits |= static_cast<uint32_t>(x[row * kRowElements + i] < 0.0f) << i;
    bits <<= threadIdx.x % 8 * kRowElements;
    for (int by = 1; by < 8; by *= 2) bits |= __shfl_xor_sync(~0u, bits, by);
    if (threadIdx.x % 8 == 0) staging.begin(to)[offset_of(row) / 32] = bits;
  }

  const uint32_t largest = keys[work.number];
  Sum sum = 0;
  if (largest != 0) {
    const double factor = power_of_two(31 - exponent_of(largest));
    for (unsigned i = 0; i < kPerThread; ++i) sum += scaled_magnitude(x[i], factor);
  }
  __shared__ typename cub::BlockReduce<Sum, kThreads>::TempStorage storage;
  sum = cub::BlockReduce<Sum, kThreads>(storage).Sum(sum);
  if (threadIdx.x == 0) atomicAdd(sums + work.number, sum);
  __syncthreads();
  staging.write(to, (work.at.count + 7) / 8);
}

__global__ void write_magnitudes(const ValueGroup* groups, uint32_t count, const uint32_t* keys,
                                 const Sum* sums, uint32_t* not_finite) {
  const uint64_t i = thread_number();
  if (i >= count || groups[i].form != Form::kSigns) return;
  const uint32_t largest = keys[i];
  if (largest >= kInfinityKey32) *not_finite = 1;
  store_float(largest == 0 ? 0.0f : mean_magnitude(sums[i], groups[i].m, exponent_of(largest)),
              groups[i].scales);
}

// --- plain values
// --------------------------------------------------------------------------------------------------

template <class T, class W>
__device__ void stage_plain(const Work& work, Dtype held, uint32_t* staged, uint32_t* not_finite) {
  W x[kPerThread];
  load_chunk<W>(work.group.x, held, work.at, x);
  for (unsigned row = 0; row < kRows; ++row) {
    T values[kRowElements];
    for (unsigned i = 0; i < kRowElements; ++i) {
      values[i] = convert<T>(x[row * kRowElements + i]);
      if (!is_finite(values[i])) *not_finite = 1;
    }
    uint32_t words[sizeof(T)];
    memcpy(words, values, sizeof(words));
    for (unsigned i = 0; i < sizeof(T); ++i) staged[offset_of(row) / 4 * sizeof(T) + i] = words[i];
  }
}

// The groups whose values travel in so many bytes each. Left to itself, ptxas would spill to fit in
// more blocks at once.
template <unsigned kSize>
__global__ void __launch_bounds__(kThreads, 4)
    encode_plain(const ValueGroup* groups, uint32_t count, uint32_t* not_finite) {
  const Work work = work_of(groups, count);
  const ValueGroup& group = work.group;
  if (group.form != Form::kPlain) return;
  __shared__ Staging<kChunkElements * kSize> staging;
  uint8_t* const to = in_device_memory(group.data) + work.at.begin * kSize;
  bool taken = false;
  with_type(group.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == kSize) {
      taken = true;
      uint32_t* const staged = staging.begin(to);
      group.held == Dtype::kFloat64
          ? stage_plain<T, double>(work, Dtype::kFloat64, staged, not_finite)
          : stage_plain<T, float>(work, group.held, staged, not_finite);
    }
  });
  if (!taken) return;
  __syncthreads();
  staging.write(to, work.at.count * kSize);
}

// --- all of a call
// -------------------------------------------------------------------------------------------------

template <bool kStochastic>
void encode_codes(const ValueGroups& groups, const Draw& draw, bool blocks, uint32_t* keys,
                  uint32_t* not_finite, cudaStream_t stream) {
  const auto count = static_cast<uint32_t>(groups.host.size());
  if (blocks) {
    launch(encode_blocks<kStochastic>, groups.chunks, stream, groups.groups, count, draw,
           not_finite);
  }
  if (keys != nullptr) {
    launch(encode_scaled<kStochastic>, groups.chunks, stream, groups.groups, count, keys, draw);
  }
}

}  // namespace

void encode_values(const ValueGroups& groups, const Draw* draw, uint32_t* not_finite,
                   Workspace& workspace) {
  const cudaStream_t stream = workspace.stream();
  const auto count = static_cast<uint32_t>(groups.host.size());
  const auto any = [&](auto is) { return std::any_of(groups.host.begin(), groups.host.end(), is); };
  const bool signs = any([](const ValueGroup& group) { return group.form == Form::kSigns; });
  const bool blocks = any(in_blocks);
  const bool scaled =
      any([](const ValueGroup& group) { return group.form == Form::kCodes && !in_blocks(group); });

  uint32_t* keys = nullptr;
  if (scaled || signs) {
    keys = workspace.zeros<uint32_t>(groups.scales + count);
    launch(find_keys, groups.chunks, stream, groups.groups, count, groups.scales, keys);
  }
  if (scaled) {
    launch(write_scales, ceil_div(groups.scales, kThreads), stream, groups.groups, count,
           groups.scales, keys, not_finite);
  }
  uint32_t* const inverses = scaled ? keys : nullptr;
  draw != nullptr ? encode_codes<true>(groups, *draw, blocks, inverses, not_finite, stream)
                  : encode_codes<false>(groups, Draw{}, blocks, inverses, not_finite, stream);
  if (signs) {
    const uint32_t* const of_signs = keys + groups.scales;
    Sum* const sums = workspace.zeros<Sum>(count);
    launch(encode_signs, groups.chunks, stream, groups.groups, count, of_signs, sums);
    launch(write_magnitudes, ceil_div(count, kThreads), stream, groups.groups, count, of_signs,
           sums, not_finite);
  }
  const auto plain_of = [&](size_t size) {
    return any([size](const ValueGroup& group) {
      return group.form == Form::kPlain && item_size(group.dtype) == size;
    });
  };
  if (plain_of(2)) launch(encode_plain<2>, groups.chunks, stream, groups.groups, count, not_finite);
  if (plain_of(4)) launch(encode_plain<4>, groups.chunks, stream, groups.groups, count, not_finite);
  if (plain_of(8)) launch(encode_plain<8>, groups.chunks, stream, groups.groups, count, not_finite);
}

}  // namespace fedcodec::cuda
