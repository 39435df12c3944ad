// Decoding: a checked view of the bytes, then the walk that writes. Part of body.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "fedcodec/body.h"
#include "values-inl.h"

namespace fedcodec {
namespace {

struct ParsedGroup {
  Group group;
  IndexSet kept;
  Values values;
  Ranges ranges;  // that several threads may write, once prepared
};

using Memory = std::vector<std::unique_ptr<std::byte[]>>;

struct Parsed {
  std::span<const size_t> floats;
  std::vector<ParsedGroup> groups;
  std::vector<Parsed> terms;  // two: a residual
  double bound = 0;           // of the magnitudes, before they are rounded to their tensors' dtypes
  Memory sum;                 // of the terms, once prepared
};

// What a thread needs to write.
struct Workspace {
  explicit Workspace(const Kernels& kernels) : positions(kernels) {}

  Scratch scratch;
  Positions positions;
};

// Reads codings: `parse` checks the bytes, `prepare` makes all that `write` would allocate, `write`
// cannot fail.
class Decoder {
 public:
  // Tiles that `parse` does not check are checked before they are first read.
  explicit Decoder(const Plan& plan, bool checks_tiles = true)
      : kernels_(plan.kernels),
        tensors_(plan.tensors),
        checks_tiles_(checks_tiles),
        own_(std::make_unique<Workspace>(plan.kernels)),
        idle_{own_.get()} {}

  // For every set so far, in every workspace: whichever is taken serves.
  void reserve(const IndexSet& set) {
    room_.add(set);
    for (Workspace* workspace : idle_) workspace->positions.reserve(room_);
  }

  Scratch& scratch() { return own_->scratch; }
  Positions& positions() { return own_->positions; }

  Parsed parse(const Coder& coder, std::span<const size_t> floats, Reader& in) {
    Parsed parsed;
    parsed.floats = floats;
    if (!coder.terms.empty()) {
      for (const Coder& term : coder.terms) {
        parsed.terms.push_back(parse(term, floats, in));
        parsed.bound += parsed.terms.back().bound;
      }
      parsed.bound *= kRoundings;
      return parsed;
    }
    const std::vector<Group> groups = groups_of(tensors_, floats, coder.select);
    parsed.groups.reserve(groups.size());
    for (const Group& group : groups) {
      if (group.n == 0) continue;
      parsed.groups.push_back(parse_group(coder, group, in));
      parsed.bound = std::max(parsed.bound, parsed.groups.back().values.bound);
    }
    return parsed;
  }

  // Throws NonFinite.
  void require_finite(Parsed& parsed) {
    FiniteSink sink(tensors_);
    if (!parsed.terms.empty()) {
      if (surely_finite(parsed.bound, parsed.floats)) return;
      prepare(parsed);
      return write(parsed, sink);
    }
    for (ParsedGroup& group : parsed.groups) {
      if (surely_finite(group.values.bound, group.group.members)) continue;
      check_tiles(kernels_, group.kept);
      reserve(group.kept);
      write_group(group, sink);
    }
  }

  // One bound for several tensors serves where it is finite in all of them and their sums are of
  // one type.
  void measure(Parsed& parsed, LargestSink& sink) {
    if (!parsed.terms.empty() && !sink.take(parsed.floats, parsed.bound)) {
      prepare(parsed);
      write(parsed, sink);
    }
    for (ParsedGroup& group : parsed.groups) {
      if (sink.take(group.group.members, group.values.bound)) continue;
      prepare(group);
      write_group(group, sink);
    }
  }

  void prepare(Parsed& parsed) {
    for (ParsedGroup& group : parsed.groups) prepare(group);
    if (parsed.terms.empty() || !parsed.sum.empty()) return;
    parsed.sum = decoded(parsed.terms[0], sums_);
    const Memory second = decoded(parsed.terms[1], seconds_);
    for (size_t i : parsed.floats) {
      const Tensor& to = sums_[i];
      if (to.dtype == Dtype::kFloat32) {
        kernels_.add_f32(static_cast<float*>(seconds_[i].data), to.n, 1,
                         static_cast<float*>(to.data));
      } else {
        kernels_.add_f64(static_cast<double*>(seconds_[i].data), to.n, 1,
                         static_cast<double*>(to.data));
      }
    }
  }

