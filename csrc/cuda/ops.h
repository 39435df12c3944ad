// The functions of fedcodec.ops for arrays in the current device's memory, in terms of kernels.
// Each has done its work when it returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "fedcodec/body.h"
#include "fedcodec/kernels.h"

namespace fedcodec::cuda {

// The CPU must do it: it can, or says what is wrong with the arguments. Sums are as they were; what
// else was to be written is meaningless.
struct Refused {};

// Elements side by side.
struct Elements {
  void* data;
  uint64_t n;
  Dtype dtype;
};

// Elements of float32 or float64 in one space; values are written as the wider of the two.
using Space = std::span<const Elements>;

// Where what is kept goes: positions are int64.
struct KeptArrays {
  Elements positions;
  Elements values;
};

// A cut keeps the magnitudes above the threshold, and the first so many equal to it.
struct Threshold {
  double magnitude;
  uint64_t ties;
};

void topk(Space space, uint64_t k, const KeptArrays& out, cudaStream_t stream);
Threshold topk_threshold(Space space, uint64_t k, cudaStream_t stream);
double percentile_threshold(Space space, double percentile, Interpolation interpolation,
                            cudaStream_t stream);
// Calls `allocate` with how many are kept.
void compact(Space space, const Threshold& threshold,
             const std::function<KeptArrays(uint64_t)>& allocate, cudaStream_t stream);

void apply_mask(const Elements& values, const Elements& mask, const Elements& out,
                cudaStream_t stream);
void pack_mask(const Elements& mask, const Elements& bits, cudaStream_t stream);
void unpack_mask(const Elements& bits, const Elements& mask, cudaStream_t stream);

// Values and scales are float32, codes int8.
void quantize(const Elements& values, unsigned bits, const Grid& grid, const Draw* draw,
              const Elements& codes, const Elements& scales, cudaStream_t stream);
void dequantize(const Elements& codes, const Elements& scales, unsigned bits, const Grid& grid,
                const Elements& out, cudaStream_t stream);
void accumulate_codes(const Elements& sum, const Elements& codes, const Elements& scales,
                      unsigned bits, const Grid& grid, double weight, cudaStream_t stream);
void pack_codes(const Elements& codes, unsigned bits, const Elements& packed, cudaStream_t stream);
void unpack_codes(const Elements& packed, unsigned bits, const Elements& codes,
                  cudaStream_t stream);

// Packs the signs where there are bits for them.
float mean_magnitude(const Elements& values, const Elements* bits, cudaStream_t stream);
void unpack_signs(const Elements& bits, float magnitude, const Elements& out, cudaStream_t stream);

// Halves are held as uint16.
void narrow(const Elements& values, Dtype dtype, const Elements& out, cudaStream_t stream);
void widen(const Elements& halves, Dtype dtype, const Elements& out, cudaStream_t stream);

std::vector<uint8_t> pack_sparse(const Elements& positions, uint64_t n, cudaStream_t stream);
void scatter(const Elements& positions, const Elements& values, const Elements& out,
             cudaStream_t stream);
void accumulate(const Elements& sum, const Elements* positions, const Elements& values,
                double weight, cudaStream_t stream);

}  // namespace fedcodec::cuda
