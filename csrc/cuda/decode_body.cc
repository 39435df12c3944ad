// Decoding to tensors on a GPU, and into sums there: the CPU parses, the GPU checks the data of
// tiles and writes.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "body-inl.h"
#include "body.h"

namespace fedcodec::cuda {
namespace {

// Runs a body that the CPU has parsed.
class Runner {
 public:
  Runner(const Plan& plan, const uint8_t* payload, size_t start, size_t stop, cudaStream_t stream)
      : plan_(plan), workspace_(stream), payload_(payload + start) {
    uint8_t* const copied = workspace_.array<uint8_t>(stop - start);
    to_device(copied, payload_, stop - start, by_, workspace_);
    copied_ = copied;
  }

  // Whether the tiles that the CPU has not looked at are of the format.
  bool tiles_are_valid(const std::vector<ParsedSegment>& body) {
    std::vector<CodedTile> tiles;
    uint64_t before = 0;
    const auto add = [&](const auto& self, const Parsed& parsed) -> void {
      for (const Parsed& term : parsed.terms) self(self, term);
      for (const ParsedGroup& group : parsed.groups) {
        const IndexSet& set = group.kept;
        if (set.kind != IndexSet::Kind::kTiles || set.checked) continue;
        add_tiles(set, before, tiles);
        if (set.kept > 0) found_.groups.push_back(&group);
      }
    };
    for (const ParsedSegment& segment : body) add(add, segment.coded);
    if (tiles.empty()) return true;
    uint32_t malformed = UINT32_MAX;
    uint32_t* const lowest = workspace_.upload(std::span<const uint32_t>(&malformed, 1));
    found_.tiles = workspace_.upload(tiles);
    found_.n = tiles.size();
    check_tiles(found_.tiles, found_.n, lowest, workspace_);
    Readback readback(workspace_);
    readback.add(&malformed, lowest, sizeof(malformed));
    readback.finish();
    return malformed == UINT32_MAX;
  }

  // All that the GPU needs to write what was parsed: what may fail for want of memory is done
  // before anything is written.
  struct Ready {
    std::vector<std::pair<void*, size_t>> cleared;
    std::vector<CodedGroups> groups;
    struct Sum {
      const void* first;
      const void* second;
      bool wide;
      Target to;
    };
    std::vector<Sum> sums;
  };

  // For tensors to be written, or to be added to.
  Ready prepare(const Parsed& parsed, std::span<const Tensor> tensors, bool adds) {
    Ready ready;
    if (!parsed.terms.empty()) {
      sums(parsed, tensors, ready);
      return ready;
    }
    std::vector<const ParsedGroup*> dense, sparse;
    for (const ParsedGroup& group : parsed.groups) {
      const bool all = group.kept.kind == IndexSet::Kind::kAll;
      if (!all && !adds) {
        for (size_t i : group.group.members)
          ready.cleared.emplace_back(tensors[i].data, tensors[i].n * item_size(tensors[i].held));
      }
      if (group.kept.kept > 0) (all ? dense : sparse).push_back(&group);
    }
    if (!dense.empty()) ready.groups.push_back(coded(dense, nullptr, tensors));
    if (!sparse.empty()) ready.groups.push_back(coded(sparse, positions(sparse), tensors));
    return ready;
  }

  // Writes what groups decode to; or adds it, with a weight.
  void run(const Ready& ready, std::optional<double> weight) {
    for (const auto& [data, size] : ready.cleared) {
      if (size > 0) check(cudaMemsetAsync(data, 0, size, workspace_.stream()), "clearing a tensor");
    }
    for (const CodedGroups& groups : ready.groups)
      weight ? accumulate_values(groups, *weight, workspace_) : decode_values(groups, workspace_);
    for (const auto& [first, second, wide, to] : ready.sums) {
      weight ? accumulate_sum(first, second, wide, to, *weight, workspace_)
             : decode_sum(first, second, wide, to, workspace_);
    }
  }

