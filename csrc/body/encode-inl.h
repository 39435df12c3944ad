// Encoding: selection, then values, straight into the output. Part of body.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "decode-inl.h"
#include "fedcodec/arith.h"
#include "fedcodec/body.h"
#include "fedcodec/parallel.h"

namespace fedcodec {
namespace {

double value_at(const Tensor& tensor, uint64_t i) {
  switch (tensor.held) {
    case Dtype::kFloat32:
      return static_cast<double>(static_cast<const float*>(tensor.data)[i]);
    case Dtype::kFloat64:
      return static_cast<const double*>(tensor.data)[i];
    case Dtype::kFloat16:
      return static_cast<double>(f16_to_f32(static_cast<const uint16_t*>(tensor.data)[i]));
    default:
      return static_cast<double>(bf16_to_f32(static_cast<const uint16_t*>(tensor.data)[i]));
  }
}

// Throws NonFinite for the first element that is not finite, if there is one.
void require_finite(std::span<const Tensor> tensors, std::span<const size_t> members) {
  for (size_t i : members) {
    for (uint64_t at = 0; at < tensors[i].n; ++at) {
      const double value = value_at(tensors[i], at);
      if (!std::isfinite(value)) throw NonFinite{i, at, value, 0};
    }
  }
}

// The working values of some tensors: their own memory where it holds that type.
template <class W>
struct Inputs {
  std::vector<std::span<const W>> parts;
  std::vector<std::unique_ptr<W[]>> own;
};

// Error feedback: fills the tensors of a group with update + residual.
template <class W>
class Compensator : public Maker<W> {
 public:
  Compensator(const Kernels& kernels, std::span<const Tensor> tensors,
              std::span<const size_t> members)
      : kernels_(kernels), tensors_(tensors), members_(members) {}

  void make(size_t part, size_t at, size_t n) override {
    for_terms(part, at, n, [&](const W* update, const W* residual, W* out, size_t count) {
      sum(kernels_, update, residual, count, out);
    });
  }

  size_t compact(size_t part, size_t at, size_t n, Cut<KeyOf<W>>& cut, uint32_t first,
                 uint32_t* positions, W* values) override {
    const Tensor& tensor = tensors_[members_[part]];
    if (tensor.update == nullptr) {
      return fedcodec::compact(kernels_, static_cast<const W*>(tensor.data) + at, n, cut.key,
                               cut.ties, first, positions, values);
    }
    size_t kept = 0;
    for_terms(part, at, n, [&](const W* update, const W* residual, W* out, size_t count) {
      kept += compact_sum(kernels_, update, residual, out, count, cut.key, cut.ties, first,
                          positions + kept, values + kept);
      first += static_cast<uint32_t>(count);
    });
    return kept;
  }

 private:
  // Calls f(update, residual, out, count): the update as it lies, or widened a few at a time.
  template <class F>
  void for_terms(size_t part, size_t at, size_t n, F&& f) const {
    const Tensor& tensor = tensors_[members_[part]];
    if (tensor.update == nullptr) return;
    W* const out = static_cast<W*>(tensor.data) + at;
    const W* const residual = static_cast<const W*>(tensor.residual) + at;
    if (!is_half(tensor.update_held))
      return f(static_cast<const W*>(tensor.update) + at, residual, out, n);
    if constexpr (std::is_same_v<W, float>) {
      constexpr size_t kFew = 1024;
      float widened[kFew];
      const uint16_t* const update = static_cast<const uint16_t*>(tensor.update) + at;
      for (size_t i = 0; i < n; i += kFew) {
        const size_t count = std::min(kFew, n - i);
        widen_half(kernels_, tensor.update_held, update + i, count, widened);
        f(widened, residual + i, out + i, count);
      }
    }
  }

  const Kernels& kernels_;
  std::span<const Tensor> tensors_;
  std::span<const size_t> members_;
};

// Encodes codings; `tensors` are the plan's, with other values for the second term of a residual.
class Encoder {
 public:
  Encoder(const Plan& plan, uint64_t drawn, Writer out)
      : plan_(plan), kernels_(plan.kernels), out_(out), drawn_(drawn), decoder_(plan) {}

