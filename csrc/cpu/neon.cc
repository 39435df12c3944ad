#if !defined(__ARM_FEATURE_CRC32)
#error "compile with -march=armv8-a+crc"
#endif
#include <arm_acle.h>
#include <arm_neon.h>
#define FEDCODEC_ISA neon
#include "table-inl.h"