  void write(const Parsed& parsed, Sink& sink) {
    for (const ParsedGroup& group : parsed.groups) write_group(group, sink);
    if (parsed.terms.empty()) return;
    for (size_t i : parsed.floats) {
      const Tensor& sum = sums_[i];
      const bool narrow = sum.dtype == Dtype::kFloat32;
      for (uint64_t at = 0; at < sum.n; at += kChunk) {
        const size_t n = std::min<uint64_t>(kChunk, sum.n - at);
        sink.put(i, at, nullptr,
                 {narrow ? static_cast<float*>(sum.data) + at : nullptr,
                  narrow ? nullptr : static_cast<double*>(sum.data) + at, n},
                 scratch());
      }
    }
  }

  // What a coding decodes to before it is rounded to a narrower dtype: `work`, as many tensors as
  // the plan's or none yet, gets its tensors, which lie in the memory returned.
  Memory decoded(Parsed& parsed, std::vector<Tensor>& work) {
    if (work.empty()) work.assign(tensors_.begin(), tensors_.end());
    Memory memory;
    for (size_t i : parsed.floats) {
      Tensor& tensor = work[i];
      tensor.dtype = tensor.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
      tensor.held = tensor.dtype;
      memory.push_back(buffer<std::byte>(multiply(tensor.n, item_size(tensor.dtype))));
      tensor.data = memory.back().get();
    }
    prepare(parsed);
    DecodeSink sink(kernels_, work);
    write(parsed, sink);
    return memory;
  }

 private:
  ParsedGroup parse_group(const Coder& coder, const Group& group, Reader& in) {
    if (group.n >> 63 != 0) throw Malformed{"a group of 2^63 elements or more", in.offset()};
    ParsedGroup parsed = {group,
                          read_index_set(kernels_, coder.select, tensors_[group.members[0]], in,
                                         group.n, checks_tiles_),
                          {},
                          {group.n, group.n}};
    const uint64_t m = parsed.kept.kept;
    if (m > 0) {
      const Layout layout = layout_of(coder.quantize, tensors_, group, m);
      parsed.values = read_values(kernels_, layout, m, in);
    }
    return parsed;
  }

  bool surely_finite(double bound, std::span<const size_t> members) const {
    return std::all_of(members.begin(), members.end(), [&](size_t i) {
      return std::isfinite(round_magnitude(tensors_[i].dtype, bound));
    });
  }

  void prepare(ParsedGroup& group) {
    check_tiles(kernels_, group.kept);
    const bool dense = group.kept.kind == IndexSet::Kind::kAll;
    group.ranges = cut_ranges(group.group.n, dense ? kChunk : group.kept.step);
    while (others_.size() + 1 < group.ranges.threads) {
      others_.push_back(std::make_unique<Workspace>(kernels_));
      idle_.push_back(others_.back().get());
    }
    reserve(group.kept);
  }

  void write_group(const ParsedGroup& group, Sink& sink) {
    const uint64_t n = group.group.n;
    const bool shared = sink.work(n, group.kept.kept) >= 2 * kLeastRange;
    const Ranges ranges = shared ? group.ranges : Ranges{n, n};
    run_ranges(ranges, [&](uint64_t begin, uint64_t end) {
      const Lease lease(*this);
      if (group.kept.kind == IndexSet::Kind::kAll) {
        write_dense(group, begin, end, sink, lease.workspace.scratch);
      } else if (group.kept.run >= kLongRun) {
        write_stretches(group, begin, end, sink, lease.workspace.scratch);
      } else {
        write_sparse(group, begin, end, sink, lease.workspace);
      }
    });
  }

