// Groups of tensors and how their values are laid out. Part of body.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "fedcodec/arith.h"
#include "fedcodec/body.h"
#include "fedcodec/memory.h"
#include "fedcodec/tiles.h"
#include "fedcodec/typed.h"

namespace fedcodec {
namespace {

constexpr size_t kWindow = size_t{1} << 16;  // positions at a time
constexpr size_t kChunk = size_t{1} << 14;   // values at a time
constexpr size_t kCopied = size_t{1} << 11;  // values that the first cache holds with their copy
constexpr uint64_t kLongRun = 64;            // of elements, which are better copied than gathered
constexpr double kRoundings = 1 + 0x1p-20;   // more than the rounding of a sum can add

bool is_half(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBfloat16; }

// The least magnitude that rounds to infinity.
double overflow_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return 65520.0;
    case Dtype::kBfloat16:
      return 0x1.FFp127;
    case Dtype::kFloat32:
      return 0x1.FFFFFFp127;
    default:
      return std::numeric_limits<double>::infinity();
  }
}

// Rounding keeps order: what is at most `magnitude` stays at most the result, which may be
// infinity.
double round_magnitude(Dtype dtype, double magnitude) {
  switch (dtype) {
    case Dtype::kFloat16:
      return static_cast<double>(f16_to_f32(f64_to_f16(magnitude)));
    case Dtype::kBfloat16:
      return static_cast<double>(bf16_to_f32(f64_to_bf16(magnitude)));
    case Dtype::kFloat32:
      return static_cast<double>(static_cast<float>(magnitude));
    default:
      return magnitude;
  }
}

// For sizes that bytes claim: what saturates is more than any payload has left.
uint64_t multiply(uint64_t a, uint64_t b) {
  uint64_t product;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

uint64_t add(uint64_t a, uint64_t b) {
  uint64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

template <class W>
W threshold_of(double value) {
  if constexpr (std::is_same_v<W, float>) return round_down(value);
  return static_cast<W>(value);
}

bool finite(uint32_t key) { return key < kInfinityKey32; }
bool finite(uint64_t key) { return key < kInfinityKey64; }

// --- groups and the layout of their values
// ---------------------------------------------------------------------------

struct Group {
  std::span<const size_t> members;  // indices of its tensors
  uint64_t n;
  Dtype value;  // the value dtype
};

std::vector<size_t> floats_of(const Plan& plan, const Segment& segment, bool wanted) {
  std::vector<size_t> found;
  found.reserve(segment.tensors.size());
  for (size_t i : segment.tensors) {
    if (is_float(plan.tensors[i].dtype) == wanted) found.push_back(i);
  }
  return found;
}

Group group_of(std::span<const Tensor> tensors, std::span<const size_t> members) {
  Group group = {members, 0, tensors[members[0]].dtype};
  bool agree = true;
  bool wide = false;
  for (size_t i : members) {
    group.n = add(group.n, tensors[i].n);
    agree &= tensors[i].dtype == group.value;
    wide |= tensors[i].dtype == Dtype::kFloat64;
  }
  if (!agree) group.value = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  return group;
}

std::vector<Group> groups_of(std::span<const Tensor> tensors, std::span<const size_t> floats,
                             const Select& select) {
  std::vector<Group> groups;
  if (select.flat && !floats.empty()) {
    groups.push_back(group_of(tensors, floats));
  } else {
    groups.reserve(floats.size());
    for (size_t i = 0; i < floats.size(); ++i) {
      const Tensor& tensor = tensors[floats[i]];
      groups.push_back({floats.subspan(i, 1), tensor.n, tensor.dtype});
    }
  }
  return groups;
}

enum class Form { kPlain, kCodes, kSigns };

struct Layout {
  Form form;
  Dtype dtype;     // of plain values
  unsigned bits;   // of a code
  Grid grid;       // of the scales
  uint64_t bytes;  // scales or magnitude, and values
};

// None where a tensor lacks the axis.
std::optional<Grid> channels_of(const Tensor& tensor, uint64_t axis) {
  if (axis >= tensor.shape.size()) return std::nullopt;
  const auto at = tensor.shape.begin() + static_cast<ptrdiff_t>(axis);
  return Grid{std::accumulate(at + 1, tensor.shape.end(), uint64_t{1}, std::multiplies<>()), *at};
}

Grid grid_of(const Quantize& quantize, const Tensor& tensor, uint64_t m) {
  switch (quantize.granularity) {
    case Quantize::Granularity::kBlock:
      if (quantize.size < m) return {quantize.size, ceil_div(m, quantize.size)};
      break;
    case Quantize::Granularity::kChannel:
      return channels_of(tensor, quantize.size).value_or(Grid{m, 1});
    default:
      break;
  }
  return {m, 1};
}

// Both sides know m > 0, so nothing on the wire marks what travels as it is.
Layout layout_of(const Quantize& quantize, std::span<const Tensor> tensors, const Group& group,
                 uint64_t m) {
  const uint64_t plain = multiply(m, item_size(group.value));
  Layout coded = {Form::kPlain, {}, 0, {}, UINT64_MAX};
  switch (quantize.kind) {
    case Quantize::Kind::kNone:
      break;
    case Quantize::Kind::kInteger: {
      const Grid grid = grid_of(quantize, tensors[group.members[0]], m);
      const uint64_t codes = ceil_div(multiply(m, quantize.bits), 8);
      coded = {Form::kCodes, {}, quantize.bits, grid, add(multiply(grid.channels, 4), codes)};
      break;
    }
    case Quantize::Kind::kSign:
      coded = {Form::kSigns, {}, 1, {m, 1}, add(4, ceil_div(m, 8))};
      break;
    case Quantize::Kind::kCast:
      coded = {Form::kPlain, quantize.dtype, 0, {}, multiply(m, 2)};
      break;
  }
  if (plain <= coded.bytes) return {Form::kPlain, group.value, 0, {}, plain};
  return coded;
}

}  // namespace
}  // namespace fedcodec