  void exact(const Tensor& to, const uint8_t* bytes, std::optional<double> weight) {
    if (to.n == 0) return;
    const uint8_t* const from = on_device(bytes);
    if (weight) {
      accumulate_exact(to.dtype, from, to.n, *weight, static_cast<double*>(to.data), workspace_);
    } else {
      workspace_.copy(to.data, from, to.n * item_size(to.dtype), cudaMemcpyDeviceToDevice);
    }
  }

  void finish() { workspace_.synchronize(); }

 private:
  const uint8_t* on_device(const uint8_t* bytes) const { return copied_ + (bytes - payload_); }

  CodedGroups coded(std::span<const ParsedGroup* const> groups, const uint32_t* positions,
                    std::span<const Tensor> tensors) {
    std::vector<CodedGroup> coded;
    std::vector<Target> targets;
    uint64_t chunks = 0, before = 0;
    for (const ParsedGroup* parsed : groups) {
      const Values& values = parsed->values;
      const Layout& layout = values.layout;
      const Described how = described(layout);
      const uint8_t* const data = on_device(values.data);
      coded.push_back({how.form, how.dtype, how.bits, how.grid, data - scale_bytes(layout), data,
                       values.m, chunks, before, static_cast<uint32_t>(targets.size()), 0});
      chunks += chunks_of(values.m);
      before += values.m;
      uint64_t first = 0;
      for (size_t i : parsed->group.members) {
        const Tensor& to = tensors[i];
        if (to.n > 0) targets.push_back({to.data, to.n, first, to.dtype, to.held});
        first += to.n;
      }
      coded.back().targets = static_cast<uint32_t>(targets.size()) - coded.back().first_target;
    }
    return {workspace_.upload(coded), static_cast<uint32_t>(coded.size()), chunks,
            workspace_.upload(targets), positions};
  }

  // Those of all groups, one after the other.
  const uint32_t* positions(std::span<const ParsedGroup* const> groups) {
    uint64_t kept = 0;
    for (const ParsedGroup* group : groups) kept += group->kept.kept;
    uint32_t* const all = workspace_.array<uint32_t>(kept);
    if (std::equal(groups.begin(), groups.end(), found_.groups.begin(), found_.groups.end())) {
      unpack_tiles(found_.tiles, found_.n, all, workspace_);
      return all;
    }
    std::vector<CodedTile> tiles;
    uint64_t before = 0;
    for (const ParsedGroup* group : groups) {
      const IndexSet& set = group->kept;
      set.kind == IndexSet::Kind::kTiles ? add_tiles(set, before, tiles)
                                         : add_bits(set, before, tiles);
    }
    unpack_tiles(workspace_.upload(tiles), tiles.size(), all, workspace_);
    return all;
  }

  void add_tiles(const IndexSet& set, uint64_t& before, std::vector<CodedTile>& tiles) const {
    if (set.entries.empty()) return;
    Reader headers = set.entries[0].headers, data = set.entries[0].data;
    for_each_tile(0, set.n, set.t, [&](uint64_t begin, uint64_t length) {
      const Tile tile = read_header(headers, set.t, length);
      const uint8_t* const bytes = data.take(tile_bytes(tile, length), "a tile");
      tiles.push_back({tile, on_device(bytes), begin, before, static_cast<uint32_t>(length)});
      before += tile.kept(length);
    });
  }

  // Bit strings are bitmaps; they are no part of the payload.
  void add_bits(const IndexSet& set, uint64_t& before, std::vector<CodedTile>& tiles) {
    const uint64_t n_bytes = ceil_div(set.n, 8);
    uint8_t* const bits = workspace_.array<uint8_t>(n_bytes);
    workspace_.copy(bits, set.bits, n_bytes, cudaMemcpyHostToDevice);
    for_each_tile(0, set.n, kMinTileBits, [&](uint64_t begin, uint64_t length) {
      const uint64_t kept = plan_.kernels.count_bits(set.bits + begin / 8, ceil_div(length, 8));
      if (kept > 0) {
        tiles.push_back({{kBitmap, false, 0, kept, 0},
                         bits + begin / 8,
                         begin,
                         before,
                         static_cast<uint32_t>(length)});
      }
      before += kept;
    });
  }

