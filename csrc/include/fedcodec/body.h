// Bodies of payloads (docs/format.md, section 4): tensors to bytes, and bytes back to tensors or
// into sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "fedcodec/kernels.h"
#include "fedcodec/reader.h"
#include "fedcodec/select.h"

namespace fedcodec {

// Ids on the wire.
enum class Dtype : uint8_t {
  kFloat32 = 1,
  kFloat16 = 2,
  kBfloat16 = 3,
  kFloat64 = 4,
  kInt8 = 8,
  kInt16 = 9,
  kInt32 = 10,
  kInt64 = 11,
  kUint8 = 12,
  kUint16 = 13,
  kUint32 = 14,
  kUint64 = 15,
  kBool = 16,
};
bool is_dtype(uint64_t id);
bool is_float(Dtype dtype);
size_t item_size(Dtype dtype);

struct Tensor {
  Dtype dtype;                      // on the wire
  std::span<const uint64_t> shape;  // its product is n < 2^63
  uint64_t n;
  // What is encoded, decoded to or added to; null for a check. The values are of type `held`:
  // `dtype`, or kFloat32 for a half tensor's work values, or the accumulator's type.
  void* data;
  Dtype held;
  // Error feedback, or null: `data` is filled with update + residual when it is first read. The
  // update is of type `update_held`, the residual of type `held`.
  const void* update = nullptr;
  const void* residual = nullptr;
  Dtype update_held = Dtype::kFloat32;
};

struct Select {
  enum class Kind { kAll, kTopK, kThreshold, kPercentile, kRandom, kMask, kStructured, kSparse };
  Kind kind = Kind::kAll;
  bool flat = false;             // one space, not each tensor by itself
  std::vector<uint64_t> counts;  // a group: k of top-k and random
  std::vector<uint64_t> seeds;   // a group: random
  double value = 0;              // the threshold, the percentile, or the density of channels, 0 for
                                 // those that are not all zero
  Interpolation interpolation = Interpolation::kLinear;
  std::span<const uint8_t> bits;  // the mask
  uint64_t n = 0;
  uint64_t axis = 0;  // of channels
  int order = 2;      // of their norm
};

struct Quantize {
  enum class Kind { kNone, kInteger, kSign, kCast };
  enum class Granularity { kBlock, kGroup, kChannel };
  Kind kind = Kind::kNone;
  unsigned bits = 8;
  Granularity granularity = Granularity::kGroup;
  uint64_t size = 0;  // values of a block, or the axis of the channels
  bool stochastic = false;
  uint64_t codec_seed = 0;
  uint64_t call_seed = 0;
  Dtype dtype = Dtype::kFloat16;  // of a cast
};

struct Coder {
  Select select;
  Quantize quantize;
  // Two, without terms of their own: a residual, and the fields above mean nothing.
  std::vector<Coder> terms;
};

struct Segment {
  std::vector<size_t> tensors;  // indices
  Coder coder;
};

// What the payload's header has settled. A tensor is in one segment.
struct Plan {
  const Kernels& kernels;
  std::span<const Tensor> tensors;
  std::span<const Segment> segments;
};

// A value that is not finite, or would not be in the dtype `narrow` (0: it is not finite by
// itself).
struct NonFinite {
  size_t tensor;
  uint64_t element;
  double value;
  uint8_t narrow;
};

// Writes the body to `out`, which has room for `body_bound` bytes; returns how many it took.
// `drawn` is the number of values that the call has quantized stochastically before. Continues
// `checksum`, zlib's CRC-32 of the bytes before the body, if it is given. Throws NonFinite.
size_t body_bound(const Plan& plan);
size_t encode_body(const Plan& plan, uint64_t drawn, std::span<uint8_t> out,
                   uint32_t* checksum = nullptr);

// What the magnitudes of float32 and of float64 sums cannot exceed. Sums of tensors that are no
// floats are not counted: they cannot reach the end of float64.
struct Bounds {
  double f32;
  double f64;
};

// Each validates payload[start, stop) wholly and only then writes; throws Malformed.
void check_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop);
void decode_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop);
// Takes the bounds of the sums so far and returns those after; `dry` adds nothing.
Bounds accumulate_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                       double weight, Bounds bounds, bool dry);

// The index set of a group of n elements by itself; positions are strictly increasing and below n.
std::vector<uint8_t> pack_sparse(const Kernels& kernels, std::span<const int64_t> positions,
                                 uint64_t n);
// What `pack_sparse` gives, read back from bytes that stay where they are.
class SparseSet {
 public:
  // Checks the reader's next bytes and moves it to their end; throws Malformed.
  SparseSet(const Kernels& kernels, Reader& reader, uint64_t n);
  ~SparseSet();
  SparseSet(const SparseSet&) = delete;
  SparseSet& operator=(const SparseSet&) = delete;

  uint64_t kept() const;
  // `positions` has room for all.
  void unpack(const Kernels& kernels, int64_t* positions) const;

 private:
  struct Checked;
  std::unique_ptr<const Checked> checked_;
};

}  // namespace fedcodec
