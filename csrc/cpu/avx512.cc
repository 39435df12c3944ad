#if !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) || \
    !defined(__AVX512CD__) || !defined(__PCLMUL__)
#error "compile with avx2.cc's flags and -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd"
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers read variables that they leave undefined on purpose (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define FEDCODEC_ISA avx512
#include "table-inl.h"