  // Returns how many bytes were written.
  size_t finish() {
    out_.sum_up();
    return out_.size();
  }

  void segment(const Segment& segment) {
    const std::vector<size_t> floats = floats_of(plan_, segment, true);
    compensates_as_it_goes_ = compensated(floats) && selects_in_one_pass(segment.coder, floats);
    if (!compensates_as_it_goes_) {
      for (size_t i : floats) compensate(plan_.tensors[i]);
    }
    try {
      const size_t start = out_.size();
      coder(segment.coder, plan_.tensors, floats);
      require_decodable(segment.coder, floats, start);
    } catch (const NonFinite&) {
      require_finite(plan_.tensors, floats);  // what is not finite by itself is named first
      throw;
    }
    for (size_t i : floats_of(plan_, segment, false)) exact(plan_.tensors[i]);
  }

 private:
  bool compensated(std::span<const size_t> floats) const {
    return std::any_of(floats.begin(), floats.end(),
                       [&](size_t i) { return plan_.tensors[i].update != nullptr; });
  }

  void compensate(const Tensor& tensor) {
    if (tensor.update == nullptr) return;
    const size_t first = 0;
    const auto all = [&]<class W>(Compensator<W> compensator) {
      for_ranges(tensor.n, 1,
                 [&](uint64_t begin, uint64_t end) { compensator.make(0, begin, end - begin); });
    };
    tensor.held == Dtype::kFloat64 ? all(Compensator<double>(kernels_, {&tensor, 1}, {&first, 1}))
                                   : all(Compensator<float>(kernels_, {&tensor, 1}, {&first, 1}));
  }

  // Whether top-k alone reads the segment, each value where it lies.
  bool selects_in_one_pass(const Coder& coder, std::span<const size_t> floats) const {
    if (!coder.terms.empty() || coder.select.kind != Select::Kind::kTopK) return false;
    const std::vector<Group> groups = groups_of(plan_.tensors, floats, coder.select);
    return std::all_of(groups.begin(), groups.end(), [&](const Group& group) {
      return group.n <= kMostInOnePass &&
             std::all_of(group.members.begin(), group.members.end(), [&](size_t i) {
               const bool wide = plan_.tensors[i].held == Dtype::kFloat64;
               return wide == (group.value == Dtype::kFloat64);
             });
    });
  }

  void coder(const Coder& coder, std::span<const Tensor> tensors, std::span<const size_t> floats) {
    if (!coder.terms.empty()) return residual(coder, tensors, floats);
    const std::vector<Group> groups = groups_of(tensors, floats, coder.select);
    for (size_t i = 0; i < groups.size(); ++i) {
      if (groups[i].n == 0) continue;
      if (groups[i].value == Dtype::kFloat64) {
        group<double>(coder, i, groups[i], tensors);
      } else {
        group<float>(coder, i, groups[i], tensors);
      }
    }
  }

  void residual(const Coder& whole, std::span<const Tensor> tensors,
                std::span<const size_t> floats) {
    const size_t start = out_.size();
    coder(whole.terms[0], tensors, floats);
    Reader in(out_.data(), start, out_.size());
    Parsed first = decoder_.parse(whole.terms[0], floats, in);
    std::vector<Tensor> missed;
    const Memory memory = decoder_.decoded(first, missed);
    for (size_t i : floats) {
      const std::span<const size_t> member(&i, 1);
      if (tensors[i].dtype == Dtype::kFloat64) {
        subtract(kernels_.subtract_f64, inputs<double>(tensors, member).parts[0], missed[i],
                 decoder_.scratch().f64);
      } else {
        subtract(kernels_.subtract_f32, inputs<float>(tensors, member).parts[0], missed[i],
                 decoder_.scratch().f32);
      }
    }
    for (size_t i : floats) missed[i].dtype = tensors[i].dtype;
    coder(whole.terms[1], missed, floats);
  }

