// Encoding tensors on a GPU: what encode-inl.h does, with launches for kernels. The host decides,
// and knows no value but how many are kept; layouts and checks are the CPU's own.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "body-inl.h"
#include "body.h"

namespace fedcodec::cuda {
namespace {

bool is_wide(const Group& group) { return group.value == Dtype::kFloat64; }

Part part_of(const Tensor& tensor) { return {tensor.data, tensor.n, 0, 0, 0, tensor.held}; }

// One coder without terms and the float tensors of its segment, on their way to bytes.
class Coding {
 public:
  Coding(const Plan& plan, const Coder& coder, std::span<const Tensor> tensors,
         std::span<const size_t> floats, Workspace& workspace)
      : plan_(plan),
        coder_(coder),
        tensors_(tensors),
        workspace_(workspace),
        groups_(groups_of(tensors, floats, coder.select)),
        value_of_(groups_.size(), kNone) {}

  // False where a group is too large for positions of 32 bits, and for channels: they have no
  // kernel.
  bool can_run() const {
    if (coder_.select.kind == Select::Kind::kStructured) return false;
    return coder_.select.kind == Select::Kind::kAll ||
           std::all_of(groups_.begin(), groups_.end(),
                       [](const Group& group) { return group.n >> 32 == 0; });
  }

  // Launches selection and the choice of tiles.
  void select(uint32_t* not_finite) {
    if (coder_.select.kind == Select::Kind::kAll) return;
    for (const bool wide : {false, true}) {
      Kind kind = {wide};
      for (size_t i = 0; i < groups_.size(); ++i) {
        if (groups_[i].n > 0 && is_wide(groups_[i]) == wide) kind.groups.push_back(i);
      }
      if (kind.groups.empty()) continue;
      wide ? select<double>(kind, not_finite) : select<float>(kind, not_finite);
      kinds_.push_back(std::move(kind));
    }
  }

  // Asks for what selection has found.
  void read(Readback& readback) {
    for (Kind& kind : kinds_) {
      kind.host_begins.resize(kind.groups.size() + 1);
      readback.add(kind.host_begins.data(), kind.begins,
                   kind.host_begins.size() * sizeof(uint64_t));
      if (!has_tiles()) continue;
      kind.sets.resize(kind.groups.size());
      readback.add(kind.sets.data(), kind.plans.sets, kind.sets.size() * sizeof(PlannedSet));
    }
  }

  // Lays the bytes out and launches what writes them.
  void write(uint64_t& drawn, uint32_t* not_finite) {
    std::vector<ValueGroup> values;
    std::vector<std::vector<uint64_t>> offsets(kinds_.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].n > 0) lay_out(i, drawn, offsets, values);
    }
    // Tiles are or'ed into zeros; what the host adds later is read back, and by words beside it.
    bytes_ = has_tiles() || !patches_.empty() ? workspace_.zeros<uint8_t>(ceil_div(size_, 4) * 4)
                                              : workspace_.array<uint8_t>(size_);
    for (size_t i = 0; i < kinds_.size() && has_tiles(); ++i) {
      write_tiles(kinds_[i].plans, static_cast<uint32_t>(kinds_[i].groups.size()),
                  workspace_.upload(offsets[i]), bytes_, workspace_);
    }
    uint64_t chunks = 0, scales = 0;
    for (ValueGroup& group : values) {
      group.scales = bytes_ + reinterpret_cast<uintptr_t>(group.scales);
      group.data = bytes_ + reinterpret_cast<uintptr_t>(group.data);
      group.first_chunk = static_cast<uint32_t>(chunks);
      group.first_scale = scales;
      chunks += chunks_of(group.m);
      scales += group.form == Form::kCodes ? group.grid.channels : 0;
    }
    const Quantize& quantize = coder_.quantize;
    const Draw draw = {quantize.codec_seed, quantize.call_seed, 0};
    encode_values({values, workspace_.upload(values), chunks, scales},
                  quantize.stochastic ? &draw : nullptr, not_finite, workspace_);
    values_ = std::move(values);
  }

  uint64_t size() const { return size_; }
  const uint8_t* bytes() const { return bytes_; }

