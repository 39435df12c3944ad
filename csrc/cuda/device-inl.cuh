// What kernels share: how a block finds its chunk, and how it reads and writes it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fedcodec/arith.h"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

// --- chunks
// --------------------------------------------------------------------------------------------------------

// The number of this thread in its launch.
__device__ inline uint64_t thread_number() { return uint64_t{blockIdx.x} * kThreads + threadIdx.x; }

// The first number below `end` for which `holds`, which then holds for all that follow; or `end`.
template <class Number, class F>
__device__ Number first_where(Number end, F holds) {
  Number first = 0;
  while (first < end) {
    const Number middle = first + (end - first) / 2;
    if (holds(middle)) {
      end = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

// Whose `at` is: the last of `count` items whose first chunk, say, is not after it.
template <auto kFirst, class Item>
__device__ uint32_t owner_of(const Item* items, uint32_t count, uint64_t at) {
  return first_where(count, [=](uint32_t i) { return items[i].*kFirst > at; }) - 1;
}

// A chunk's elements in its item.
struct Stretch {
  uint64_t begin;
  unsigned count;
};

__device__ inline Stretch stretch_of(uint64_t first_chunk, uint64_t n, unsigned chunk) {
  const uint64_t begin = (chunk - first_chunk) * kChunkElements;
  const uint64_t left = n - begin;
  return {begin, left < kChunkElements ? static_cast<unsigned>(left) : kChunkElements};
}

// A thread has rows of four elements: a warp's row lies together, and so do a warp's rows.
constexpr unsigned kRowElements = 4;
constexpr unsigned kRows = kPerThread / kRowElements;
constexpr unsigned kWarpRow = 32 * kRowElements;
constexpr unsigned kWarpElements = kRows * kWarpRow;
constexpr int kWarpElementBits = 9;
static_assert(1u << kWarpElementBits == kWarpElements);

// Where a row of this thread begins in the chunk.
__device__ inline unsigned offset_of(unsigned row) {
  return threadIdx.x / 32 * kWarpElements + row * kWarpRow + threadIdx.x % 32 * kRowElements;
}
// Where one of this thread's elements is.
__device__ inline unsigned offset_of_element(unsigned i) {
  return offset_of(i / kRowElements) + i % kRowElements;
}

// --- elements
// ------------------------------------------------------------------------------------------------------

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// Rounds once, to nearest even.
template <class To, class From>
__device__ To convert(From x) {
  constexpr bool kWide = std::is_same_v<From, double>;
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, Float16>) {
    return convert<To>(f16_to_f32(x.bits));
  } else if constexpr (std::is_same_v<From, Bfloat16>) {
    return convert<To>(bf16_to_f32(x.bits));
  } else if constexpr (std::is_same_v<To, Float16>) {
    if constexpr (kWide) {
      return {f64_to_f16(x)};
    } else {
      return {f32_to_f16(x)};
    }
  } else if constexpr (std::is_same_v<To, Bfloat16>) {
    if constexpr (kWide) {
      return {f64_to_bf16(x)};
    } else {
      return {f32_to_bf16(x)};
    }
  } else {
    return static_cast<To>(x);
  }
}

__device__ inline bool is_finite(float x) { return key_of(x) < kInfinityKey32; }
__device__ inline bool is_finite(double x) { return key_of(x) < kInfinityKey64; }
__device__ inline bool is_finite(Float16 x) { return (x.bits & 0x7fffu) < 0x7c00u; }
__device__ inline bool is_finite(Bfloat16 x) { return (x.bits & 0x7fffu) < 0x7f80u; }

// Calls f with a value of the type that a float's dtype stands for, which is not wider than Widest.
template <class Widest = double, class F>
__device__ void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      if constexpr (std::is_same_v<Widest, double>) f(double{});
      return;
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBfloat16:
      return f(Bfloat16{});
    default:
      return f(float{});
  }
}

template <class W>
constexpr Dtype kDtypeOf = std::is_same_v<W, float> ? Dtype::kFloat32 : Dtype::kFloat64;