  // y = x - y
  template <class W>
  static void subtract(void (*kernel)(const W*, const W*, size_t, W*), std::span<const W> x,
                       const Tensor& y, W* scratch) {
    W* values = static_cast<W*>(y.data);
    for (size_t at = 0; at < x.size(); at += kChunk) {
      const size_t n = std::min(kChunk, x.size() - at);
      kernel(x.data() + at, values + at, n, scratch);
      std::memcpy(values + at, scratch, n * sizeof(W));
    }
  }

  // A scale that tensors share, or a sum, may take a value beyond its tensor's dtype.
  void require_decodable(const Coder& coder, std::span<const size_t> floats, size_t start) {
    const bool safe = coder.terms.empty() &&
                      std::none_of(floats.begin(), floats.end(),
                                   [&](size_t i) { return is_half(plan_.tensors[i].dtype); });
    if (safe) return;
    Reader in(out_.data(), start, out_.size());
    Parsed parsed = decoder_.parse(coder, floats, in);
    try {
      decoder_.require_finite(parsed);
    } catch (NonFinite& found) {
      found.value = value_at(plan_.tensors[found.tensor], found.element);
      throw;
    }
  }

  void exact(const Tensor& tensor) {
    const size_t n = tensor.n * item_size(tensor.dtype);
    uint8_t* to = out_.take(n);
    const uint8_t* from = static_cast<const uint8_t*>(tensor.data);
    if (tensor.dtype == Dtype::kBool) {
      for (size_t i = 0; i < n; ++i) to[i] = from[i] != 0;
    } else if (n > 0) {
      std::memcpy(to, from, n);
    }
  }

  template <class W>
  void group(const Coder& coder, size_t number, const Group& group,
             std::span<const Tensor> tensors) {
    const Tensor& first = tensors[group.members[0]];
    const bool all = coder.select.kind == Select::Kind::kAll;
    if (all && is_half(first.held) &&
        layout_of(coder.quantize, tensors, group, group.n).dtype == first.held) {
      return halves(group.members[0], first);
    }
    const Inputs<W> in = inputs<W>(tensors, group.members);
    const Source<W> source = {coder, group, tensors, in.parts, out_.size()};
    switch (coder.select.kind) {
      case Select::Kind::kAll:
        return values(source, in.parts[0].data(), group.n);
      case Select::Kind::kRandom:
      case Select::Kind::kMask:
        return by_bits(source, number);
      case Select::Kind::kStructured:
        return by_channels(source);
      default:
        return group.n <= kMostInOnePass ? in_one_pass(source, number)
                                         : by_magnitude(source, number);
    }
  }

  // A group on its way: its coding begins at `start` of the output.
  template <class W>
  struct Source {
    const Coder& coder;
    const Group& group;
    std::span<const Tensor> tensors;
    Parts<W> parts;
    size_t start;
  };

  template <class W>
  Inputs<W> inputs(std::span<const Tensor> tensors, std::span<const size_t> members) {
    constexpr Dtype kWork = std::is_same_v<W, float> ? Dtype::kFloat32 : Dtype::kFloat64;
    Inputs<W> in;
    for (size_t i : members) {
      const Tensor& tensor = tensors[i];
      if (tensor.held == kWork) {
        in.parts.push_back({static_cast<const W*>(tensor.data), static_cast<size_t>(tensor.n)});
        continue;
      }
      in.own.push_back(buffer<W>(tensor.n));
      widen(tensor, in.own.back().get());
      in.parts.push_back({in.own.back().get(), static_cast<size_t>(tensor.n)});
    }
    return in;
  }

  void widen(const Tensor& half, float* out) {
    widen_half(kernels_, half.held, static_cast<const uint16_t*>(half.data), half.n, out);
  }

