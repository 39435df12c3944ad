// Bodies of payloads in terms of kernels: the calls. Every length is checked here before a kernel
// runs.
//
// From the top: a body is segments, a segment the codings of its groups (encode-inl.h,
// decode-inl.h), a coding an index set (index_set-inl.h) and values (values-inl.h), laid out as
// both sides compute (layout-inl.h).
#include "fedcodec/body.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "body/decode-inl.h"
#include "body/encode-inl.h"
#include "body/index_set-inl.h"

namespace fedcodec {

bool is_dtype(uint64_t id) { return (id >= 1 && id <= 4) || (id >= 8 && id <= 16); }

bool is_float(Dtype dtype) { return dtype <= Dtype::kFloat64; }

size_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kInt8:
    case Dtype::kUint8:
    case Dtype::kBool:
      return 1;
    case Dtype::kFloat16:
    case Dtype::kBfloat16:
    case Dtype::kInt16:
    case Dtype::kUint16:
      return 2;
    case Dtype::kFloat32:
    case Dtype::kInt32:
    case Dtype::kUint32:
      return 4;
    default:
      return 8;
  }
}

size_t body_bound(const Plan& plan) {
  uint64_t bound = 0;
  for (const Segment& segment : plan.segments) {
    bound += coder_bound(plan, segment.coder, floats_of(plan, segment, true));
    for (size_t i : floats_of(plan, segment, false)) {
      bound += plan.tensors[i].n * item_size(plan.tensors[i].dtype);
    }
  }
  return bound;
}

size_t encode_body(const Plan& plan, uint64_t drawn, std::span<uint8_t> out, uint32_t* checksum) {
  Encoder encoder(plan, drawn, {plan.kernels, out, checksum});
  for (const Segment& segment : plan.segments) encoder.segment(segment);
  return encoder.finish();
}

void check_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop) {
  Decoder decoder(plan);
  parse_body(plan, decoder, payload, start, stop);
}

void decode_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop) {
  Decoder decoder(plan);
  std::vector<ParsedSegment> body = parse_body(plan, decoder, payload, start, stop);
  for (ParsedSegment& segment : body) decoder.prepare(segment.coded);
  DecodeSink sink(plan.kernels, plan.tensors);
  for (const ParsedSegment& segment : body) {
    decoder.write(segment.coded, sink);
    for (size_t i = 0; i < segment.exact.size(); ++i) {
      const Tensor& to = plan.tensors[segment.exact[i]];
      if (to.n > 0) std::memcpy(to.data, segment.bytes[i], to.n * item_size(to.dtype));
    }
  }
}

Bounds accumulate_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                       double weight, Bounds bounds, bool dry) {
  Decoder decoder(plan);
  std::vector<ParsedSegment> body = parse_body(plan, decoder, payload, start, stop);
  bounds = raised_bounds(plan, decoder, body, weight, bounds, start);
  if (dry) return bounds;
  for (ParsedSegment& segment : body) decoder.prepare(segment.coded);
  AccumulateSink sink(plan.kernels, plan.tensors, weight);
  for (const ParsedSegment& segment : body) {
    decoder.write(segment.coded, sink);
    for (size_t i = 0; i < segment.exact.size(); ++i) {
      const Tensor& to = plan.tensors[segment.exact[i]];
      exact_adder(to.dtype)(plan.kernels, segment.bytes[i], to.n, weight,
                            static_cast<double*>(to.data), decoder.scratch());
    }
  }
  return bounds;
}

std::vector<uint8_t> pack_sparse(const Kernels& kernels, std::span<const int64_t> positions,
                                 uint64_t n) {
  try {
    const std::vector<TilePacker> packers = pack_tiles(kernels, positions, n);
    std::vector<uint8_t> bytes(TilePacker::size(packers));
    Writer out(bytes);
    TilePacker::write(packers, out);
    return bytes;
  } catch (const NotIncreasing&) {
    throw std::invalid_argument("positions must increase strictly, from 0 to below " +
                                std::to_string(n));
  }
}

struct SparseSet::Checked {
  IndexSet set;
};

SparseSet::SparseSet(const Kernels& kernels, Reader& reader, uint64_t n)
    : checked_(new Checked{read_tiles(kernels, reader, n)}) {}
SparseSet::~SparseSet() = default;

uint64_t SparseSet::kept() const { return checked_->set.kept; }

void SparseSet::unpack(const Kernels& kernels, int64_t* positions) const {
  const IndexSet& set = checked_->set;
  Room room;
  room.add(set);
  run_ranges(cut_sparse(set.n, set.step, set.kept), [&](uint64_t begin, uint64_t end) {
    if (begin == end) return;
    Positions some(kernels);
    some.reserve(room);
    int64_t* to = positions + set.entries[begin / set.step].kept;
    some.for_each(set, begin, end, [&](uint64_t base, const uint32_t* from, size_t count) {
      for (size_t i = 0; i < count; ++i) to[i] = static_cast<int64_t>(base + from[i]);
      to += count;
    });
  });
}

}  // namespace fedcodec
