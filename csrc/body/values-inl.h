// Values of a group: from bytes, and to where they go. Part of body.cc.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "fedcodec/body.h"
#include "fedcodec/parallel.h"
#include "index_set-inl.h"
#include "layout-inl.h"

namespace fedcodec {
namespace {

// --- reading values
// ------------------------------------------------------------------------------------------------------

// Values on their way, of whichever type they have; one pointer is null.
struct Chunk {
  const float* f32;
  const double* f64;
  size_t n;
};

// Bytes of a payload have no alignment: kernels read and write here. A bit string is entered at a
// whole byte, so that up to seven values stand in front of those wanted.
struct Scratch {
  float f32[kChunk + 8];
  float rounded[kChunk];
  double f64[kChunk];
  uint16_t u16[kChunk];
  int8_t codes[kChunk + 8];
  uint64_t written;  // elements of the tensor that a sink writes to in order
};

struct Values {
  Layout layout = {};
  uint64_t m = 0;
  float scale = 0;                 // the only one, or the magnitude
  std::vector<float> scales = {};  // where there are more
  const uint8_t* data = nullptr;
  double bound = 0;  // of the decoded magnitudes

  const float* all_scales() const { return scales.empty() ? &scale : scales.data(); }

  const int8_t* codes(const Kernels& kernels, uint64_t at, size_t n, Scratch& scratch) const {
    if (layout.bits == 8) return reinterpret_cast<const int8_t*>(data) + at;
    const size_t lead = at % 8;
    kernels.unpack_codes(data + at / 8 * layout.bits, lead + n, layout.bits, scratch.codes);
    return scratch.codes + lead;
  }

  // Values [at, at + n), n <= kChunk, decoded to `place` if that is given and their type is
  // float32.
  Chunk read(const Kernels& kernels, uint64_t at, size_t n, float* place, Scratch& scratch) const {
    float* f32 = place ? place : scratch.f32;
    switch (layout.form) {
      case Form::kPlain:
        return read_plain(kernels, at, n, f32, scratch);
      case Form::kSigns: {
        const size_t lead = at % 8;
        kernels.unpack_signs(data + at / 8, lead + n, scale, scratch.f32);
        return {scratch.f32 + lead, nullptr, n};
      }
      default: {
        const int8_t* from = codes(kernels, at, n, scratch);
        for_each_grid(layout.grid, all_scales(), at, n,
                      [&](size_t offset, size_t count, Grid grid, const float* scale) {
                        kernels.dequantize(from + offset, count, grid, levels_of(layout.bits),
                                           scale, f32 + offset);
                      });
        return {f32, nullptr, n};
      }
    }
  }