  void write_sparse(const ParsedGroup& group, uint64_t begin, uint64_t end, Sink& sink,
                    Workspace& workspace) const {
    const Values& values = group.values;
    const std::span<const size_t> members = group.group.members;
    Scratch& scratch = workspace.scratch;
    size_t unfinished = 0;
    uint64_t start = 0;  // of that member
    while (start + size_of(members[unfinished]) <= begin) start += size_of(members[unfinished++]);
    scratch.written = begin - start;
    const auto finish = [&] {
      const uint64_t n = size_of(members[unfinished]);
      sink.finish(members[unfinished], std::min(n, end - start), scratch);
      start += n;
      ++unfinished;
      scratch.written = 0;
    };
    Dealer dealer(tensors_, members);
    uint64_t next = group.kept.entries[begin / group.kept.step].kept;
    const auto put = [&](size_t member, uint64_t at, const uint32_t* positions, size_t count) {
      while (unfinished < member) finish();
      for (size_t i = 0; i < count; i += kChunk) {
        const size_t n = std::min(kChunk, count - i);
        const Chunk chunk = values.read(kernels_, next, n, nullptr, scratch);
        sink.put(members[member], at, positions + i, chunk, scratch);
        next += n;
      }
    };
    workspace.positions.for_each(group.kept, begin, end,
                                 [&](uint64_t base, uint32_t* positions, size_t count) {
                                   dealer.deal(base, positions, count, put);
                                 });
    while (unfinished < members.size() && start < end) finish();
  }

  void write_dense(const ParsedGroup& group, uint64_t begin, uint64_t end, Sink& sink,
                   Scratch& scratch) const {
    const size_t tensor = group.group.members[0];
    const Values& values = group.values;
    for (uint64_t at = begin; at < end; at += kChunk) {
      const size_t n = std::min<uint64_t>(kChunk, end - at);
      if (values.layout.form == Form::kCodes && sink.put_codes(tensor, at, values, n, scratch))
        continue;
      sink.put(tensor, at, nullptr, values.read(kernels_, at, n, sink.place(tensor, at), scratch),
               scratch);
    }
  }

  void write_stretches(const ParsedGroup& group, uint64_t begin, uint64_t end, Sink& sink,
                       Scratch& scratch) const {
    if (begin == end) return;
    const size_t tensor = group.group.members[0];
    uint64_t next = group.kept.entries[begin / group.kept.step].kept;
    scratch.written = begin;
    for_each_stretch(group.kept, begin, end, [&](uint64_t at, uint64_t count) {
      sink.finish(tensor, at, scratch);
      for (uint64_t i = 0; i < count; i += kChunk) {
        const size_t n = std::min<uint64_t>(kChunk, count - i);
        float* const place = sink.place(tensor, at + i);
        sink.put(tensor, at + i, nullptr, group.values.read(kernels_, next, n, place, scratch),
                 scratch);
        next += n;
      }
      scratch.written = at + count;
    });
    sink.finish(tensor, end, scratch);
  }

  uint64_t size_of(size_t tensor) const { return tensors_[tensor].n; }

  // An idle workspace, until the lease ends: as many as there are threads at work were prepared.
  struct Lease {
    explicit Lease(Decoder& owner) : decoder(owner), workspace(take(owner)) {}
    ~Lease() {
      const std::lock_guard lock(decoder.taking_);
      decoder.idle_.push_back(&workspace);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    static Workspace& take(Decoder& owner) {
      const std::lock_guard lock(owner.taking_);
      Workspace* const idle = owner.idle_.back();
      owner.idle_.pop_back();
      return *idle;
    }

    Decoder& decoder;
    Workspace& workspace;
  };

