// Bodies of payloads, as body.h has them, of tensors in the current device's memory. Work is
// ordered on the stream given, and done when these return.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "fedcodec/body.h"

namespace fedcodec::cuda {

// Calls `allocate` once, with the number of bytes of the body, and fills what it returns. False,
// with nothing allocated or what was filled meaningless, where the CPU must encode: a value is not
// finite, and the CPU says which, or a group has 2^32 elements or more.
bool encode_body(const Plan& plan, uint64_t drawn, cudaStream_t stream,
                 const std::function<uint8_t*(size_t)>& allocate);

// Each validates payload[start, stop) wholly and only then writes; throws Malformed.
void decode_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                 cudaStream_t stream);
Bounds accumulate_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                       double weight, Bounds bounds, bool dry, cudaStream_t stream);

}  // namespace fedcodec::cuda
