#define FEDCODEC_ISA baseline
#include "table-inl.h"