  // Room has what Scratch has of these types.
  template <class Room>
  Chunk read_plain(const Kernels& kernels, uint64_t at, size_t n, float* f32, Room& room) const {
    const uint8_t* from = data + at * item_size(layout.dtype);
    switch (layout.dtype) {
      case Dtype::kFloat64:
        std::memcpy(room.f64, from, n * sizeof(double));
        return {nullptr, room.f64, n};
      case Dtype::kFloat32:
        std::memcpy(f32, from, n * sizeof(float));
        break;
      case Dtype::kFloat16:
        std::memcpy(room.u16, from, n * sizeof(uint16_t));
        kernels.f16_to_f32(room.u16, n, f32);
        break;
      default:
        std::memcpy(room.u16, from, n * sizeof(uint16_t));
        kernels.bf16_to_f32(room.u16, n, f32);
    }
    return {f32, nullptr, n};
  }
};

double check_plain(const Kernels& kernels, const Values& values, size_t start) {
  std::atomic<double> bound = 0;
  for_ranges(values.m, kCopied, [&](uint64_t begin, uint64_t end) {
    struct {
      float f32[kCopied];
      double f64[kCopied];
      uint16_t u16[kCopied];
    } room;
    for (uint64_t at = begin; at < end; at += kCopied) {
      const size_t n = std::min<uint64_t>(kCopied, end - at);
      const Chunk chunk = values.read_plain(kernels, at, n, room.f32, room);
      const double largest = chunk.f32
                                 ? static_cast<double>(magnitude_of(max_key(kernels, chunk.f32, n)))
                                 : magnitude_of(max_key(kernels, chunk.f64, n));
      if (!std::isfinite(largest)) throw Malformed{"a value is not finite", start};
      raise(bound, largest);
    }
  });
  return bound;
}

// Returns the largest.
float check_scales(std::span<const float> scales, size_t start) {
  uint32_t largest = 0;
  for (float scale : scales) largest = std::max(largest, bit_cast<uint32_t>(scale));
  if (!finite(largest)) throw Malformed{"a scale is negative or not finite", start};
  return magnitude_of(largest);
}

Values read_values(const Kernels& kernels, const Layout& layout, uint64_t m, Reader& in) {
  const size_t start = in.offset();
  Values values = {layout, m};
  if (layout.form == Form::kPlain) {
    values.data = in.take(layout.bytes, "a group's values");
    values.bound = check_plain(kernels, values, start);
    return values;
  }
  const uint8_t* scales = in.take(multiply(layout.grid.channels, 4), "a group's scales");
  if (layout.grid.channels > 1) values.scales.resize(layout.grid.channels);
  const std::span<float> all =
      values.scales.empty() ? std::span(&values.scale, layout.grid.channels) : values.scales;
  std::memcpy(all.data(), scales, all.size_bytes());
  const float scale = check_scales(all, start);
  values.data = in.take_bits(multiply(m, layout.bits), "a group's codes");
  const int largest = layout.form == Form::kSigns ? 1 : levels_of(layout.bits);
  values.bound = static_cast<double>(scale * static_cast<float>(largest));
  return values;
}

// --- what becomes of decoded values
// ---------------------------------------------------------------------------------------

class Sink {
 public:
  virtual ~Sink() = default;
  // What n elements, of which some are kept, cost it, in elements that are only copied; 0 unless
  // several threads may call it at once, each with elements and a scratch of its own.
  virtual uint64_t work(uint64_t, uint64_t) const { return 0; }
  // After all that is put of elements [scratch.written, stop) of a tensor of which a group keeps
  // only some: the others are zero.
  virtual void finish(size_t, uint64_t, Scratch&) {}
  // Where float32 values may be decoded to at once; they are `put` all the same.
  virtual float* place(size_t, uint64_t) { return nullptr; }
  // Takes n codes from `at` on where a tensor has no need of their values; false if it has.
  virtual bool put_codes(size_t, uint64_t, const Values&, size_t, Scratch&) { return false; }
  // Values from element `at` of the tensor on, at `positions` counted from there if that is not
  // null.
  virtual void put(size_t tensor, uint64_t at, const uint32_t* positions, Chunk values,
                   Scratch& scratch) = 0;
};

// Rounds values to a dtype, once.
const void* round_to(const Kernels& kernels, Dtype dtype, Chunk x, Scratch& scratch) {
  switch (dtype) {
    case Dtype::kFloat32:
      if (x.f32) return x.f32;
      kernels.f64_to_f32(x.f64, x.n, scratch.rounded);
      return scratch.rounded;
    case Dtype::kFloat64:
      if (x.f64) return x.f64;
      kernels.f32_to_f64(x.f32, x.n, scratch.f64);
      return scratch.f64;
    case Dtype::kFloat16:
      x.f32 ? kernels.f32_to_f16(x.f32, x.n, scratch.u16)
            : kernels.f64_to_f16(x.f64, x.n, scratch.u16);
      return scratch.u16;
    default:
      x.f32 ? kernels.f32_to_bf16(x.f32, x.n, scratch.u16)
            : kernels.f64_to_bf16(x.f64, x.n, scratch.u16);
      return scratch.u16;
  }
}

void widen_half(const Kernels& kernels, Dtype dtype, const uint16_t* x, size_t n, float* out) {
  dtype == Dtype::kFloat16 ? kernels.f16_to_f32(x, n, out) : kernels.bf16_to_f32(x, n, out);
}

class DecodeSink : public Sink {
 public:
  DecodeSink(const Kernels& kernels, std::span<const Tensor> tensors)
      : kernels_(kernels), tensors_(tensors) {}

