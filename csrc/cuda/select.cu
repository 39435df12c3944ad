#include <cub/cub.cuh>

#include "kernels.h"

namespace fedcodec::cuda {}  // namespace fedcodec::cuda
