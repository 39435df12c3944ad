#pragma once

#include <cub/cub.cuh>

#include "device.h"

namespace fedcodec::cuda {
namespace {

// The sums of the numbers before each of n; `sums` may be `numbers`.
template <class T>
void sum_up_before(const T* numbers, T* sums, uint64_t n, Workspace& workspace) {
  size_t n_bytes = 0;
  const auto scan = [&](void* temporary) {
    check(cub::DeviceScan::ExclusiveSum(temporary, n_bytes, numbers, sums, static_cast<int64_t>(n),
                                        workspace.stream()),
          "summing up counts");
  };
  scan(nullptr);
  scan(workspace.array<uint8_t>(n_bytes));
}

}  // namespace
}  // namespace fedcodec::cuda