  // The terms of a residual, each by itself.
  void sums(const Parsed& parsed, std::span<const Tensor> tensors, Ready& ready) {
    std::vector<Tensor> terms[2];
    for (size_t which : {0, 1}) {
      std::vector<Tensor>& term = terms[which];
      term.assign(tensors.begin(), tensors.end());
      for (size_t i : parsed.floats) {
        Tensor& tensor = term[i];
        tensor.dtype = tensor.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
        tensor.held = tensor.dtype;
        tensor.data = workspace_.array<uint8_t>(multiply(tensor.n, item_size(tensor.dtype)));
      }
      run(prepare(parsed.terms[which], term, false), {});
    }
    for (size_t i : parsed.floats) {
      const Tensor& to = tensors[i];
      if (to.n == 0) continue;
      ready.sums.push_back({terms[0][i].data,
                            terms[1][i].data,
                            to.dtype == Dtype::kFloat64,
                            {to.data, to.n, 0, to.dtype, to.held}});
    }
  }

  const Plan& plan_;
  Pinned by_;  // outlives the workspace, which waits where a call fails
  Workspace workspace_;
  const uint8_t* payload_;
  const uint8_t* copied_ = nullptr;
  // Those that were to be checked: often one coding's, and then all that it has.
  struct {
    std::vector<const ParsedGroup*> groups;
    const CodedTile* tiles = nullptr;
    size_t n = 0;
  } found_;
};

// What the CPU finds first, where it looks at everything in order, is said of wrong bytes.
std::vector<ParsedSegment> parse(const Plan& plan, fedcodec::Decoder& decoder,
                                 const uint8_t* payload, size_t start, size_t stop) {
  try {
    return parse_body(plan, decoder, payload, start, stop);
  } catch (const Malformed&) {
    check_body(plan, payload, start, stop);
    throw;
  }
}

// Validates what the CPU has left, and only then writes.
void run(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
         const std::vector<ParsedSegment>& body, std::optional<double> weight,
         cudaStream_t stream) {
  Runner runner(plan, payload, start, stop, stream);
  if (!runner.tiles_are_valid(body)) {
    check_body(plan, payload, start, stop);  // says what is wrong
    throw DeviceError("the GPU refuses a payload that the CPU does not");
  }
  std::vector<Runner::Ready> ready;
  for (const ParsedSegment& segment : body)
    ready.push_back(runner.prepare(segment.coded, plan.tensors, weight.has_value()));
  for (const Runner::Ready& segment : ready) runner.run(segment, weight);
  for (const ParsedSegment& segment : body) {
    for (size_t i = 0; i < segment.exact.size(); ++i)
      runner.exact(plan.tensors[segment.exact[i]], segment.bytes[i], weight);
  }
  runner.finish();
}

}  // namespace

void decode_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                 cudaStream_t stream) {
  fedcodec::Decoder decoder(plan, false);
  run(plan, payload, start, stop, parse(plan, decoder, payload, start, stop), {}, stream);
}

Bounds accumulate_body(const Plan& plan, const uint8_t* payload, size_t start, size_t stop,
                       double weight, Bounds bounds, bool dry, cudaStream_t stream) {
  fedcodec::Decoder decoder(plan, dry);
  std::vector<ParsedSegment> body = parse(plan, decoder, payload, start, stop);
  bounds = raised_bounds(plan, decoder, body, weight, bounds, start);
  if (!dry) run(plan, payload, start, stop, body, weight, stream);
  return bounds;
}

}  // namespace fedcodec::cuda