  // Adds what only the host knows to the bytes.
  void patch(uint8_t* bytes) const {
    for (const auto& [at, text] : patches_) std::memcpy(bytes + at, text.data(), text.size());
  }

  // Subtracts what the bytes decode to from tensors of float32, or of float64 where they are that.
  void subtract_from(std::span<const Tensor> tensors) {
    std::vector<Target> targets;
    const auto add = [&](std::span<const size_t> groups, const Kind* kind) {
      std::vector<CodedGroup> coded;
      targets.clear();
      uint64_t chunks = 0;
      for (size_t j = 0; j < groups.size(); ++j) {
        if (value_of_[groups[j]] == kNone) continue;
        const ValueGroup& group = values_[value_of_[groups[j]]];
        coded.push_back({group.form, group.dtype, group.bits, group.grid, group.scales, group.data,
                         group.m, chunks, kind != nullptr ? kind->host_begins[j] : 0,
                         static_cast<uint32_t>(targets.size()), 0});
        chunks += chunks_of(group.m);
        uint64_t first = 0;
        for (size_t i : groups_[groups[j]].members) {
          const Tensor& to = tensors[i];
          if (to.n > 0) targets.push_back({to.data, to.n, first, to.held, to.held});
          first += to.n;
        }
        coded.back().targets = static_cast<uint32_t>(targets.size()) - coded.back().first_target;
      }
      if (coded.empty()) return;
      accumulate_values({workspace_.upload(coded), static_cast<uint32_t>(coded.size()), chunks,
                         workspace_.upload(targets), kind != nullptr ? kind->positions : nullptr},
                        -1, workspace_);
    };
    for (const Kind& kind : kinds_) add(kind.groups, &kind);
    if (!kinds_.empty()) return;
    std::vector<size_t> all(groups_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    add(all, nullptr);
  }

 private:
  // The groups of one working type, and what is kept of them.
  struct Kind {
    bool wide;
    std::vector<size_t> groups = {};
    uint32_t* positions = nullptr;
    void* values = nullptr;
    uint64_t* begins = nullptr;
    Plans plans = {};
    std::vector<uint64_t> host_begins = {};
    std::vector<PlannedSet> sets = {};
  };

  static constexpr size_t kNone = SIZE_MAX;

  bool has_tiles() const {
    const auto kind = coder_.select.kind;
    return kind != Select::Kind::kAll && kind != Select::Kind::kRandom &&
           kind != Select::Kind::kMask;
  }

  template <class W>
  void select(Kind& kind, uint32_t* not_finite) {
    std::vector<Part> all;
    std::vector<uint64_t> sizes;
    uint64_t chunks = 0;
    for (size_t j = 0; j < kind.groups.size(); ++j) {
      const Group& group = groups_[kind.groups[j]];
      sizes.push_back(group.n);
      uint64_t first = 0;
      for (size_t i : group.members) {
        Part part = part_of(tensors_[i]);
        part.first = first;
        part.group = static_cast<uint32_t>(j);
        part.first_chunk = static_cast<uint32_t>(chunks);
        if (part.n > 0) all.push_back(part);
        first += part.n;
        chunks += chunks_of(part.n);
      }
    }
    const Parts parts = {workspace_.upload(all), static_cast<uint32_t>(all.size()),
                         static_cast<uint32_t>(chunks), static_cast<uint32_t>(sizes.size())};
    const uint64_t room = keep<W>(kind, parts, sizes, not_finite);
    if (!has_tiles()) return;
    kind.plans = plan_tiles(sizes, kind.begins, kind.positions, room, workspace_);
  }

  // Returns how many are kept at most.
  template <class W>
  uint64_t keep(Kind& kind, const Parts& parts, const std::vector<uint64_t>& sizes,
                uint32_t* not_finite) {
    const Select& select = coder_.select;
    const auto take = [&](const auto& what, const KeptCounts& counts, uint64_t room) {
      kind.begins = counts.begins;
      kind.positions = workspace_.array<uint32_t>(room);
      W* const values = workspace_.array<W>(room);
      kind.values = values;
      write_kept(parts, what, counts, kind.positions, values, not_finite, workspace_);
      return room;
    };
    if (select.kind == Select::Kind::kTopK) {
      std::vector<uint64_t> counts;
      for (size_t i : kind.groups) counts.push_back(count(i));
      const Kept<W> kept = topk<W>(parts, sizes, counts, drops_zeros(), not_finite, workspace_);
      kind.positions = kept.positions;
      kind.values = kept.values;
      kind.begins = kept.begins;
      uint64_t room = 0;
      for (uint64_t k : counts) room += k;
      return room;
    }
    check_finite(parts, not_finite, workspace_);
    if (has_tiles()) {
      const Cuts<W> cuts = cuts_of<W>(parts, sizes);
      const KeptCounts counts = count_kept(parts, cuts, workspace_);
      uint64_t room = 0;
      Readback readback(workspace_);
      readback.add(&room, counts.begins + sizes.size(), sizeof(room));
      readback.finish();
      return take(cuts, counts, room);
    }
    std::vector<const uint32_t*> bits;
    uint64_t room = 0;
    for (size_t i : kind.groups) bits.push_back(bits_of(i, room));
    const uint32_t* const* const strings = workspace_.upload(bits);
    return take(strings, count_kept(parts, strings, workspace_), room);
  }

  template <class W>
  Cuts<W> cuts_of(const Parts& parts, const std::vector<uint64_t>& sizes) {
    const Select& select = coder_.select;
    if (select.kind == Select::Kind::kPercentile) {
      return percentile_cuts<W>(parts, workspace_.upload(sizes), select.value, select.interpolation,
                                workspace_);
    }
    const std::vector<KeyOf<W>> keys(sizes.size(), key_of(threshold_of<W>(select.value)));
    return {workspace_.upload(keys), workspace_.zeros<uint64_t>(sizes.size())};
  }

  // A group's bit string; adds how many it keeps.
  const uint32_t* bits_of(size_t group, uint64_t& room) {
    const Select& select = coder_.select;
    const uint64_t n = groups_[group].n;
    uint32_t* const bits = workspace_.zeros<uint32_t>(ceil_div(n, 32));
    if (select.kind == Select::Kind::kMask) {
      if (select.n != n)
        throw std::invalid_argument("the mask has another number of elements than its group");
      workspace_.copy(bits, select.bits.data(), select.bits.size(), cudaMemcpyHostToDevice);
      room += plan_.kernels.count_bits(select.bits.data(), select.bits.size());
    } else {
      const uint64_t k = count(group);
      set_random_bits(parameter(select.seeds, group), n, k, bits, workspace_);
      room += k;
    }
    return bits;
  }

  uint64_t count(size_t group) const {
    const uint64_t k = parameter(coder_.select.counts, group);
    if (k > groups_[group].n)
      throw std::invalid_argument("selection of more values than there are");
    return k;
  }

  static uint64_t parameter(const std::vector<uint64_t>& of_groups, size_t group) {
    if (group < of_groups.size()) return of_groups[group];
    throw std::invalid_argument("a select stage lacks the parameters of a group");
  }

  // Ternary keeps no zeros: they would decode to the magnitude.
  bool drops_zeros() const { return coder_.quantize.kind == Quantize::Kind::kSign; }

  // Offsets from the beginning of the bytes stand in for pointers until there are bytes.
  void lay_out(size_t i, uint64_t& drawn, std::vector<std::vector<uint64_t>>& offsets,
               std::vector<ValueGroup>& values) {
    const Group& group = groups_[i];
    const void* x = nullptr;
    Dtype held = group.value;
    uint64_t m = group.n;
    if (coder_.select.kind == Select::Kind::kAll) {
      x = tensors_[group.members[0]].data;
      held = tensors_[group.members[0]].held;
    }
    for (size_t c = 0; c < kinds_.size(); ++c) {
      const Kind& kind = kinds_[c];
      const auto found = std::lower_bound(kind.groups.begin(), kind.groups.end(), i);
      if (found == kind.groups.end() || *found != i) continue;
      const auto j = static_cast<size_t>(found - kind.groups.begin());
      const uint64_t begin = kind.host_begins[j];
      m = kind.host_begins[j + 1] - begin;
      held = kind.wide ? Dtype::kFloat64 : Dtype::kFloat32;
      x = static_cast<const std::byte*>(kind.values) + begin * item_size(held);
      index_set(i, kind, j, m, offsets[c]);
    }
    if (m == 0) return;
    const Layout layout = layout_of(coder_.quantize, tensors_, group, m);
    const Described how = described(layout);
    uint64_t number = 0;
    if (how.form == Form::kCodes && coder_.quantize.stochastic)
      number = std::exchange(drawn, drawn + m);
    value_of_[i] = values.size();
    values.push_back({x, held, m, 0, how.form, how.dtype, how.bits, how.grid, 0, number,
                      at_offset(size_), at_offset(size_ + scale_bytes(layout))});
    size_ += layout.bytes;
  }

  static uint8_t* at_offset(uint64_t offset) {
    return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(offset));
  }

