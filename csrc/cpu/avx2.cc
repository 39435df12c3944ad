#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__BMI2__) || !defined(__F16C__) || \
    !defined(__PCLMUL__) || !defined(__PRFCHW__)
#error "compile with -mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt -mf16c -mpclmul -mprfchw"
#endif
#include <immintrin.h>
#define FEDCODEC_ISA avx2
#include "table-inl.h"