  void widen(const Tensor& tensor, double* out) {
    for (uint64_t at = 0; at < tensor.n; at += kChunk) {
      const size_t n = std::min<uint64_t>(kChunk, tensor.n - at);
      const float* from = decoder_.scratch().f32;
      if (tensor.held == Dtype::kFloat32) {
        from = static_cast<const float*>(tensor.data) + at;
      } else {
        const uint16_t* half = static_cast<const uint16_t*>(tensor.data) + at;
        widen_half(kernels_, tensor.held, half, n, decoder_.scratch().f32);
      }
      kernels_.f32_to_f64(from, n, out + at);
    }
  }

  // A half tensor that travels as it is.
  void halves(size_t index, const Tensor& tensor) {
    const uint16_t* x = static_cast<const uint16_t*>(tensor.data);
    if (kernels_.max_key_u16(x, tensor.n) >= infinity_of(tensor.held))
      require_finite(plan_.tensors, {&index, 1});
    out_.bytes(x, tensor.n * sizeof(uint16_t));
  }

  static uint32_t infinity_of(Dtype half) { return half == Dtype::kFloat16 ? 0x7c00 : 0x7f80; }

  template <class W>
  void require_finite_parts(const Source<W>& source) {
    const bool all =
        std::all_of(source.parts.begin(), source.parts.end(), [&](std::span<const W> part) {
          return finite(largest_key(kernels_, part.data(), part.size()));
        });
    if (!all) require_finite(source.tensors, source.group.members);
  }

  // Throws NonFinite for the first of the m kept values that does not fit the dtype.
  template <class W>
  void refuse(const Source<W>& source, const W* x, uint64_t m, Dtype dtype) {
    const uint64_t wrong = static_cast<uint64_t>(
        std::find_if(
            x, x + m,
            [&](W value) { return !(std::abs(static_cast<double>(value)) < overflow_of(dtype)); }) -
        x);
    if (wrong == m) unexpected(source);
    const auto found = [&](size_t member, uint64_t at) {
      const size_t tensor = source.group.members[member];
      const double value = value_at(source.tensors[tensor], at);
      throw NonFinite{tensor, at, value,
                      std::isfinite(value) ? static_cast<uint8_t>(dtype) : uint8_t{0}};
    };
    // The values, which an index set may ask for, are yet to come.
    Reader in(out_.data(), source.start, out_.capacity());
    const IndexSet set = read_index_set(
        kernels_, source.coder.select, source.tensors[source.group.members[0]], in, source.group.n);
    if (set.kind == IndexSet::Kind::kAll) found(0, wrong);
    Dealer dealer(source.tensors, source.group.members);
    uint64_t next = 0;
    for_each_position(set, dealer,
                      [&](size_t member, uint64_t at, const uint32_t* positions, size_t count) {
                        if (wrong - next < count) found(member, at + positions[wrong - next]);
                        next += count;
                      });
  }

  template <class F>
  void for_each_position(const IndexSet& set, Dealer& dealer, F&& f) {
    decoder_.reserve(set);
    decoder_.positions().for_each(set, 0, set.n,
                                  [&](uint64_t base, uint32_t* positions, size_t count) {
                                    dealer.deal(base, positions, count, f);
                                  });
  }

  // --- selection: writes the index set, gathers the kept values ---

  template <class W>
  void by_bits(const Source<W>& source, size_t number) {
    require_finite_parts(source);
    const Select& select = source.coder.select;
    const uint64_t n = source.group.n;
    kept_values(source,
                select.kind == Select::Kind::kMask ? mask(select, n) : random(select, number, n));
  }

  template <class W>
  void kept_values(const Source<W>& source, const IndexSet& set) {
    const auto kept = buffer<W>(set.kept);
    if (set.run >= kLongRun) {
      copy_stretches(source.parts[0].data(), set, kept.get());
    } else {
      W* next = kept.get();
      Dealer dealer(source.tensors, source.group.members);
      for_each_position(
          set, dealer, [&](size_t member, uint64_t at, const uint32_t* positions, size_t count) {
            gather(kernels_, source.parts[member].data() + at, positions, count, next);
            next += count;
          });
    }
    if (set.kept > 0) values(source, kept.get(), set.kept);
  }