  void index_set(size_t i, const Kind& kind, size_t j, uint64_t m, std::vector<uint64_t>& offsets) {
    offsets.push_back(size_);
    if (has_tiles()) {
      size_ += 1 + kind.sets[j].header_bytes + kind.sets[j].data_bytes;
    } else if (coder_.select.kind == Select::Kind::kRandom) {
      std::vector<uint8_t> text(varint_size(m) + sizeof(uint64_t));
      const uint64_t seed = parameter(coder_.select.seeds, i);
      std::memcpy(text.data() + put_varint(text.data(), m), &seed, sizeof(seed));
      const uint64_t at = std::exchange(size_, size_ + text.size());
      patches_.emplace_back(at, std::move(text));
    }
  }

  const Plan& plan_;
  const Coder& coder_;
  std::span<const Tensor> tensors_;
  Workspace& workspace_;
  std::vector<Group> groups_;
  std::vector<Kind> kinds_;
  std::vector<ValueGroup> values_;
  std::vector<size_t> value_of_;  // a group: which of them, or kNone
  std::vector<std::pair<uint64_t, std::vector<uint8_t>>> patches_;
  uint64_t size_ = 0;
  uint8_t* bytes_ = nullptr;
};

class Encoder {
 public:
  Encoder(const Plan& plan, uint64_t drawn, cudaStream_t stream)
      : plan_(plan),
        workspace_(stream),
        readback_(workspace_),
        not_finite_(workspace_.zeros<uint32_t>(1)),
        drawn_(drawn) {}