// --- rows
// ----------------------------------------------------------------------------------------------------------

// Read and written 16 bytes at a time, or 8 of halves.
template <class T>
struct alignas(sizeof(T) == 2 ? 8 : 16) Row {
  T of[kRowElements];
};

// By name, since the compiler would join plain stores with those of single elements nearby.
template <class T>
__device__ void store_row(const Row<T>& row, T* to) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  Vector vectors[sizeof(row) / sizeof(Vector)];
  memcpy(vectors, &row, sizeof(row));
  for (unsigned i = 0; i < sizeof(row) / sizeof(Vector); ++i)
    __stwb(reinterpret_cast<Vector*>(to) + i, vectors[i]);
}

// The same for all threads of a block.
template <class T>
__device__ bool in_whole_rows(const T* chunk, unsigned count) {
  return count == kChunkElements && reinterpret_cast<uintptr_t>(chunk) % alignof(Row<T>) == 0;
}

// What a pointer that was itself in memory points to, the compiler cannot tell.
template <class T>
__device__ T* in_device_memory(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The elements of a thread, zeros past the chunk's end; they are held in nothing wider than Widest.
template <class Widest = double, class W>
__device__ void load_chunk(const void* data, Dtype held, Stretch at, W (&x)[kPerThread]) {
  with_type<Widest>(held, [&](auto type) {
    using T = decltype(type);
    const T* const from = in_device_memory(static_cast<const T*>(data) + at.begin);
    if (in_whole_rows(from, at.count)) {
      Row<T> rows[kRows];
      for (unsigned row = 0; row < kRows; ++row)
        rows[row] = *reinterpret_cast<const Row<T>*>(from + offset_of(row));
      for (unsigned i = 0; i < kPerThread; ++i)
        x[i] = convert<W>(rows[i / kRowElements].of[i % kRowElements]);
      return;
    }
    for (unsigned i = 0; i < kPerThread; ++i) {
      const unsigned offset = offset_of_element(i);
      x[i] = offset < at.count ? convert<W>(from[offset]) : W{0};
    }
  });
}

// --- scales
// --------------------------------------------------------------------------------------------------------

// The scales of a chunk's values, without a 64-bit division for each: runs of values have scales in
// turn.
class Runs {
 public:
  __device__ Runs(const Grid& grid, Stretch at) {
    const uint64_t run = at.begin / grid.inner;
    channel_ = run % grid.channels;
    length_ = at_most(grid.inner, kChunkElements);
    left_ = at_most(grid.inner - (at.begin - run * grid.inner), kChunkElements);
    until_first_ = at_most(grid.channels - channel_, kMostRuns);
    channels_ = at_most(grid.channels, kMostRuns);
    one_ = channels_ == 1 || left_ >= at.count;
  }

  // Whether the chunk has one scale.
  __device__ bool one() const { return one_; }

  // The number of the chunk's run that has the value.
  __device__ unsigned run(unsigned offset) const {
    return one_ || offset < left_ ? 0 : 1 + (offset - left_) / length_;
  }
  // The same with one number for all runs of a scale: below numbers().
  __device__ unsigned number(unsigned offset) const {
    const unsigned of = run(offset);
    return of < channels_ ? of : of % channels_;
  }
  __device__ unsigned numbers() const { return one_ ? 1 : channels_; }

  __device__ uint64_t channel(unsigned number) const {
    return number < until_first_ ? channel_ + number : number - until_first_;
  }

 private:
  static constexpr unsigned kMostRuns = kChunkElements;

  __device__ static unsigned at_most(uint64_t x, unsigned most) {
    return x < most ? static_cast<unsigned>(x) : most;
  }

  uint64_t channel_;  // of the first run
  unsigned length_;
  unsigned left_;         // values of the first run
  unsigned until_first_;  // runs until channel 0's
  unsigned channels_;
  bool one_;
};

}  // namespace
}  // namespace fedcodec::cuda