  template <class W>
  static void copy_stretches(const W* x, const IndexSet& set, W* kept) {
    run_ranges(cut_ranges(set.n, set.step), [&](uint64_t begin, uint64_t end) {
      W* next = kept + set.entries[begin / set.step].kept;
      for_each_stretch(set, begin, end, [&](uint64_t at, uint64_t count) {
        std::memcpy(next, x + at, count * sizeof(W));
        next += count;
      });
    });
  }

  template <class W>
  void by_channels(const Source<W>& source) {
    const Select& select = source.coder.select;
    const W* const x = source.parts[0].data();
    const uint64_t n = source.group.n;
    const std::optional<Grid> grid =
        channels_of(source.tensors[source.group.members[0]], select.axis);
    if (!grid) return values(source, x, n);
    const std::vector<uint8_t> channels =
        kept_channels(kernels_, x, n, *grid, {select.value, select.order, !drops_zeros(source)});
    if (channels.empty()) unexpected(source);
    out_.bytes(channels.data(), channels.size());
    const IndexSet set = channel_set(kernels_, n, *grid, channels.data());
    set.kind == IndexSet::Kind::kAll ? values(source, x, n) : kept_values(source, set);
  }

  IndexSet mask(const Select& select, uint64_t n) {
    if (select.n != n)
      throw std::invalid_argument("the mask has another number of elements than its group");
    return mask_set(kernels_, select, n);
  }

  IndexSet random(const Select& select, size_t number, uint64_t n) {
    const uint64_t seed = at(select.seeds, number);
    const uint64_t k = at(select.counts, number);
    if (k > n) throw std::invalid_argument("random selection of more values than there are");
    out_.varint(k);
    out_.bytes(&seed, sizeof(seed));
    return random_set(kernels_, n, k, seed);
  }

  static uint64_t at(const std::vector<uint64_t>& of_groups, size_t number) {
    if (number < of_groups.size()) return of_groups[number];
    throw std::invalid_argument("a select stage lacks the parameters of a group");
  }

  template <class W>
  struct Kept {
    Cut<KeyOf<W>> cut;
    uint64_t m;
  };

  template <class W>
  Kept<W> cut_of(const Source<W>& source, size_t number) {
    const Select& select = source.coder.select;
    Kept<W> kept = {{0, 0}, 0};
    if (select.kind == Select::Kind::kTopK) {
      kept.m = count(source, number);
      kept.cut = topk_threshold(kernels_, source.parts, kept.m);
      if (kept.cut.key != 0 || !drops_zeros(source)) return kept;
      kept = {{0, 0}, 0};
    } else {
      kept.cut.key = threshold(source);
    }
    for (const auto& part : source.parts)
      kept.m += count_all_above(kernels_, part.data(), part.size(), kept.cut.key);
    return kept;
  }

  template <class W>
  KeyOf<W> threshold(const Source<W>& source) {
    const Select& select = source.coder.select;
    if (select.kind == Select::Kind::kThreshold) return key_of(threshold_of<W>(select.value));
    require_finite_parts(source);
    return key_of(percentile_threshold(kernels_, source.parts, select.value, select.interpolation));
  }

  template <class W>
  Selection<W> select(const Source<W>& source, size_t number) {
    if (source.coder.select.kind != Select::Kind::kTopK)
      return joined(fedcodec::select(kernels_, source.parts, Cut<KeyOf<W>>{threshold(source), 0}));
    const uint64_t k = count(source, number);
    Compensator<W> compensator(kernels_, source.tensors, source.group.members);
    Selection<W> kept =
        joined(topk(kernels_, source.parts, k, compensates_as_it_goes_ ? &compensator : nullptr));
    if (drops_zeros(source))
      kept.size = refine(kernels_, 0, 0, kept.positions.get(), kept.values.get(), k);
    return kept;
  }