  uint64_t work(uint64_t n, uint64_t) const override { return n; }

  void finish(size_t tensor, uint64_t stop, Scratch& scratch) override {
    expand(tensor, 0, stop, nullptr, nullptr, 0, scratch);
  }

  float* place(size_t tensor, uint64_t at) override {
    const Tensor& out = tensors_[tensor];
    return out.dtype == Dtype::kFloat32 ? static_cast<float*>(out.data) + at : nullptr;
  }

  void put(size_t tensor, uint64_t at, const uint32_t* positions, Chunk values,
           Scratch& scratch) override {
    const Tensor& out = tensors_[tensor];
    const void* from = round_to(kernels_, out.dtype, values, scratch);
    if (positions) {
      const uint64_t stop = at + positions[values.n - 1] + 1;
      if (scratch.written < at) expand(tensor, 0, at, nullptr, nullptr, 0, scratch);
      return expand(tensor, at, stop, positions, from, values.n, scratch);
    }
    const size_t size = item_size(out.dtype);
    void* to = static_cast<std::byte*>(out.data) + at * size;
    if (from != to) std::memcpy(to, from, values.n * size);
  }

 private:
  // Writes all up to element `stop`: zeros, and n values at positions counted from element `base`.
  void expand(size_t tensor, uint64_t base, uint64_t stop, const uint32_t* positions,
              const void* values, size_t n, Scratch& scratch) const {
    const size_t begin = scratch.written - base;
    const size_t end = stop - base;
    scratch.written = stop;
    const auto into = [&](auto kernel, auto* all) {
      using T = std::remove_pointer_t<decltype(all)>;
      kernel(positions, static_cast<const T*>(values), n, begin, end, all + base);
    };
    void* const data = tensors_[tensor].data;
    switch (tensors_[tensor].dtype) {
      case Dtype::kFloat32:
        return into(kernels_.expand_f32, static_cast<float*>(data));
      case Dtype::kFloat64:
        return into(kernels_.expand_f64, static_cast<double*>(data));
      default:
        return into(kernels_.expand_u16, static_cast<uint16_t*>(data));
    }
  }

  const Kernels& kernels_;
  std::span<const Tensor> tensors_;
};

// acc += weight * value, with the value as its tensor's dtype holds it.
class AccumulateSink : public Sink {
 public:
  AccumulateSink(const Kernels& kernels, std::span<const Tensor> tensors, double weight)
      : kernels_(kernels), tensors_(tensors), weight_(weight) {}

  // Where few are kept the others cost nothing, but each of them a line of memory.
  uint64_t work(uint64_t n, uint64_t kept) const override { return std::min(n, 8 * kept); }

  bool put_codes(size_t tensor, uint64_t at, const Values& values, size_t n,
                 Scratch& scratch) override {
    const Tensor& to = tensors_[tensor];
    if (is_half(to.dtype)) return false;
    const int8_t* codes = values.codes(kernels_, at, n, scratch);
    const int levels = levels_of(values.layout.bits);
    const auto add = [&](size_t offset, size_t count, Grid grid, const float* scale) {
      if (to.held == Dtype::kFloat32) {
        kernels_.add_codes_f32(codes + offset, count, grid, levels, scale,
                               static_cast<float>(weight_),
                               static_cast<float*>(to.data) + at + offset);
      } else {
        kernels_.add_codes_f64(codes + offset, count, grid, levels, scale, weight_,
                               static_cast<double*>(to.data) + at + offset);
      }
    };
    for_each_grid(values.layout.grid, values.all_scales(), at, n, add);
    return true;
  }