  bool encode(const std::function<uint8_t*(size_t)>& allocate) {
    for (const Segment& segment : plan_.segments) {
      segments_.push_back({floats_of(plan_, segment, true), floats_of(plan_, segment, false)});
      if (!begin(segment.coder, segments_.back())) return false;
    }
    for (Work& work : segments_) work.codings.back()->read(readback_);
    if (!all_finite()) return false;
    size_t size = 0;
    for (Work& work : segments_) {
      work.codings.back()->write(drawn_, not_finite_);
      for (const auto& coding : work.codings) size += coding->size();
      for (size_t i : work.exact) size += plan_.tensors[i].n * item_size(plan_.tensors[i].dtype);
    }
    uint8_t* const out = allocate(size);
    for_each_stretch(out, [&](uint8_t* to, const Coding* coding, const Tensor* tensor, uint64_t n) {
      readback_.add(to, coding != nullptr ? coding->bytes() : tensor->data, n);
    });
    if (!all_finite()) return false;
    for_each_stretch(out, [&](uint8_t* to, const Coding* coding, const Tensor* tensor, uint64_t n) {
      if (coding != nullptr) return coding->patch(to);
      if (tensor->dtype == Dtype::kBool) std::for_each(to, to + n, [](uint8_t& x) { x = x != 0; });
    });
    return is_decodable(out);
  }

 private:
  struct Work {
    std::vector<size_t> floats, exact;
    std::vector<std::unique_ptr<Coding>> codings = {};
    std::vector<Tensor> missed = {};  // of a residual's first term
  };

  bool begin(const Coder& coder, Work& work) {
    for (size_t i : work.floats) compensate(plan_.tensors[i]);
    if (coder.terms.empty()) return select(coder, plan_.tensors, work);
    if (!select(coder.terms[0], plan_.tensors, work)) return false;
    Coding& first = *work.codings.back();
    first.read(readback_);
    if (!all_finite()) return false;
    first.write(drawn_, not_finite_);
    miss(work);
    first.subtract_from(work.missed);
    return select(coder.terms[1], work.missed, work);
  }