  template <class W>
  void in_one_pass(const Source<W>& source, size_t number) {
    const Selection<W> kept = select(source, number);
    const std::span positions(kept.positions.get(), kept.size);
    TilePacker::write(pack_tiles(kernels_, positions, source.group.n), out_);
    if (kept.size > 0) return values(source, kept.values.get(), kept.size);
    require_finite_parts(source);
  }

  template <class W>
  uint64_t count(const Source<W>& source, size_t number) {
    const uint64_t k = at(source.coder.select.counts, number);
    if (k > source.group.n) throw std::invalid_argument("top-k of more values than there are");
    return k;
  }

  // Ternary keeps no zeros: they would decode to the magnitude.
  template <class W>
  static bool drops_zeros(const Source<W>& source) {
    return source.coder.quantize.kind == Quantize::Kind::kSign;
  }

  template <class W>
  void by_magnitude(const Source<W>& source, size_t number) {
    auto [cut, m] = cut_of(source, number);
    const uint64_t n = source.group.n;
    const unsigned t = tile_bits(n, m);
    const uint64_t full = uint64_t{1} << t;
    TilePacker packer(kernels_, t, n, m);
    // A kernel may write as much as it reads before it knows what is kept.
    const auto kept = buffer<W>(m + kWindow);
    const auto positions = buffer<uint32_t>(std::min(m, full) + kWindow);
    uint64_t length = std::min(full, n);
    uint64_t read = 0;      // elements of the tile
    size_t in_tile = 0;     // of them kept
    uint64_t done = 0;      // kept in all
    uint64_t finished = 0;  // elements of the tiles before
    for (const auto& part : source.parts) {
      for (size_t at = 0; at < part.size();) {
        const size_t step =
            std::min({uint64_t{kWindow}, uint64_t{part.size() - at}, length - read});
        uint32_t* to = positions.get() + in_tile;
        const size_t count = compact(kernels_, part.data() + at, step, cut.key, cut.ties,
                                     static_cast<uint32_t>(read), to, kept.get() + done);
        if (count > m - done) unexpected(source);
        in_tile += count;
        done += count;
        at += step;
        read += step;
        if (read < length) continue;
        packer.add(positions.get(), in_tile, length);
        finished += length;
        length = std::min(full, n - finished);
        in_tile = 0;
        read = 0;
      }
    }
    if (done != m) unexpected(source);
    TilePacker::write({&packer, 1}, out_);
    if (m > 0) return values(source, kept.get(), m);
    require_finite_parts(source);
  }

  // A cut that keeps another number than it should has met what is not a number, or other numbers
  // than it was made of.
  template <class W>
  [[noreturn]] void unexpected(const Source<W>& source) {
    require_finite_parts(source);
    throw std::runtime_error("the input changed while it was encoded");
  }

  // --- values ---

  template <class W>
  void values(const Source<W>& source, const W* x, uint64_t m) {
    const Quantize& quantize = source.coder.quantize;
    const Layout layout = layout_of(quantize, source.tensors, source.group, m);
    if (layout.form == Form::kPlain) return plain(layout.dtype, source, x, m);
    bool fits;
    if constexpr (std::is_same_v<W, double>) {
      const auto rounded = buffer<float>(m);
      kernels_.f64_to_f32(x, m, rounded.get());
      fits = coded(quantize, layout, rounded.get(), m);
    } else {
      fits = coded(quantize, layout, x, m);
    }
    if (!fits) refuse(source, x, m, Dtype::kFloat32);
  }

  template <class W>
  void plain(Dtype dtype, const Source<W>& source, const W* x, uint64_t m) {
    if (!is_half(dtype)) {
      const bool summed = out_.worth_summing(m * sizeof(W));
      uint32_t sum = 0;
      uint8_t* const to = out_.take(m * sizeof(W));
      if (!finite(copy(kernels_, x, m, to, summed ? &sum : nullptr))) refuse(source, x, m, dtype);
      if (summed) out_.sum_up(sum, m * sizeof(W));
      return;
    }
    Scratch& scratch = decoder_.scratch();
    for (uint64_t at = 0; at < m; at += kChunk) {
      const size_t n = std::min<uint64_t>(kChunk, m - at);
      round_to(kernels_, dtype, chunk_of(x + at, n), scratch);
      if (kernels_.max_key_u16(scratch.u16, n) >= infinity_of(dtype)) refuse(source, x, m, dtype);
      out_.bytes(scratch.u16, n * sizeof(uint16_t));
      out_.sum_up();
    }
  }