  void put(size_t tensor, uint64_t at, const uint32_t* positions, Chunk values,
           Scratch& scratch) override {
    const Tensor& to = tensors_[tensor];
    const Chunk x = as_decoded(to, values, scratch);
    if (to.held == Dtype::kFloat32) {
      float* acc = static_cast<float*>(to.data) + at;
      const float weight = static_cast<float>(weight_);
      const float* f32 = static_cast<const float*>(round_to(kernels_, Dtype::kFloat32, x, scratch));
      positions ? kernels_.add_at_f32(positions, f32, x.n, weight, acc)
                : kernels_.add_f32(f32, x.n, weight, acc);
      return;
    }
    double* acc = static_cast<double*>(to.data) + at;
    if (positions) {
      x.f32 ? kernels_.add_at_f64(positions, x.f32, x.n, weight_, acc)
            : kernels_.add_f64_at_f64(positions, x.f64, x.n, weight_, acc);
    } else {
      x.f32 ? kernels_.add_f32_to_f64(x.f32, x.n, weight_, acc)
            : kernels_.add_f64(x.f64, x.n, weight_, acc);
    }
  }

 private:
  Chunk as_decoded(const Tensor& tensor, Chunk x, Scratch& scratch) const {
    if (tensor.dtype == Dtype::kFloat64) return x;
    const void* rounded = round_to(kernels_, tensor.dtype, x, scratch);
    if (!is_half(tensor.dtype)) return {static_cast<const float*>(rounded), nullptr, x.n};
    widen_half(kernels_, tensor.dtype, scratch.u16, x.n, scratch.rounded);
    return {scratch.rounded, nullptr, x.n};
  }

  const Kernels& kernels_;
  std::span<const Tensor> tensors_;
  double weight_;
};

// Throws NonFinite where a value would not be finite in its tensor's dtype.
class FiniteSink : public Sink {
 public:
  explicit FiniteSink(std::span<const Tensor> tensors) : tensors_(tensors) {}

  void put(size_t tensor, uint64_t at, const uint32_t* positions, Chunk x, Scratch&) override {
    const Dtype dtype = tensors_[tensor].dtype;
    for (size_t i = 0; i < x.n; ++i) {
      const double value = x.f32 ? static_cast<double>(x.f32[i]) : x.f64[i];
      if (!(std::abs(value) < overflow_of(dtype))) {
        throw NonFinite{tensor, at + (positions ? positions[i] : i), value,
                        static_cast<uint8_t>(dtype)};
      }
    }
  }

 private:
  std::span<const Tensor> tensors_;
};

// The largest magnitudes that go to float32 and to float64 sums; all are finite in their tensors'
// dtypes.
class LargestSink : public Sink {
 public:
  explicit LargestSink(std::span<const Tensor> tensors) : tensors_(tensors) {}

  Bounds found() const { return found_; }

  // False if a bound of some tensors' values is not enough to go by.
  bool take(std::span<const size_t> members, double bound) {
    for (size_t i : members) {
      if (tensors_[i].held != tensors_[members[0]].held ||
          !std::isfinite(fitted(tensors_[i], bound))) {
        return false;
      }
    }
    for (size_t i : members) raise(tensors_[i], bound);
    return true;
  }

  void put(size_t tensor, uint64_t, const uint32_t*, Chunk x, Scratch&) override {
    double largest = 0;
    for (size_t i = 0; i < x.n; ++i) {
      largest = std::max(largest, std::abs(x.f32 ? static_cast<double>(x.f32[i]) : x.f64[i]));
    }
    raise(tensors_[tensor], largest);
  }

 private:
  static double fitted(const Tensor& tensor, double magnitude) {
    return round_magnitude(tensor.held, round_magnitude(tensor.dtype, magnitude));
  }

  void raise(const Tensor& tensor, double magnitude) {
    double& most = tensor.held == Dtype::kFloat32 ? found_.f32 : found_.f64;
    most = std::max(most, fitted(tensor, magnitude));
  }

  std::span<const Tensor> tensors_;
  Bounds found_ = {0, 0};
};

}  // namespace
}  // namespace fedcodec
