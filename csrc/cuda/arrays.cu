// What the functions of one array need beside the kernels of bodies.
#include <limits>

#include "device-inl.cuh"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

// A thread of these has one element, or the eight that a byte of bits is of.

__global__ void widen_all(const uint32_t* from, uint64_t n, int64_t* to) {
  const uint64_t i = thread_number();
  if (i < n) to[i] = from[i];
}

__global__ void narrow_all(const int64_t* from, uint64_t n, uint64_t below, uint32_t* to,
                           uint32_t* invalid) {
  const uint64_t i = thread_number();
  if (i >= n) return;
  const int64_t position = from[i];
  const bool increases = i == 0 ? position >= 0 : position > from[i - 1];
  // What is negative is a large number.
  if (!increases || static_cast<uint64_t>(position) >= below) *invalid = 1;
  to[i] = static_cast<uint32_t>(position);
}

template <class T>
__global__ void mask_all(const T* values, uint64_t n, const uint8_t* mask, T* out,
                         uint32_t* not_finite) {
  const uint64_t i = thread_number();
  if (i >= n) return;
  const T value = values[i];
  if (!is_finite(value)) *not_finite = 1;
  out[i] = mask[i] != 0 ? value : T{0};
}

__device__ inline unsigned eight_of(uint64_t n, uint64_t first) {
  return n - first < 8 ? static_cast<unsigned>(n - first) : 8;
}

// Bytes, the first the least; zeros past the end.
__device__ inline uint64_t load_eight(const void* from, unsigned count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(from) % 8 == 0)
    return *static_cast<const uint64_t*>(from);
  uint64_t bytes = 0;
  for (unsigned i = 0; i < count; ++i)
    bytes |= uint64_t{static_cast<const uint8_t*>(from)[i]} << (8 * i);
  return bytes;
}

__device__ inline void store_eight(uint64_t bytes, unsigned count, void* to) {
  if (count == 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *static_cast<uint64_t*>(to) = bytes;
    return;
  }
  for (unsigned i = 0; i < count; ++i)
    static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(bytes >> (8 * i));
}

__global__ void join_bits(const uint8_t* mask, uint64_t n, uint8_t* bits) {
  const uint64_t first = 8 * thread_number();
  if (first >= n) return;
  const uint64_t bytes = load_eight(mask + first, eight_of(n, first));
  unsigned joined = 0;
  for (unsigned i = 0; i < 8; ++i)
    joined |= static_cast<unsigned>((bytes >> (8 * i) & 0xff) != 0) << i;
  bits[first / 8] = static_cast<uint8_t>(joined);
}

__global__ void split_bits(const uint8_t* bits, uint64_t n, uint8_t* mask) {
  const uint64_t first = 8 * thread_number();
  if (first >= n) return;
  const uint64_t joined = bits[first / 8];
  uint64_t bytes = 0;
  for (unsigned i = 0; i < 8; ++i) bytes |= (joined >> i & 1) << (8 * i);
  store_eight(bytes, eight_of(n, first), mask + first);
}

__global__ void join_all(const int8_t* codes, uint64_t n, unsigned bits, uint8_t* packed,
                         uint32_t* invalid) {
  const uint64_t first = 8 * thread_number();
  if (first >= n) return;
  const unsigned count = eight_of(n, first);
  const uint64_t bytes = load_eight(codes + first, count);
  const uint64_t joined = join_codes(bytes, bits);
  // As many bits as they have, they come back.
  if (split_codes(joined, bits) != bytes) *invalid = 1;
  store_eight(joined, (count * bits + 7) / 8, packed + first / 8 * bits);
}

__global__ void split_all(const uint8_t* packed, uint64_t n, unsigned bits, int8_t* codes) {
  const uint64_t first = 8 * thread_number();
  if (first >= n) return;
  const unsigned count = eight_of(n, first);
  const uint64_t joined = load_eight(packed + first / 8 * bits, (count * bits + 7) / 8);
  store_eight(split_codes(joined, bits), count, codes + first);
}

__global__ void check_all(const float* scales, uint64_t n, double largest_code, uint32_t* invalid) {
  const uint64_t i = thread_number();
  if (i >= n) return;
  const float scale = scales[i];
  const double largest = static_cast<double>(scale) * largest_code;
  if ((bit_cast<uint32_t>(scale) >> 31) != 0 || !(largest <= std::numeric_limits<float>::max()))
    *invalid = 1;
}

}  // namespace

void widen_positions(const uint32_t* from, uint64_t n, int64_t* to, Workspace& workspace) {
  launch(widen_all, ceil_div(n, kThreads), workspace.stream(), from, n, to);
}

void narrow_positions(const int64_t* from, uint64_t n, uint64_t below, uint32_t* to,
                      uint32_t* invalid, Workspace& workspace) {
  launch(narrow_all, ceil_div(n, kThreads), workspace.stream(), from, n, below, to, invalid);
}

void apply_mask(const void* values, bool wide, uint64_t n, const uint8_t* mask, void* out,
                uint32_t* not_finite, Workspace& workspace) {
  const auto apply = [&]<class T>(T) {
    launch(mask_all<T>, ceil_div(n, kThreads), workspace.stream(), static_cast<const T*>(values), n,
           mask, static_cast<T*>(out), not_finite);
  };
  wide ? apply(double{}) : apply(float{});
}

void pack_mask(const uint8_t* mask, uint64_t n, uint8_t* bits, Workspace& workspace) {
  launch(join_bits, ceil_div(ceil_div(n, 8), kThreads), workspace.stream(), mask, n, bits);
}

void unpack_mask(const uint8_t* bits, uint64_t n, uint8_t* mask, Workspace& workspace) {
  launch(split_bits, ceil_div(ceil_div(n, 8), kThreads), workspace.stream(), bits, n, mask);
}

void pack_codes(const int8_t* codes, uint64_t n, unsigned bits, uint8_t* packed, uint32_t* invalid,
                Workspace& workspace) {
  launch(join_all, ceil_div(ceil_div(n, 8), kThreads), workspace.stream(), codes, n, bits, packed,
         invalid);
}

void unpack_codes(const uint8_t* packed, uint64_t n, unsigned bits, int8_t* codes,
                  Workspace& workspace) {
  launch(split_all, ceil_div(ceil_div(n, 8), kThreads), workspace.stream(), packed, n, bits, codes);
}

void check_scales(const float* scales, uint64_t n, unsigned bits, uint32_t* invalid,
                  Workspace& workspace) {
  launch(check_all, ceil_div(n, kThreads), workspace.stream(), scales, n,
         static_cast<double>(levels_of(bits)), invalid);
}

}  // namespace fedcodec::cuda