  static Chunk chunk_of(const float* x, size_t n) { return {x, nullptr, n}; }
  static Chunk chunk_of(const double* x, size_t n) { return {nullptr, x, n}; }

  // False if a value is not finite.
  bool coded(const Quantize& quantize, const Layout& layout, const float* x, uint64_t m) {
    return layout.form == Form::kSigns ? signs(x, m) : codes(quantize, layout, x, m);
  }

  bool signs(const float* x, uint64_t m) {
    uint8_t* const to_magnitude = out_.take(sizeof(float));
    const uint32_t largest = fedcodec::signs(kernels_, x, m, out_.take(ceil_div(m, 8)));
    if (!finite(largest)) return false;
    const float magnitude = mean_magnitude(kernels_, x, m, largest);
    std::memcpy(to_magnitude, &magnitude, sizeof(magnitude));
    return true;
  }

  bool codes(const Quantize& quantize, const Layout& layout, const float* x, uint64_t m) {
    std::vector<float> scales(layout.grid.channels);
    uint8_t* to_scales = out_.take(scales.size() * sizeof(float));
    const uint64_t bytes = ceil_div(m * layout.bits, 8);
    uint8_t* packed = out_.take(bytes);
    std::optional<Draw> draw;
    if (quantize.stochastic) {
      draw = {quantize.codec_seed, quantize.call_seed, drawn_};
      drawn_ += m;
    }
    const bool summed = out_.worth_summing(bytes);
    uint32_t sum = 0;
    const uint32_t largest =
        fedcodec::quantize(kernels_, x, m, layout.grid, layout.bits, draw, scales.data(),
                           Codes::kPacked, packed, summed ? &sum : nullptr);
    if (!finite(largest)) return false;
    std::memcpy(to_scales, scales.data(), scales.size() * sizeof(float));
    if (summed) out_.sum_up(sum, bytes);
    return true;
  }

  // Values that stay in cache, of whole blocks and with codes of whole bytes; all m where a block
  // is too large for that.
  static uint64_t blocks_at_once(size_t block, uint64_t m) {
    if (block > kChunk) return m;
    const size_t whole = block % 8 == 0 ? block : 8 * block;
    return whole > kChunk ? m : kChunk / whole * whole;
  }

  const Plan& plan_;
  const Kernels& kernels_;
  Writer out_;
  uint64_t drawn_;
  Decoder decoder_;
  bool compensates_as_it_goes_ = false;
};

uint64_t coder_bound(const Plan& plan, const Coder& coder, std::span<const size_t> floats) {
  uint64_t bound = 0;
  for (const Coder& term : coder.terms) bound += coder_bound(plan, term, floats);
  if (!coder.terms.empty()) return bound;
  const std::vector<Group> groups = groups_of(plan.tensors, floats, coder.select);
  for (size_t i = 0; i < groups.size(); ++i) {
    uint64_t kept = groups[i].n;
    const bool counted =
        coder.select.kind == Select::Kind::kTopK || coder.select.kind == Select::Kind::kRandom;
    if (counted && i < coder.select.counts.size()) kept = std::min(kept, coder.select.counts[i]);
    // Fewer values take no more; 18 bytes are random selection's.
    if (kept > 0) bound += layout_of(coder.quantize, plan.tensors, groups[i], kept).bytes;
    if (coder.select.kind != Select::Kind::kAll) bound += sparse_bound(groups[i].n) + 18;
  }
  return bound;
}

}  // namespace
}  // namespace fedcodec