  bool select(const Coder& coder, std::span<const Tensor> tensors, Work& work) {
    work.codings.push_back(
        std::make_unique<Coding>(plan_, coder, tensors, work.floats, workspace_));
    if (!work.codings.back()->can_run()) return false;
    work.codings.back()->select(not_finite_);
    return true;
  }

  void compensate(const Tensor& tensor) {
    if (tensor.update == nullptr) return;
    sum(tensor.update, tensor.update_held, tensor.residual, tensor.n,
        tensor.held == Dtype::kFloat64, tensor.data, workspace_);
  }

  // Copies of the float tensors in the type of their sums.
  void miss(Work& work) {
    work.missed.assign(plan_.tensors.begin(), plan_.tensors.end());
    std::vector<ValueGroup> widened;
    uint64_t chunks = 0;
    for (size_t i : work.floats) {
      Tensor& tensor = work.missed[i];
      const void* const from = tensor.data;
      const Dtype held = std::exchange(
          tensor.held, tensor.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32);
      uint8_t* const to = workspace_.array<uint8_t>(tensor.n * item_size(tensor.held));
      tensor.data = to;
      if (tensor.n == 0) continue;
      widened.push_back({from,
                         held,
                         tensor.n,
                         static_cast<uint32_t>(chunks),
                         Form::kPlain,
                         tensor.held,
                         0,
                         {1, 1},
                         0,
                         0,
                         nullptr,
                         to});
      chunks += chunks_of(tensor.n);
    }
    encode_values({widened, workspace_.upload(widened), chunks, 0}, nullptr, not_finite_,
                  workspace_);
  }

  // Reads back what was asked for.
  bool all_finite() {
    uint32_t raised = 0;
    readback_.add(&raised, not_finite_, sizeof(raised));
    readback_.finish();
    return raised == 0;
  }

  // Calls f(to, coding or null, tensor or null, size) for all that makes up the body.
  template <class F>
  void for_each_stretch(uint8_t* out, F&& f) const {
    for (const Work& work : segments_) {
      for (const auto& coding : work.codings) {
        f(out, coding.get(), nullptr, coding->size());
        out += coding->size();
      }
      for (size_t i : work.exact) {
        const Tensor& tensor = plan_.tensors[i];
        const uint64_t n = tensor.n * item_size(tensor.dtype);
        f(out, nullptr, &tensor, n);
        out += n;
      }
    }
  }

  // A scale that tensors share, or a sum, may take a value beyond its tensor's dtype.
  bool is_decodable(const uint8_t* body) const {
    fedcodec::Decoder decoder(plan_, false);
    for (size_t i = 0; i < segments_.size(); ++i) {
      const Work& work = segments_[i];
      uint64_t size = 0;
      for (const auto& coding : work.codings) size += coding->size();
      const Coder& coder = plan_.segments[i].coder;
      const bool safe = coder.terms.empty() &&
                        std::none_of(work.floats.begin(), work.floats.end(), [&](size_t tensor) {
                          return is_half(plan_.tensors[tensor].dtype);
                        });
      if (!safe) {
        Reader in(body, 0, size);
        Parsed parsed = decoder.parse(coder, work.floats, in);
        try {
          decoder.require_finite(parsed);
        } catch (const NonFinite&) {
          return false;
        }
      }
      for (size_t tensor : work.exact)
        size += plan_.tensors[tensor].n * item_size(plan_.tensors[tensor].dtype);
      body += size;
    }
    return true;
  }

  const Plan& plan_;
  Workspace workspace_;
  Readback readback_;
  uint32_t* not_finite_;
  uint64_t drawn_;
  std::vector<Work> segments_;
};

}  // namespace

bool encode_body(const Plan& plan, uint64_t drawn, cudaStream_t stream,
                 const std::function<uint8_t*(size_t)>& allocate) {
  return Encoder(plan, drawn, stream).encode(allocate);
}

}  // namespace fedcodec::cuda
