#include "ops.h"

#include <algorithm>
#include <limits>

#include "fedcodec/arith.h"
#include "kernels.h"

namespace fedcodec::cuda {
namespace {

// Raised by kernels that find what the CPU must name.
class Flag {
 public:
  explicit Flag(Workspace& workspace)
      : workspace_(workspace), raised_(workspace.zeros<uint32_t>(1)) {}

  uint32_t* get() const { return raised_; }

  // Waits for the work, and copies what else is asked for.
  void settle(Readback& readback) const {
    uint32_t raised = 0;
    readback.add(&raised, raised_, sizeof(raised));
    readback.finish();
    if (raised != 0) throw Refused{};
  }
  void settle() const {
    Readback readback(workspace_);
    settle(readback);
  }

 private:
  Workspace& workspace_;
  uint32_t* raised_;
};

// What kernels work on, without elements that are none.
struct Selected {
  Parts parts;
  uint64_t n;
  bool wide;
};

Selected selected(Space space, Workspace& workspace) {
  std::vector<Part> parts;
  Selected made = {{nullptr, 0, 0, 1}, 0, false};
  for (const Elements& array : space) {
    made.wide = made.wide || array.dtype == Dtype::kFloat64;
    if (array.n == 0) continue;
    parts.push_back({array.data, array.n, made.n, 0, made.parts.chunks, array.dtype});
    made.n += array.n;
    if (made.n >> 32 != 0) throw Refused{};
    made.parts.chunks += static_cast<uint32_t>(chunks_of(array.n));
  }
  if (parts.empty()) throw Refused{};
  made.parts.parts = workspace.upload(parts);
  made.parts.count = static_cast<uint32_t>(parts.size());
  return made;
}

void check_finite(const Elements& values, const Flag& flag, Workspace& workspace) {
  const Elements arrays[] = {values};
  check_finite(selected(arrays, workspace).parts, flag.get(), workspace);
}

uint64_t size_of(const Elements& array) {
  if (array.n == 0) throw Refused{};
  return array.n;
}

// Calls body with a value of the type that the magnitudes of the space are.
template <class F>
auto in_type(const Selected& space, F body) {
  return space.wide ? body(double{}) : body(float{});
}

template <class W>
W value_of_key(KeyOf<W> key) {
  return bit_cast<W>(key);
}

template <class W>
Cuts<W> cuts_at(const Threshold& threshold, Workspace& workspace) {
  const KeyOf<W> key[] = {key_of(static_cast<W>(threshold.magnitude))};
  const uint64_t ties[] = {threshold.ties};
  return {workspace.upload(std::span<const KeyOf<W>>(key)),
          workspace.upload(std::span<const uint64_t>(ties))};
}

// Values as they travel, and back: one group of one array.

void encode(ValueGroup group, const Draw* draw, const Flag& flag, Workspace& workspace) {
  const ValueGroup groups[] = {group};
  const std::span<const ValueGroup> host = groups;
  encode_values({host, workspace.upload(host), chunks_of(group.m),
                 group.form == Form::kCodes ? group.grid.channels : 0},
                draw, flag.get(), workspace);
}

CodedGroup plain(const Elements& values, Dtype dtype) {
  return {Form::kPlain, dtype, 0, {}, nullptr, static_cast<const uint8_t*>(values.data),
          values.n,     0,     0, 0,  1};
}

CodedGroup coded(const uint8_t* codes, uint64_t n, const Elements& scales, unsigned bits,
                 const Grid& grid) {
  return {Form::kCodes,
          Dtype::kFloat32,
          bits,
          grid,
          static_cast<const uint8_t*>(scales.data),
          codes,
          n,
          0,
          0,
          0,
          1};
}

// Calls put(groups) for one of values that are rounded to no narrower dtype than they are.
template <class F>
void put(const CodedGroup& group, const Elements& to, const uint32_t* positions, F body,
         Workspace& workspace) {
  const CodedGroup groups[] = {group};
  const Dtype dtype = group.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Target targets[] = {{to.data, to.n, 0, dtype, to.dtype}};
  body(CodedGroups{workspace.upload(std::span<const CodedGroup>(groups)), 1, chunks_of(group.m),
                   workspace.upload(std::span<const Target>(targets)), positions});
}

void write(const CodedGroup& group, const Elements& to, const uint32_t* positions,
           Workspace& workspace) {
  put(
      group, to, positions, [&](const CodedGroups& groups) { decode_values(groups, workspace); },
      workspace);
}

void add(const CodedGroup& group, const Elements& to, const uint32_t* positions, double weight,
         Workspace& workspace) {
  put(
      group, to, positions,
      [&](const CodedGroups& groups) { accumulate_values(groups, weight, workspace); }, workspace);
}

// The bytes of checked codes as they travel.
const uint8_t* travelling(const Elements& codes, const Elements& scales, unsigned bits,
                          const Flag& flag, Workspace& workspace) {
  const uint64_t n = size_of(codes);
  check_scales(static_cast<const float*>(scales.data), scales.n, bits, flag.get(), workspace);
  const auto* const bytes = static_cast<const int8_t*>(codes.data);
  if (bits == 8) return static_cast<const uint8_t*>(codes.data);
  auto* const packed = workspace.array<uint8_t>(ceil_div(n * bits, 8));
  pack_codes(bytes, n, bits, packed, flag.get(), workspace);
  return packed;
}

const uint32_t* narrowed(const Elements& positions, uint64_t n, const Flag& flag,
                         Workspace& workspace) {
  if (size_of(positions) > n || n >> 32 != 0) throw Refused{};
  auto* const made = workspace.array<uint32_t>(positions.n);
  narrow_positions(static_cast<const int64_t*>(positions.data), positions.n, n, made, flag.get(),
                   workspace);
  return made;
}

}  // namespace

void topk(Space space, uint64_t k, const KeptArrays& out, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const Selected of = selected(space, workspace);
  in_type(of, [&](auto type) {
    using W = decltype(type);
    const uint64_t sizes[] = {of.n}, counts[] = {k};
    const Kept<W> kept = topk<W>(of.parts, sizes, counts, false, flag.get(), workspace);
    widen_positions(kept.positions, k, static_cast<int64_t*>(out.positions.data), workspace);
    workspace.copy(out.values.data, kept.values, k * sizeof(W), cudaMemcpyDeviceToDevice);
  });
  flag.settle();
}

Threshold topk_threshold(Space space, uint64_t k, cudaStream_t stream) {
  if (k == 0) throw Refused{};
  Workspace workspace(stream);
  const Flag flag(workspace);
  const Selected of = selected(space, workspace);
  check_finite(of.parts, flag.get(), workspace);
  return in_type(of, [&](auto type) -> Threshold {
    using W = decltype(type);
    const uint64_t sizes[] = {of.n}, counts[] = {k};
    const Cuts<W> cuts = topk_cuts<W>(of.parts, sizes, counts, workspace);
    KeyOf<W> key = 0;
    uint64_t ties = 0;
    Readback readback(workspace);
    readback.add(&key, cuts.keys, sizeof(key));
    readback.add(&ties, cuts.ties, sizeof(ties));
    flag.settle(readback);
    return {value_of_key<W>(key), ties};
  });
}

double percentile_threshold(Space space, double percentile, Interpolation interpolation,
                            cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const Selected of = selected(space, workspace);
  check_finite(of.parts, flag.get(), workspace);
  return in_type(of, [&](auto type) -> double {
    using W = decltype(type);
    const uint64_t sizes[] = {of.n};
    const Cuts<W> cuts =
        percentile_cuts<W>(of.parts, workspace.upload(std::span<const uint64_t>(sizes)), percentile,
                           interpolation, workspace);
    KeyOf<W> key = 0;
    Readback readback(workspace);
    readback.add(&key, cuts.keys, sizeof(key));
    flag.settle(readback);
    return value_of_key<W>(key);
  });
}

void compact(Space space, const Threshold& threshold,
             const std::function<KeptArrays(uint64_t)>& allocate, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const Selected of = selected(space, workspace);
  check_finite(of.parts, flag.get(), workspace);
  in_type(of, [&](auto type) {
    using W = decltype(type);
    const Cuts<W> cuts = cuts_at<W>(threshold, workspace);
    const KeptCounts counts = count_kept(of.parts, cuts, workspace);
    uint64_t kept = 0;
    Readback readback(workspace);
    readback.add(&kept, counts.begins + 1, sizeof(kept));
    flag.settle(readback);
    const KeptArrays out = allocate(kept);
    auto* const positions = workspace.array<uint32_t>(kept);
    write_kept(of.parts, cuts, counts, positions, static_cast<W*>(out.values.data), flag.get(),
               workspace);
    widen_positions(positions, kept, static_cast<int64_t*>(out.positions.data), workspace);
    flag.settle();
  });
}

void apply_mask(const Elements& values, const Elements& mask, const Elements& out,
                cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  apply_mask(values.data, values.dtype == Dtype::kFloat64, size_of(values),
             static_cast<const uint8_t*>(mask.data), out.data, flag.get(), workspace);
  flag.settle();
}

void pack_mask(const Elements& mask, const Elements& bits, cudaStream_t stream) {
  Workspace workspace(stream);
  pack_mask(static_cast<const uint8_t*>(mask.data), size_of(mask), static_cast<uint8_t*>(bits.data),
            workspace);
  workspace.synchronize();
}

void unpack_mask(const Elements& bits, const Elements& mask, cudaStream_t stream) {
  Workspace workspace(stream);
  unpack_mask(static_cast<const uint8_t*>(bits.data), size_of(mask),
              static_cast<uint8_t*>(mask.data), workspace);
  workspace.synchronize();
}

void quantize(const Elements& values, unsigned bits, const Grid& grid, const Draw* draw,
              const Elements& codes, const Elements& scales, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint64_t n = size_of(values);
  auto* const packed = bits == 8 ? static_cast<uint8_t*>(codes.data)
                                 : workspace.array<uint8_t>(ceil_div(n * bits, 8));
  encode({values.data, values.dtype, n, 0, Form::kCodes, Dtype::kFloat32, bits, grid, 0,
          draw != nullptr ? draw->first : 0, static_cast<uint8_t*>(scales.data), packed},
         draw, flag, workspace);
  if (bits != 8) unpack_codes(packed, n, bits, static_cast<int8_t*>(codes.data), workspace);
  flag.settle();
}

void dequantize(const Elements& codes, const Elements& scales, unsigned bits, const Grid& grid,
                const Elements& out, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint8_t* const bytes = travelling(codes, scales, bits, flag, workspace);
  write(coded(bytes, codes.n, scales, bits, grid), out, nullptr, workspace);
  flag.settle();
}

void accumulate_codes(const Elements& sum, const Elements& codes, const Elements& scales,
                      unsigned bits, const Grid& grid, double weight, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint8_t* const bytes = travelling(codes, scales, bits, flag, workspace);
  flag.settle();
  add(coded(bytes, codes.n, scales, bits, grid), sum, nullptr, weight, workspace);
  workspace.synchronize();
}

void pack_codes(const Elements& codes, unsigned bits, const Elements& packed, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  pack_codes(static_cast<const int8_t*>(codes.data), size_of(codes), bits,
             static_cast<uint8_t*>(packed.data), flag.get(), workspace);
  flag.settle();
}

void unpack_codes(const Elements& packed, unsigned bits, const Elements& codes,
                  cudaStream_t stream) {
  Workspace workspace(stream);
  unpack_codes(static_cast<const uint8_t*>(packed.data), size_of(codes), bits,
               static_cast<int8_t*>(codes.data), workspace);
  workspace.synchronize();
}

float mean_magnitude(const Elements& values, const Elements* bits, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint64_t n = size_of(values);
  auto* const magnitude = workspace.array<float>(1);
  auto* const signs = bits != nullptr ? static_cast<uint8_t*>(bits->data)
                                      : workspace.array<uint8_t>(ceil_div(n, 8));
  encode({values.data,
          values.dtype,
          n,
          0,
          Form::kSigns,
          Dtype::kFloat32,
          1,
          {},
          0,
          0,
          reinterpret_cast<uint8_t*>(magnitude),
          signs},
         nullptr, flag, workspace);
  float found = 0;
  Readback readback(workspace);
  readback.add(&found, magnitude, sizeof(found));
  flag.settle(readback);
  return found;
}

void unpack_signs(const Elements& bits, float magnitude, const Elements& out, cudaStream_t stream) {
  Workspace workspace(stream);
  const float scale[] = {magnitude};
  write({Form::kSigns,
         Dtype::kFloat32,
         1,
         {},
         reinterpret_cast<const uint8_t*>(workspace.upload(std::span<const float>(scale))),
         static_cast<const uint8_t*>(bits.data),
         size_of(out),
         0,
         0,
         0,
         1},
        out, nullptr, workspace);
  workspace.synchronize();
}

void narrow(const Elements& values, Dtype dtype, const Elements& out, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  encode({values.data,
          values.dtype,
          size_of(values),
          0,
          Form::kPlain,
          dtype,
          0,
          {},
          0,
          0,
          nullptr,
          static_cast<uint8_t*>(out.data)},
         nullptr, flag, workspace);
  flag.settle();
}

void widen(const Elements& halves, Dtype dtype, const Elements& out, cudaStream_t stream) {
  Workspace workspace(stream);
  size_of(halves);
  write(plain(halves, dtype), out, nullptr, workspace);
  workspace.synchronize();
}

std::vector<uint8_t> pack_sparse(const Elements& positions, uint64_t n, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint32_t* const places = narrowed(positions, n, flag, workspace);
  flag.settle();  // the choice of tiles relies on their order
  const uint64_t sizes[] = {n}, begins[] = {0, positions.n}, offsets[] = {0};
  const Plans plans = plan_tiles(sizes, workspace.upload(std::span<const uint64_t>(begins)), places,
                                 positions.n, workspace);
  PlannedSet set = {};
  Readback readback(workspace);
  readback.add(&set, plans.sets, sizeof(set));
  readback.finish();
  std::vector<uint8_t> packed(1 + set.header_bytes + set.data_bytes);
  auto* const bytes = workspace.zeros<uint8_t>(ceil_div(packed.size(), 4) * 4);
  write_tiles(plans, 1, workspace.upload(std::span<const uint64_t>(offsets)), bytes, workspace);
  readback.add(packed.data(), bytes, packed.size());
  readback.finish();
  return packed;
}

void scatter(const Elements& positions, const Elements& values, const Elements& out,
             cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint32_t* const places = narrowed(positions, out.n, flag, workspace);
  check_finite(values, flag, workspace);
  flag.settle();
  write(plain(values, values.dtype), out, places, workspace);
  workspace.synchronize();
}

void accumulate(const Elements& sum, const Elements* positions, const Elements& values,
                double weight, cudaStream_t stream) {
  Workspace workspace(stream);
  const Flag flag(workspace);
  const uint32_t* const places =
      positions != nullptr ? narrowed(*positions, sum.n, flag, workspace) : nullptr;
  check_finite(values, flag, workspace);
  flag.settle();
  add(plain(values, values.dtype), sum, places, weight, workspace);
  workspace.synchronize();
}

}  // namespace fedcodec::cuda
