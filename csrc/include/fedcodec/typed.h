// One name for the kernels of both work types.
#pragma once

#include <type_traits>

#include "fedcodec/kernels.h"

namespace fedcodec {

template <class Float>
using KeyOf = std::conditional_t<std::is_same_v<Float, float>, uint32_t, uint64_t>;

// NOLINTBEGIN(bugprone-macro-parentheses): types take none
#define FEDCODEC_TYPED(Float, Key, suffix)                                                         \
  inline Key max_key(const Kernels& k, const Float* x, size_t n) {                                 \
    return k.max_key_##suffix(x, n);                                                               \
  }                                                                                                \
  inline void count_digits(const Kernels& k, const Float* x, size_t n, Key prefix, unsigned shift, \
                           uint64_t* bins) {                                                       \
    k.count_digits_##suffix(x, n, prefix, shift, bins);                                            \
  }                                                                                                \
  inline size_t count_above(const Kernels& k, const Float* x, size_t n, Key threshold) {           \
    return k.count_above_##suffix(x, n, threshold);                                                \
  }                                                                                                \
  inline size_t compact(const Kernels& k, const Float* x, size_t n, Key threshold, uint64_t& ties, \
                        uint32_t first, uint32_t* positions, Float* values) {                      \
    return k.compact_##suffix(x, n, threshold, &ties, first, positions, values);                   \
  }                                                                                                \
  inline size_t compact_sum(const Kernels& k, const Float* a, const Float* b, Float* out,          \
                            size_t n, Key threshold, uint64_t& ties, uint32_t first,               \
                            uint32_t* positions, Float* values) {                                  \
    return k.compact_sum_##suffix(a, b, out, n, threshold, &ties, first, positions, values);       \
  }                                                                                                \
  inline size_t refine(const Kernels& k, Key threshold, uint64_t ties, uint32_t* positions,        \
                       Float* values, size_t n) {                                                  \
    return k.refine_##suffix(threshold, ties, positions, values, n);                               \
  }                                                                                                \
  inline void apply_mask(const Kernels& k, const Float* x, const uint8_t* bits, size_t n,          \
                         Float* out) {                                                             \
    k.apply_mask_##suffix(x, bits, n, out);                                                        \
  }                                                                                                \
  inline void add_norms(const Kernels& k, const Float* x, size_t n, Grid grid, int order,          \
                        double factor, uint64_t* norms) {                                          \
    k.add_norms_##suffix(x, n, grid, order, factor, norms);                                        \
  }                                                                                                \
  inline void mark_used(const Kernels& k, const Float* x, size_t n, Grid grid, uint8_t* used) {    \
    k.mark_used_##suffix(x, n, grid, used);                                                        \
  }                                                                                                \
  inline void sum(const Kernels& k, const Float* a, const Float* b, size_t n, Float* out) {        \
    k.sum_##suffix(a, b, n, out);                                                                  \
  }                                                                                                \
  inline void gather(const Kernels& k, const Float* x, const uint32_t* positions, size_t n,        \
                     Float* out) {                                                                 \
    k.gather_##suffix(x, positions, n, out);                                                       \
  }                                                                                                \
  inline void scatter(const Kernels& k, const uint32_t* positions, const Float* x, size_t n,       \
                      Float* out) {                                                                \
    k.scatter_##suffix(positions, x, n, out);                                                      \
  }

FEDCODEC_TYPED(float, uint32_t, f32)
FEDCODEC_TYPED(double, uint64_t, f64)
#undef FEDCODEC_TYPED
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace fedcodec
