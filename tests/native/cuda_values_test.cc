#include "cuda/kernels.h"

int main() { return 0; }