  const Kernels& kernels_;
  std::span<const Tensor> tensors_;
  bool checks_tiles_;
  std::unique_ptr<Workspace> own_;
  std::vector<std::unique_ptr<Workspace>> others_;
  std::mutex taking_;
  std::vector<Workspace*> idle_;
  Room room_;
  // Of all segments' residuals, for a copy each would be segments times tensors.
  std::vector<Tensor> sums_, seconds_;
};

struct ParsedSegment {
  std::vector<size_t> floats;
  Parsed coded;
  std::vector<size_t> exact;
  std::vector<const uint8_t*> bytes;  // of the exact tensors
};

const uint8_t* parse_exact(const Tensor& tensor, Reader& in) {
  const size_t start = in.offset();
  const uint8_t* bytes = in.take(multiply(tensor.n, item_size(tensor.dtype)), "a tensor");
  if (tensor.dtype == Dtype::kBool) {
    uint8_t all = 0;
    for (uint64_t i = 0; i < tensor.n; ++i) all |= bytes[i];
    if (all > 1) throw Malformed{"a bool is neither 0 nor 1", start};
  }
  return bytes;
}

std::vector<ParsedSegment> parse_body(const Plan& plan, Decoder& decoder, const uint8_t* payload,
                                      size_t start, size_t stop) {
  Reader in(payload, start, stop);
  std::vector<ParsedSegment> body;
  for (const Segment& segment : plan.segments) {
    const size_t at = in.offset();
    body.push_back({floats_of(plan, segment, true), {}, floats_of(plan, segment, false), {}});
    ParsedSegment& parsed = body.back();
    parsed.coded = decoder.parse(segment.coder, parsed.floats, in);
    try {
      decoder.require_finite(parsed.coded);
    } catch (const NonFinite&) {
      throw Malformed{"a value is not finite in its tensor's dtype", at};
    }
    for (size_t i : parsed.exact) parsed.bytes.push_back(parse_exact(plan.tensors[i], in));
  }
  in.finish("the body");
  return body;
}

// In the arithmetic of the sums themselves: rounding keeps order, so a bound stays one.
template <class T>
double raised(double bound, double weight, double largest) {
  const T added = static_cast<T>(std::abs(weight)) * static_cast<T>(largest);
  return static_cast<double>(static_cast<T>(bound) + added);
}

// The bounds of sums that a body is added to; throws Malformed where they could leave their range.
Bounds raised_bounds(const Plan& plan, Decoder& decoder, std::vector<ParsedSegment>& body,
                     double weight, Bounds bounds, size_t start) {
  LargestSink largest(plan.tensors);
  for (ParsedSegment& segment : body) decoder.measure(segment.coded, largest);
  bounds.f32 = raised<float>(bounds.f32, weight, largest.found().f32);
  bounds.f64 = raised<double>(bounds.f64, weight, largest.found().f64);
  if (!std::isfinite(bounds.f32)) throw Malformed{"the sum could leave float32's range", start};
  if (!std::isfinite(bounds.f64)) throw Malformed{"the sum could leave float64's range", start};
  return bounds;
}

template <class T>
void add_exact(const Kernels& kernels, const uint8_t* bytes, uint64_t n, double weight, double* acc,
               Scratch& scratch) {
  for (uint64_t at = 0; at < n; at += kChunk) {
    const size_t count = std::min<uint64_t>(kChunk, n - at);
    for (size_t i = 0; i < count; ++i) {
      T value;
      std::memcpy(&value, bytes + (at + i) * sizeof(T), sizeof(T));
      scratch.f64[i] = static_cast<double>(value);
    }
    kernels.add_f64(scratch.f64, count, weight, acc + at);
  }
}

auto exact_adder(Dtype dtype) {
  switch (dtype) {
    case Dtype::kInt8:
      return add_exact<int8_t>;
    case Dtype::kInt16:
      return add_exact<int16_t>;
    case Dtype::kInt32:
      return add_exact<int32_t>;
    case Dtype::kInt64:
      return add_exact<int64_t>;
    case Dtype::kUint16:
      return add_exact<uint16_t>;
    case Dtype::kUint32:
      return add_exact<uint32_t>;
    case Dtype::kUint64:
      return add_exact<uint64_t>;
    default:
      return add_exact<uint8_t>;
  }
}

}  // namespace
}  // namespace fedcodec
