#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__BMI2__) || !defined(__F16C__) || \
    !defined(__PCLMUL__)
#error "compile with -mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt -mf16c -mpclmul"
#endif
#include <immintrin.h>
#define FEDCODEC_ISA avx2
#include "table-inl.h"
